#!/usr/bin/env python
"""The picture of README.md: details of photographs as several autoencoders reconstruct them, and pictures that a
text-to-image model generates.

    python benchmarks/overview.py --output outputs/demo/overview.jpg

The detail of a photograph is the square in which the errors of the autoencoders differ most.
"""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from diffusers_pq.autoencoders import load_autoencoder
from diffusers_pq.console import one_line_errors
from diffusers_pq.figures import draw_overview, most_different_box
from diffusers_pq.files import folder_or_hub, replacing
from diffusers_pq.flags import COUNT, FlagParser, named, output_file
from diffusers_pq.photographs import load_photographs
from diffusers_pq.reconstruction import reconstruct_picture


MODELS = [(name.upper(), f"model_cards/pqgan-mini-f8-{name}") for name in ("pq", "vq", "kl")]
PROMPTS = (
    "A red apple.",
    "A crow.",
    "A strawberry.",
    "A ladybug.",
    "A chicken.",
    "A frog.",
    "A tree.",
    "A banana.",
)


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        type=named,
        default=MODELS,
        metavar="NAME=SOURCE",
        help="autoencoders, folders or Hub repositories; default: the included ones",
    )
    parser.add_argument(
        "--photographs", nargs="+", default=["flower", "rocket", "china"], help="of the six held-out photographs"
    )
    parser.add_argument("--detail_side", type=COUNT, default=128, help="side of the details, in pixels")
    parser.add_argument("--pipeline", default="model_cards/pqsd-mini", help="text-to-image pipeline")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="texts to generate pictures from")
    parser.add_argument("--num_inference_steps", type=COUNT, default=50, help="denoising steps of each picture")
    parser.add_argument(
        "--output", type=output_file, default=Path("benchmarks/results/overview.jpg"), help="file to write"
    )
    return parser.parse_args(argv)


def detail(title, photograph, models, side):
    """Title -> square of a photograph, and of its reconstructions."""
    results = {name: reconstruct_picture(model, photograph) for name, model in models.items()}
    box = most_different_box(photograph, [result.picture for result in results.values()], side)
    found = {f"{name}, {result.scores['psnr']:.1f} dB": result.picture for name, result in results.items()}
    return {title: photograph.crop(box)} | {name: picture.crop(box) for name, picture in found.items()}


def paint(source, prompts, steps):
    with folder_or_hub(source):
        pipeline = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    seeds = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
    return dict(zip(prompts, pipeline(list(prompts), num_inference_steps=steps, generator=seeds).images))


def main(args):
    photographs = load_photographs()
    if unknown := set(args.photographs) - set(photographs):
        raise ValueError(f"--photographs names {', '.join(sorted(unknown))}; there are {', '.join(photographs)}.")
    models = {name: load_autoencoder(source) for name, source in args.models}
    details = [detail(f"{name}: original", photographs[name], models, args.detail_side) for name in args.photographs]
    figure = draw_overview(details, paint(args.pipeline, args.prompts, args.num_inference_steps))
    with replacing(args.output) as unfinished:
        figure.savefig(unfinished, format="jpeg", dpi=100, pil_kwargs={"quality": 88})
    print(f"Picture: {args.output}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
