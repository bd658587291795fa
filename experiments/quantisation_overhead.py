#!/usr/bin/env python
"""Time reconstructions with full-size models over d, S and K, and the share of it that quantisation adds (Figure 5).

    python experiments/quantisation_overhead.py                          # some five minutes on 2 cores
    python experiments/quantisation_overhead.py --device cuda --repeats 1000 \\
        --latent_channels 4 8 16 32 64 128 256 --codebook_size 128 512 1024 8192 16384        # the paper's

Writes quantisation_overhead.json and .png. The weights are random, since only time is measured. The codebook search is
compiled from the start, as it is in a long run; the overhead is the time of the quantiser over that of the rest.
"""

import datetime

import pandas as pd
import torch
from sweep import grid
from sweep_report import draw_overhead
from tqdm import tqdm

from diffusers_pq import PQModel, ProductQuantizer
from diffusers_pq.console import one_line_errors
from diffusers_pq.files import write_json
from diffusers_pq.flags import COUNT, FlagParser, device, output_folder
from diffusers_pq.measuring import describe_machine, measure_seconds, results_folder
from diffusers_pq.models import search


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
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
    parser.add_argument("--device", type=device, default="cpu", help="device to compute on, such as cuda or mps")
    parser.add_argument(
        "--output_dir", type=output_folder, help="folder of the results; default: experiments/results/ and the device"
    )
    return parser.parse_args(argv)


@torch.no_grad()
def measure_backbone(channels, args):
    """Seconds of encoding and decoding without quantisation, and latents."""
    config = PQModel.load_config(args.model) | {"latent_channels": channels, "num_subspaces": channels}
    model = PQModel.from_config(config).eval().to(args.device)
    images = torch.rand(1, 3, args.pixels, args.pixels, device=args.device) * 2 - 1
    latents = model.encode(images).latents
    seconds = measure_seconds(
        lambda: model.decode(model.encode(images).latents, quantize=False), args.repeats, args.device
    )
    return seconds, latents


@torch.no_grad()
def measure_quantizer(configuration, latents, args):
    shape = configuration.latent_channels, configuration.num_subspaces, configuration.codebook_size
    quantizer = ProductQuantizer(*shape).eval().to(args.device)
    return measure_seconds(lambda: quantizer(latents), args.repeats, args.device, warm_up=2)


def main(args):
    folder = args.output_dir or results_folder("experiments/results", args.device)
    search.COMPILE_AFTER = 0
    configurations = grid(args.latent_channels, args.num_subspaces, args.codebook_size)
    backbones = {channels: measure_backbone(channels, args) for channels in tqdm(args.latent_channels, desc="models")}
    rows = []
    for one in tqdm(configurations, desc="quantisers"):
        seconds, latents = backbones[one.latent_channels]
        quantisation = measure_quantizer(one, latents, args)
        rows.append(
            {
                "d": one.latent_channels,
                "S": one.num_subspaces,
                "K": one.codebook_size,
                "seconds": seconds + quantisation,
                "quantisation": quantisation,
                "overhead": quantisation / seconds,
            }
        )
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(args.device),
        "model": args.model,
        "pixels": args.pixels,
        "configurations": rows,
    }
    write_json(folder / "quantisation_overhead.json", record)
    table = pd.DataFrame(rows)
    draw_overhead(table, folder / "quantisation_overhead.png")
    print(table.to_string(index=False, float_format="{:.4g}".format))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
