#!/usr/bin/env python
"""Reconstruct the held-out photographs, or other pictures, with several autoencoders: a table, a JSON file and a
figure with crops and difference maps (the form of Figures 1 and 7).

    python benchmarks/reconstruct_photographs.py \\
        --models PQ=model_cards/pqgan-mini-f8-pq VQ=model_cards/pqgan-mini-f8-vq

A model is a folder, a Hub repository or one of the systems that `evaluate_reconstruction.py --list_systems` prints.
So, with the models of Figure 1:

    python benchmarks/reconstruct_photographs.py \\
        --models F8=runs/pqgan-f8-768 F16=runs/pqgan-f16-d256-768 SD2.1=sd21-vae \\
        --pictures street.jpg --crops street=640,300 --crop_side 128 --output_dir outputs/figure1

Time and memory are those of the first picture, for each of --batch_sizes; on CUDA as it is, as a CUDA graph, compiled,
and both.
"""

import datetime
import functools
import itertools
import statistics
from pathlib import Path

import torch

from diffusers_pq.autoencoders import downsampling_factor
from diffusers_pq.console import one_line_errors
from diffusers_pq.evaluation.systems import load_for_evaluation
from diffusers_pq.figures import draw_reconstructions, most_different_box
from diffusers_pq.files import replacing, write_json
from diffusers_pq.flags import COUNT, SCALE, named
from diffusers_pq.images import load_image, pad_to_multiple, to_tensor
from diffusers_pq.measuring import (
    MeasuringParser,
    compile_autoencoder,
    describe_machine,
    in_passes,
    measure_modes,
    results_folder,
)
from diffusers_pq.metrics import pooled_psnr
from diffusers_pq.photographs import load_photographs
from diffusers_pq.reconstruction import codebook_usage, reconstruct, reconstruct_picture
from diffusers_pq.tables import LATENT_COLUMNS, SCORE_COLUMNS, markdown_table


SCORES = ("psnr", "psnr_pooled", "ssim", "bits_per_pixel", "H_n", "P_n")
COLUMNS = {name: (SCORE_COLUMNS | LATENT_COLUMNS)[name] for name in SCORES}


def parse_args(argv=None):
    parser = MeasuringParser("benchmarks/results", description=__doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        required=True,
        type=named,
        metavar="NAME=SOURCE",
        help="autoencoders: folders, Hub repositories or systems",
    )
    parser.add_argument("--pictures", nargs="+", type=Path, help="picture files; default: the held-out photographs")
    parser.add_argument(
        "--crops",
        nargs="+",
        default=[],
        metavar="PICTURE=LEFT,TOP",
        help="corners of crops, in pixels; default: where the models' errors differ most",
    )
    parser.add_argument("--crop_side", type=COUNT, default=96, help="side of the crops, in pixels")
    parser.add_argument("--amplification", type=SCALE, default=4.0, help="factor of the differences that are shown")
    parser.add_argument("--repeats", type=COUNT, default=3, help="measurements of time, of which the median counts")
    args = parser.parse_args(argv)
    try:
        args.crops = {name: tuple(map(int, corner.split(","))) for name, corner in (c.split("=") for c in args.crops)}
        assert all(len(corner) == 2 for corner in args.crops.values())
    except (ValueError, AssertionError):
        parser.error("--crops takes PICTURE=LEFT,TOP")
    return args


@torch.no_grad()
def measure_speed(model, picture, args):
    """Time and memory of reconstructing a picture so many times at once, by batch size and mode."""
    padded = pad_to_multiple(to_tensor(picture)[None], downsampling_factor(model)).to(model.device, model.dtype)
    speed = {str(size): {} for size in args.batch_sizes}
    for modes in in_passes(args.modes, lambda: compile_autoencoder(model)):
        for size, found in speed.items():
            images = padded.repeat(int(size), 1, 1, 1)
            reconstruction = functools.partial(reconstruct, model, images)
            found |= measure_modes(reconstruction, modes, args.repeats, args.device)
    return speed


def summarise(model, results):
    """Means over the pictures; of all together: pooled PSNR and codebook use."""
    row = {
        name: statistics.mean(r.scores[name] for r in results.values()) for name in ("psnr", "ssim", "bits_per_pixel")
    }
    pixels = [r.picture.width * r.picture.height for r in results.values()]
    row["psnr_pooled"] = pooled_psnr([r.scores["psnr"] for r in results.values()], pixels)
    codes = [r.codes for r in results.values() if r.codes is not None]
    if codes:
        usage = codebook_usage(model, codes)
        row |= {"H_n": usage["H_n"], "P_n": usage["P_n"]}
    row["psnr_per_picture"] = {name: r.scores["psnr"] for name, r in results.items()}
    return row


def results_table(rows, modes):
    """Scores, and the seconds of a reconstruction in each mode for the first batch size."""
    lines = []
    for name, row in rows.items():
        scores = [format(row[column], spec) if column in row else "-" for column, (_, spec) in COLUMNS.items()]
        found = next(iter(row["speed"].values()))
        lines.append(
            [name, *scores, *(f"{found[mode]['seconds']:.3g}" if "seconds" in found[mode] else "-" for mode in modes)]
        )
    return markdown_table(
        ["model", *(title for title, _ in COLUMNS.values()), *(f"s, {mode}" for mode in modes)], lines
    )


def crop_boxes(args, pictures, reconstructions):
    """Of every picture: where the user wants it, or where the models differ most."""
    unknown = args.crops.keys() - pictures.keys()
    if unknown:
        raise ValueError(f"--crops names {', '.join(sorted(unknown))}; the pictures are {', '.join(pictures)}.")
    boxes = {}
    for name, picture in pictures.items():
        found = [by_picture[name] for by_picture in reconstructions.values()]
        boxes[name] = most_different_box(picture, found, args.crop_side)
        if name in args.crops:
            left, top = args.crops[name]
            boxes[name] = (left, top, left + args.crop_side, top + args.crop_side)
            if min(left, top) < 0 or boxes[name][2] > picture.width or boxes[name][3] > picture.height:
                raise ValueError(
                    f"--crops {name}={left},{top} leaves the picture of {picture.width} x {picture.height}."
                )
    return boxes


def load_pictures(paths):
    """By their names without suffix, which `--crops` and the table use."""
    stems = [path.stem for path in paths]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ValueError(f"--pictures has several files with the name {', '.join(twice)}: rename them.")
    return {path.stem: load_image(path) for path in paths}


def main(args):
    folder = args.output_dir or results_folder("benchmarks/results", args.device, args.small)
    pictures = load_pictures(args.pictures) if args.pictures else load_photographs()
    if args.small:
        pictures = dict(itertools.islice(pictures.items(), 1))
    rows, results = {}, {}
    for name, source in args.models:
        model = load_for_evaluation(source).to(args.device, getattr(torch, args.dtype))
        results[name] = {title: reconstruct_picture(model, picture) for title, picture in pictures.items()}
        speed = measure_speed(model, next(iter(pictures.values())), args)
        rows[name] = summarise(model, results[name]) | {"speed": speed}
    reconstructions = {name: {title: r.picture for title, r in found.items()} for name, found in results.items()}
    boxes = crop_boxes(args, pictures, reconstructions)
    titles = {
        name: {title: f"{name}, {r.scores['psnr']:.1f} dB" for title, r in found.items()}
        for name, found in results.items()
    }
    figure = draw_reconstructions(pictures, reconstructions, boxes, titles, args.amplification)
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{describe_machine(args.device)}, {args.dtype}",
        "models": ["=".join(model) for model in args.models],
        "results": rows,
        "crops": boxes,
    }
    write_json(folder / "photographs.json", record)
    with replacing(folder / "photographs.png") as unfinished:
        figure.savefig(unfinished, dpi=80)
    print(results_table(rows, args.modes))
    print(f"Picture: {folder / 'photographs.png'}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
