#!/usr/bin/env python
"""A grid of pictures that one or several text-to-image pipelines of diffusers paint from the same prompts and seeds.

python benchmarks/generate_pictures.py --models PQSD=model_cards/pqsd-mini --prompts "a ladybug" "a red apple"
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from diffusers_pq.training.arguments import named


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, type=named, metavar="NAME=PATH_OR_REPO")
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--num_images_per_prompt", type=int, default=1)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, help="default: the pipeline's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo/generated.png"))
    return parser.parse_args(argv)


def paint(source, args):
    """PIL pictures `[prompts][images]`, each from a seed of its own."""
    pipeline = DiffusionPipeline.from_pretrained(source, trust_remote_code=True).to(args.device)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    count = args.num_images_per_prompt
    prompts = [prompt for prompt in args.prompts for _ in range(count)]
    seeds = [torch.Generator().manual_seed(args.seed + number) for number in range(len(prompts))]
    sampling = {"num_inference_steps": args.num_inference_steps}
    if args.guidance_scale is not None:
        sampling["guidance_scale"] = args.guidance_scale
    images = pipeline(prompts, generator=seeds, **sampling).images
    return [images[start : start + count] for start in range(0, len(images), count)]


def draw(pictures, prompts, path):
    """A row for each model, a column for each prompt with its pictures below each other."""
    count = len(next(iter(pictures.values()))[0])
    rows = len(pictures) * count
    figure, axes = plt.subplots(
        rows, len(prompts), figsize=(1.8 * len(prompts), 2 * rows), squeeze=False, layout="constrained"
    )
    for model_number, (name, per_prompt) in enumerate(pictures.items()):
        for column, images in enumerate(per_prompt):
            for number, image in enumerate(images):
                axis = axes[model_number * count + number, column]
                axis.imshow(image)
                axis.set(xticks=[], yticks=[])
            if column == 0:
                axes[model_number * count, 0].set_ylabel(name, fontsize=9)
    for axis, prompt in zip(axes[0], prompts):
        axis.set_title(prompt, fontsize=8, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(args):
    pictures = {}
    for name, source in args.models:
        pictures[name] = paint(source, args)
    draw(pictures, args.prompts, args.output)
    print(f"Picture: {args.output}")


if __name__ == "__main__":
    main(parse_args())
