#!/usr/bin/env python
"""Time reconstructions with full-size models over d, S and K, and the share of it that quantisation adds (Figure 5).

    python experiments/quantisation_overhead.py                          # some five minutes on 2 cores
    python experiments/quantisation_overhead.py --device cuda --repeats 1000 --batch_sizes 1 16 \\
        --latent_channels 4 8 16 32 64 128 256 --codebook_size 128 512 1024 8192 16384        # the paper's

Writes quantisation_overhead.json and .png. The weights are random, since only time is measured. On a CPU the codebook
search is compiled from the start, as it is in a long run; the overhead is the time of the quantiser over that of the
rest. On CUDA both are measured as they are, as CUDA graphs, compiled, and both.
"""

import datetime
import functools

import pandas as pd
import torch
from sweep import grid
from sweep_report import draw_overhead
from tqdm import tqdm

from diffusers_pq import PQModel, ProductQuantizer
from diffusers_pq.console import one_line_errors
from diffusers_pq.files import write_json
from diffusers_pq.flags import COUNT
from diffusers_pq.measuring import (
    MeasuringParser,
    compile_autoencoder,
    describe_machine,
    in_passes,
    measure_modes,
    random_autoencoder,
    results_folder,
)
from diffusers_pq.models import search


def parse_args(argv=None):
    parser = MeasuringParser("experiments/results", description=__doc__)
    parser.add_argument(
        "--model", default="model_cards/pqgan-f8", help="PQModel in whose config d, S and K are varied"
    )
    parser.add_argument("--latent_channels", nargs="+", type=COUNT, default=[32, 128, 256], help="latent channels d")
    parser.add_argument(
        "--num_subspaces", nargs="+", default=["1", "d/8", "d/4", "d/2", "d"], help="subspaces S, of each d"
    )
    parser.add_argument(
        "--codebook_size", nargs="+", type=COUNT, default=[128, 1024, 16384], help="sizes of a codebook K"
    )
    parser.add_argument("--pixels", type=COUNT, default=256, help="side of the pictures, in pixels")
    parser.add_argument("--repeats", type=COUNT, default=5, help="measurements, of which the median counts")
    return parser.parse_args(argv)


@torch.no_grad()
def measure_backbone(channels, args):
    """By batch size: latents, and time and memory of encoding and decoding without quantisation by mode."""
    shape = {"latent_channels": channels, "num_subspaces": channels}
    model = random_autoencoder(PQModel, args.model, args, **shape)
    found = {}
    for size in args.batch_sizes:
        images = torch.rand(size, 3, args.pixels, args.pixels, device=args.device, dtype=model.dtype) * 2 - 1
        found[size] = images, model.encode(images).latents, {}
    for modes in in_passes(args.modes, lambda: compile_autoencoder(model)):
        for images, _, rows in found.values():
            around = functools.partial(encode_and_decode, model, images)
            rows |= measure_modes(around, modes, args.repeats, args.device)
    return {size: (latents, rows) for size, (_, latents, rows) in found.items()}


def encode_and_decode(model, images):
    return model.decode(model.encode(images).latents, quantize=False)


@torch.no_grad()
def measure_quantizer(configuration, latents, args):
    """Time and memory of quantising latents, by mode."""
    shape = configuration.latent_channels, configuration.num_subspaces, configuration.codebook_size
    quantizer = ProductQuantizer(*shape).eval().to(args.device)
    found = {}
    for modes in in_passes(args.modes, quantizer.compile):
        found |= measure_modes(lambda: quantizer(latents), modes, args.repeats, args.device)
    return found


def overhead(quantisation, backbone):
    if "error" in quantisation or "error" in backbone:
        return {"error": quantisation.get("error") or backbone["error"]}
    own, rest = quantisation["seconds"], backbone["seconds"]
    peak = max(quantisation["peak_gib"], backbone["peak_gib"])
    return {"seconds": own + rest, "quantisation": own, "overhead": own / rest, "peak_gib": peak}


def measure(configuration, backbones, args):
    """A row for each batch size: by mode, and what was found in the first of them as the row's own."""
    shape = {"d": configuration.latent_channels, "S": configuration.num_subspaces, "K": configuration.codebook_size}
    for size, (latents, backbone) in backbones[configuration.latent_channels].items():
        quantisation = measure_quantizer(configuration, latents, args)
        modes = {mode: overhead(quantisation[mode], backbone[mode]) for mode in args.modes}
        yield shape | {"batch_size": size} | modes[args.modes[0]] | {"modes": modes}


def main(args):
    folder = args.output_dir or results_folder("experiments/results", args.device, args.small)
    search.COMPILE_AFTER = 0
    configurations = grid(args.latent_channels, args.num_subspaces, args.codebook_size)
    backbones = {channels: measure_backbone(channels, args) for channels in tqdm(args.latent_channels, desc="models")}
    rows = []
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{describe_machine(args.device)}, {args.dtype}",
        "model": args.model,
        "pixels": args.pixels,
        "configurations": rows,
    }
    for configuration in tqdm(configurations, desc="quantisers"):
        rows += measure(configuration, backbones, args)
        write_json(folder / "quantisation_overhead.json", record)
    table = pd.DataFrame(rows).drop(columns="modes")
    draw_overhead(table[table.batch_size == args.batch_sizes[0]], folder / "quantisation_overhead.png")
    print(table.to_string(index=False, float_format="{:.4g}".format))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
