#!/usr/bin/env python
"""A grid of pictures that one or several text-to-image pipelines of diffusers generate from the same prompts and seeds
(the form of Figures 4 and 8 to 10).

    python benchmarks/generate_pictures.py --models PQSD=model_cards/pqsd-mini --prompts "a ladybug" "a red apple"

Figure 4 and, with other sizes than a pipeline's own, Figures 8 to 10:

    python benchmarks/generate_pictures.py --models HR=runs/pqsd-hr Precise=runs/pqsd-precise Quick=runs/pqsd-quick \\
        --prompts "a fox in the snow" --device cuda --dtype float16 --pictures_dir outputs/figure4 \\
        --output outputs/figure4.png
    python benchmarks/generate_pictures.py --models HR=runs/pqsd-hr --height 1536 --width 3072 \\
        --prompts "a harbour at night" --device cuda --dtype float16 --pictures_dir outputs/figure10 \\
        --output outputs/figure10.png
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from diffusers_pq.console import one_line_errors
from diffusers_pq.files import folder_or_hub
from diffusers_pq.flags import COUNT, DTYPES, SCALE, SEED, FlagParser, device, named, output_file, output_folder


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument(
        "--models", nargs="+", required=True, type=named, metavar="NAME=PATH_OR_REPO", help="pipelines, a column each"
    )
    parser.add_argument("--prompts", nargs="+", required=True, help="texts, a row each")
    parser.add_argument("--num_images_per_prompt", type=COUNT, default=1, help="pictures of each text and model")
    parser.add_argument("--num_inference_steps", type=COUNT, default=50, help="denoising steps of each sample")
    parser.add_argument("--guidance_scale", type=SCALE, help="of classifier-free guidance; default: the pipeline's")
    parser.add_argument("--height", type=COUNT, help="height of the pictures, in pixels; default: the pipeline's")
    parser.add_argument("--width", type=COUNT, help="width of the pictures, in pixels; default: the pipeline's")
    parser.add_argument("--seed", type=SEED, default=0, help="seed of the noise")
    parser.add_argument("--device", type=device, default="cpu", help="device to compute on, such as cuda or mps")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the models")
    parser.add_argument(
        "--output", type=output_file, default=Path("outputs/demo/generated.png"), help="file of the grid, reduced"
    )
    parser.add_argument(
        "--pictures_dir", type=output_folder, help="folder for every picture in a file of its own, at full size"
    )
    return parser.parse_args(argv)


def paint(source, args):
    """PIL pictures `[prompts][images]`, each from a seed of its own."""
    options = {"trust_remote_code": True, "dtype": getattr(torch, args.dtype)}
    with folder_or_hub(source):
        pipeline = DiffusionPipeline.from_pretrained(source, **options).to(args.device)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    count = args.num_images_per_prompt
    prompts = [prompt for prompt in args.prompts for _ in range(count)]
    seeds = [torch.Generator().manual_seed(args.seed + number) for number in range(len(prompts))]
    given = {name: getattr(args, name) for name in ("guidance_scale", "height", "width")}
    sampling = {name: value for name, value in given.items() if value is not None}
    sampling["num_inference_steps"] = args.num_inference_steps
    images = pipeline(prompts, generator=seeds, **sampling).images
    return [images[start : start + count] for start in range(0, len(images), count)]


def draw(pictures, prompts, path):
    """A row for each model, a column for each prompt with its pictures below each other."""
    first = next(iter(pictures.values()))[0]
    rows = len(pictures) * len(first)
    count = len(first)
    size = (1.8 * len(prompts) * first[0].width / first[0].height, 2 * rows)
    figure, axes = plt.subplots(rows, len(prompts), figsize=size, squeeze=False, layout="constrained")
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


def save_pictures(pictures, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, per_prompt in pictures.items():
        for prompt_number, images in enumerate(per_prompt):
            for number, image in enumerate(images):
                image.save(folder / f"{name}-{prompt_number}-{number}.png")


def main(args):
    pictures = {name: paint(source, args) for name, source in args.models}
    if args.pictures_dir:
        save_pictures(pictures, args.pictures_dir)
    draw(pictures, args.prompts, args.output)
    print(f"Picture: {args.output}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
