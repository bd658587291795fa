#!/usr/bin/env python
"""Time and memory of encoding and decoding whole pictures, by memory layout and compiled; and what tiling changes.

    python benchmarks/model_speed.py --modes eager compiled
    python benchmarks/model_speed.py --device cuda --dtype float16 --batch_sizes 1 16 --layouts default channels_last

Writes model_speed.json and tiling.json; rows of earlier runs not measured again stay. The models have
their full size and random weights, since only time and memory are measured; the tiling is measured on photographs with
the trained model of --tiling_model. On CUDA all is measured as it is, as a CUDA graph, compiled, and both.
"""

import datetime
import itertools
import json

import torch
from PIL.Image import Resampling
from tqdm import tqdm

from diffusers_pq import PQModel
from diffusers_pq.autoencoders import load_autoencoder
from diffusers_pq.console import one_line_errors
from diffusers_pq.files import read_json, write_json
from diffusers_pq.flags import COUNT
from diffusers_pq.images import to_tensor, to_uint8
from diffusers_pq.measuring import (
    MeasuringParser,
    compile_autoencoder,
    describe_machine,
    in_passes,
    measure_modes,
    random_autoencoder,
    results_folder,
)
from diffusers_pq.metrics import psnr
from diffusers_pq.models import autoencoder_pq
from diffusers_pq.photographs import load_photographs


# `default` is what PQModel does by itself: on a CPU it brings pictures and latents into channels_last. `contiguous` is
# without, `channels_last` has the weights in that layout, too.
LAYOUTS = ("contiguous", "default", "channels_last")
FASTEST_LAYOUT = autoencoder_pq.fastest_layout


def parse_args(argv=None):
    parser = MeasuringParser("benchmarks/results", description=__doc__)
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
        "--layouts", nargs="+", choices=LAYOUTS, default=["contiguous", "default"], help="memory formats of the models"
    )
    parser.add_argument("--repeats", type=COUNT, default=3, help="measurements, of which the median counts")
    parser.add_argument(
        "--tiling_model",
        default="model_cards/pqgan-mini-f8-pq",
        help="autoencoder of the comparison of tiled pictures with whole ones",
    )
    parser.add_argument("--tiling_pixels", type=COUNT, default=1536, help="side of the picture of that comparison")
    return parser.parse_args(argv)


def build(path, layout, args):
    model = random_autoencoder(PQModel, path, args)
    autoencoder_pq.fastest_layout = (lambda x: x) if layout == "contiguous" else FASTEST_LAYOUT
    if layout == "channels_last":
        model.to(memory_format=torch.channels_last)
    return model


@torch.no_grad()
def measure(model, modes, pixels, batch_size, args):
    """One row for each mode."""
    images = torch.rand(batch_size, 3, pixels, pixels, device=args.device, dtype=model.dtype) * 2 - 1
    latents = model.encode(images).latents
    parts = {"encode": lambda: model.encode(images), "decode": lambda: model.decode(latents, quantize=False)}
    found = {name: measure_modes(part, modes, args.repeats, args.device) for name, part in parts.items()}
    for mode in modes:
        row = {"mode": mode}
        for name, rows in found.items():
            row |= {f"{name}_{quantity}": value for quantity, value in rows[mode].items()}
        yield row


@torch.no_grad()
def measure_tiling(path, pixels, args):
    """PSNR between the tiled and the whole decoding of enlarged photographs, and of both against the photographs."""
    model = load_autoencoder(path).to(args.device)
    scores = {"tiled_to_whole": [], "whole_to_original": [], "tiled_to_original": []}
    photographs = [*load_photographs().values()]
    for photo in photographs[:1] if args.small else photographs:
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
    table = [other for other in table if any(other.get(name) != row[name] for name in key)]
    write_json(path, [*table, row])
    print(json.dumps(row), flush=True)


def main(args):
    folder = args.output_dir or results_folder("benchmarks/results", args.device, args.small)
    where = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{describe_machine(args.device)}, {args.dtype}",
    }
    key = ("model", "variant", "mode", "pixels", "batch_size", "machine")
    for path, layout in itertools.product(args.models, args.layouts):
        model = build(path, layout, args)
        for modes in in_passes(args.modes, lambda model=model: compile_autoencoder(model)):
            sizes = [*itertools.product(args.batch_sizes, args.pixels)]
            for batch_size, pixels in tqdm(sizes, desc=f"{path} {layout} {' '.join(modes)}"):
                what = {"model": path, "variant": layout, "pixels": pixels, "batch_size": batch_size} | where
                for row in measure(model, modes, pixels, batch_size, args):
                    save_row(folder / "model_speed.json", what | row, key)
    row = measure_tiling(args.tiling_model, args.tiling_pixels, args) | where
    save_row(folder / "tiling.json", row, ("model", "pixels", "machine"))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
