#!/usr/bin/env python
"""Reconstruct the held-out photographs with several autoencoders: a table, a JSON file and a picture.

python benchmarks/reconstruct_photographs.py --models PQ=model_cards/pqgan-mini-f8-pq VQ=model_cards/pqgan-mini-f8-vq
"""

import argparse
import datetime
import json
import statistics
from pathlib import Path

import matplotlib.pyplot as plt

from diffusers_pq.photographs import load_photographs
from diffusers_pq.profiling import describe_machine
from diffusers_pq.reconstruction import codebook_usage, reconstruct_picture
from diffusers_pq.training.autoencoders import load_autoencoder


COLUMNS = ("psnr", "ssim", "bits_per_pixel", "H_n", "P_n", "seconds")
# Side of the enlarged crop and its top left corner, in pixels: detail that quantisation tends to lose.
CROP_SIDE = 96
CROPS = {
    "astronaut": (175, 70),
    "chelsea": (170, 90),
    "coffee": (250, 120),
    "rocket": (290, 250),
    "china": (300, 130),
    "flower": (260, 150),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=PATH_OR_REPO")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if any("=" not in model for model in args.models):
        parser.error("--models takes NAME=PATH_OR_REPO")
    return args


def summarise(model, results):
    """Means over the pictures; codebook use over all pictures together; median seconds."""
    row = {
        name: statistics.mean(r.scores[name] for r in results.values()) for name in ("psnr", "ssim", "bits_per_pixel")
    }
    row["seconds"] = statistics.median(r.scores["seconds"] for r in results.values())
    codes = [r.codes for r in results.values() if r.codes is not None]
    if codes:
        usage = codebook_usage(model, codes)
        row |= {"H_n": usage["H_n"], "P_n": usage["P_n"]}
    row["psnr_per_picture"] = {name: r.scores["psnr"] for name, r in results.items()}
    return row


def markdown_table(rows):
    lines = ["| model | PSNR (dB) | SSIM | bits per pixel | H_n | P_n | seconds |", "|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        cells = [f"{row[column]:.3g}" if column in row else "-" for column in COLUMNS]
        cells[0] = f"{row['psnr']:.2f}"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(photographs, results, path):
    names = list(results)
    figure, axes = plt.subplots(
        len(photographs) * 2, len(names) + 1, figsize=(3 * (len(names) + 1), 5 * len(photographs))
    )
    for row, (photo, original) in enumerate(photographs.items()):
        pictures = [original, *(results[name][photo].picture for name in names)]
        titles = ["original", *(f"{name}, {results[name][photo].scores['psnr']:.1f} dB" for name in names)]
        left, top = CROPS[photo]
        for column, (picture, title) in enumerate(zip(pictures, titles)):
            whole, detail = axes[2 * row, column], axes[2 * row + 1, column]
            whole.imshow(picture)
            detail.imshow(picture.crop((left, top, left + CROP_SIDE, top + CROP_SIDE)), interpolation="nearest")
            whole.set_title(f"{photo}: {title}", fontsize=9)
            whole.axis("off")
            detail.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(args):
    photographs = load_photographs()
    rows, results = {}, {}
    for entry in args.models:
        name, source = entry.split("=", 1)
        model = load_autoencoder(source).to(args.device)
        reconstruct_picture(model, next(iter(photographs.values())))  # warm-up, so that `seconds` is fair
        results[name] = {photo: reconstruct_picture(model, picture) for photo, picture in photographs.items()}
        rows[name] = summarise(model, results[name])
    args.output_dir.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(args.device)
    record = {"date": datetime.date.today().isoformat(), "machine": machine, "models": args.models, "results": rows}
    (args.output_dir / "photographs.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(photographs, results, args.output_dir / "photographs.png")
    print(markdown_table(rows))
    print(f"Picture: {args.output_dir / 'photographs.png'}")


if __name__ == "__main__":
    main(parse_args())
