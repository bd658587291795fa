#!/usr/bin/env python
"""Time and memory of encoding and decoding whole pictures, by memory layout and compiled; and what tiling changes.

    python benchmarks/model_speed.py                       # on a GPU: --device cuda --dtype float16

Writes model_speed.json and tiling.json; rows of earlier runs not measured again stay. The models have
their full size and random weights, since only time and memory are measured; the tiling is measured on photographs with
the trained model of --tiling_model.
"""

import datetime
import json
from pathlib import Path

import torch
from PIL.Image import Resampling
from tqdm import tqdm

from diffusers_pq import PQModel
from diffusers_pq.autoencoders import load_autoencoder
from diffusers_pq.console import one_line_errors
from diffusers_pq.files import read_json
from diffusers_pq.flags import COUNT, FlagParser
from diffusers_pq.images import to_tensor, to_uint8
from diffusers_pq.measuring import describe_machine, measure_peak_bytes, measure_seconds
from diffusers_pq.metrics import psnr
from diffusers_pq.models import autoencoder_pq
from diffusers_pq.photographs import load_photographs


# On a CPU PQModel takes the channels_last layout by default; "contiguous" is without.
VARIANTS = ("contiguous", "default", "compile")
FASTEST_LAYOUT = autoencoder_pq._fastest_layout


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["model_cards/pqgan-f8", "model_cards/pqgan-f16-d256"],
        help="autoencoders; folders or Hub repositories",
    )
    parser.add_argument(
        "--pixels", nargs="+", type=COUNT, default=[256, 768, 1536], help="side of the pictures, in pixels"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="what is switched on in the models"
    )
    parser.add_argument("--repeats", type=COUNT, default=3, help="measurements, of which the median counts")
    parser.add_argument("--device", default="cpu", help="device to compute on, such as cuda or mps")
    parser.add_argument("--dtype", default="float32", help="precision of the models")
    parser.add_argument(
        "--tiling_model",
        default="model_cards/pqgan-mini-f8-pq",
        help="autoencoder of the comparison of tiled pictures with whole ones",
    )
    parser.add_argument("--tiling_pixels", type=COUNT, default=1536, help="side of the picture of that comparison")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    return parser.parse_args(argv)


def build(path, variant, args):
    torch.manual_seed(0)
    model = PQModel.from_config(PQModel.load_config(path)).eval().to(args.device, getattr(torch, args.dtype))
    layout = (lambda x: x) if variant == "contiguous" else FASTEST_LAYOUT
    autoencoder_pq._fastest_layout = layout
    if variant == "compile":
        model.encoder.compile()
        model.decoder.compile()
    return model


@torch.no_grad()
def measure(model, pixels, repeats, args):
    images = torch.rand(1, 3, pixels, pixels, device=args.device, dtype=model.dtype) * 2 - 1
    latents = model.encode(images).latents
    steps = {"encode": lambda: model.encode(images), "decode": lambda: model.decode(latents, quantize=False)}
    row = {}
    for name, step in steps.items():
        # The call that is measured for memory comes first: it also warms up, and compiles.
        row[f"{name}_peak_gib"] = measure_peak_bytes(step, args.device) / 2**30
        row[f"{name}_seconds"] = measure_seconds(step, repeats, args.device, warm_up=repeats - 1)
    return row


@torch.no_grad()
def measure_tiling(path, pixels, args):
    """PSNR between the tiled and the whole decoding of enlarged photographs, and of both against the photographs."""
    model = load_autoencoder(path).to(args.device)
    scores = {"tiled_to_whole": [], "whole_to_original": [], "tiled_to_original": []}
    for photo in load_photographs().values():
        original = to_tensor(photo.resize((pixels, pixels), Resampling.BICUBIC))[None].to(args.device)
        latents = model.encode(original).latents
        model.disable_tiling()
        whole = model.decode(latents).sample
        model.enable_tiling()
        tiled = model.decode(latents).sample
        pictures = {"whole": to_uint8(whole), "tiled": to_uint8(tiled), "original": to_uint8(original)}
        for name, values in scores.items():
            values.append(float(psnr(*(pictures[part] for part in name.split("_to_")))))
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    return {"model": path, "pixels": pixels, "tile": model.tile_sample_min_size, **means}


def save_row(path, row, key):
    """Add a row to a table of rows in a JSON file; it replaces an earlier one that measured the same."""
    table = read_json(path) if path.is_file() else []
    table = [other for other in table if any(other[name] != row[name] for name in key)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*table, row], indent=2) + "\n")
    print(json.dumps(row), flush=True)


def main(args):
    where = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{describe_machine(args.device)}, {args.dtype}",
    }
    for path in args.models:
        for variant in args.variants:
            model = build(path, variant, args)
            for pixels in tqdm(args.pixels, desc=f"{path} {variant}"):
                repeats = args.repeats if pixels <= 256 or args.device != "cpu" else 1
                row = {"model": path, "variant": variant, "pixels": pixels} | where
                row |= measure(model, pixels, repeats, args)
                save_row(args.output_dir / "model_speed.json", row, ("model", "variant", "pixels", "machine"))
    row = measure_tiling(args.tiling_model, args.tiling_pixels, args) | where
    save_row(args.output_dir / "tiling.json", row, ("model", "pixels", "machine"))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
