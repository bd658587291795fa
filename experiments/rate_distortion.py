#!/usr/bin/env python
"""PSNR, pooled PSNR and SSIM against bits per pixel of PQ models, JPEG, WebP and AVIF, on the held-out photographs.

    python experiments/rate_distortion.py

Writes rate_distortion.json and rate_distortion.png. Rates are those of whole files; a point is the mean over the
photographs at one setting. The codecs store colour at half resolution (4:2:0), Pillow's default. Three of the
photographs have been JPEG files before, which favours JPEG a little.

`bits_per_pixel_static` of a model is what its codes would take with one fixed distribution for each subspace, counted
on the training pictures: the ideal code length, without a file around it.
"""

import datetime
import io
import statistics
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import PIL
import torch
from PIL import Image, features
from tqdm import tqdm

from diffusers_pq.autoencoders import load_autoencoder
from diffusers_pq.compression import compress_picture, decompress_picture
from diffusers_pq.console import one_line_errors
from diffusers_pq.evaluation.data import EvaluationData
from diffusers_pq.files import write_json
from diffusers_pq.flags import FlagParser, device, number, output_folder
from diffusers_pq.images import to_tensor, to_uint8
from diffusers_pq.measuring import describe_machine
from diffusers_pq.metrics import CodebookUsage, pooled_psnr, psnr, ssim
from diffusers_pq.photographs import load_photographs
from diffusers_pq.reconstruction import codebook_shape, reconstruct_picture
from diffusers_pq.tables import LATENT_COLUMNS, SCORE_COLUMNS, markdown_table


# name -> Pillow's options. A slower AVIF (speed 4 instead of 6) takes five times as long for some 2% smaller files.
CODECS = {"JPEG": {"optimize": True}, "WebP": {"method": 6}, "AVIF": {"speed": 6}}
QUALITIES = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95)
MEASURES = {name: SCORE_COLUMNS[name][0] for name in ("psnr", "psnr_pooled", "ssim")}
HEAD = ("", LATENT_COLUMNS["bits_per_pixel"][0], *MEASURES.values())


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["model_cards/pqgan-mini-f8-pq", "model_cards/pqgan-mini-f8-vq"],
        help="folders or Hub repositories of PQModels",
    )
    parser.add_argument(
        "--train_data_dir", default="data/debian-tiles", help="imagefolder whose `train` split the models learned from"
    )
    parser.add_argument(
        "--qualities",
        nargs="+",
        type=number(int, minimum=0, maximum=100),
        default=list(QUALITIES),
        help="quality settings of JPEG, WebP and AVIF",
    )
    parser.add_argument("--device", type=device, default="cpu", help="device to compute on, such as cuda or mps")
    parser.add_argument(
        "--output_dir", type=output_folder, default=Path("experiments/results"), help="folder of the results"
    )
    return parser.parse_args(argv)


def measure(photographs, compress, decompress):
    """Scores of every photograph, by name, their means, and the PSNR of all photographs' errors together."""
    scores = {}
    for name, original in photographs.items():
        data = compress(original)
        pair = [to_uint8(to_tensor(picture))[None] for picture in (decompress(data), original)]
        bits = 8 * len(data) / (original.width * original.height)
        scores[name] = {"bits_per_pixel": bits, "psnr": psnr(*pair).item(), "ssim": ssim(*pair).item()}
    names = ("bits_per_pixel", "psnr", "ssim")
    means = {name: statistics.mean(row[name] for row in scores.values()) for name in names}
    pixels = [picture.width * picture.height for picture in photographs.values()]
    means["psnr_pooled"] = pooled_psnr([row["psnr"] for row in scores.values()], pixels)
    return means | {"photographs": scores}


def measure_model(path, photographs, device, train_data_dir):
    model = load_autoencoder(path).to(device)
    row = measure(photographs, partial(compress_picture, model), partial(decompress_picture, model))
    results = [reconstruct_picture(model, picture) for picture in photographs.values()]
    # The same codes at whole bits each, without a header.
    row["bits_per_pixel_uncoded"] = statistics.mean(result.scores["bits_per_pixel"] for result in results)
    lengths = static_code_lengths(model, train_data_dir)
    bits = [lengths.gather(1, result.codes.cpu()[0].flatten(1)).sum().item() for result in results]
    pixels = [picture.width * picture.height for picture in photographs.values()]
    row["bits_per_pixel_static"] = statistics.mean(total / area for total, area in zip(bits, pixels))
    return row


@torch.no_grad()
def static_code_lengths(model, train_data_dir):
    """Bits of every code `[S, K]` by its frequency in the training pictures; one is added to every count."""
    usage = CodebookUsage(*codebook_shape(model))
    for images in tqdm(EvaluationData(data_dir=train_data_dir, split="train").loader(batch_size=8), desc="static"):
        usage.update(model.encode_codes(images.to(model.device)))
    counts = usage.counts.double() + 1
    return -torch.log2(counts / counts.sum(1, keepdim=True))


def measure_quality(codec, quality, photographs):
    def compress(picture):
        file = io.BytesIO()
        picture.save(file, codec, quality=quality, **CODECS[codec])
        return file.getvalue()

    def decompress(data):
        return Image.open(io.BytesIO(data)).convert("RGB")

    return {"quality": quality} | measure(photographs, compress, decompress)


def is_available(codec):
    return codec == "JPEG" or features.check(codec.lower())


def all_points(record):
    """Markdown: every model and every quality of the codecs."""
    rows = [(Path(path).name, row) for path, row in record["models"].items()]
    rows += [(f"{name} {row['quality']}", row) for name, codec in record["codecs"].items() for row in codec]
    return markdown_table(HEAD, [line(name, row) for name, row in rows])


def at_equal_quality(record):
    """Markdown: every model, and of each codec the smallest files that are at least as good by their PSNR."""
    lines = []
    for path, model in record["models"].items():
        lines.append(line(f"`{Path(path).name}`", model))
        for name, codec in record["codecs"].items():
            as_good = [row for row in codec if row["psnr"] >= model["psnr"]]
            if as_good:
                row = min(as_good, key=lambda row: row["bits_per_pixel"])
                lines.append(line(f"{name}, quality {row['quality']}", row))
    return markdown_table(HEAD, lines)


def line(name, row):
    pooled = f"{row['psnr_pooled']:.2f}" if "psnr_pooled" in row else "-"
    return [name, f"{row['bits_per_pixel']:.3f}", f"{row['psnr']:.2f}", pooled, f"{row['ssim']:.3f}"]


def draw(record, path):
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(16, 4.5))
    for axis, (measure, label) in zip(axes, MEASURES.items()):
        for name, rows in record["codecs"].items():
            axis.plot([row["bits_per_pixel"] for row in rows], [row[measure] for row in rows], marker=".", label=name)
        for name, row in record["models"].items():
            rates = row["bits_per_pixel"], row["bits_per_pixel_uncoded"]
            (line,) = axis.plot(rates, [row[measure]] * 2, linestyle=":")
            axis.scatter(rates[0], row[measure], marker="*", s=120, color=line.get_color(), label=Path(name).name)
            axis.scatter(rates[1], row[measure], marker="|", color=line.get_color())
        axis.set(xscale="log", xlabel="bits per pixel", ylabel=label)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, title="star: file, bar: whole bits per code", title_fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args):
    photographs = load_photographs()
    available = [name for name in CODECS if is_available(name)]
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{describe_machine(args.device)}, Pillow {PIL.__version__}",
        "unavailable": {name: "this Pillow was built without it" for name in CODECS if name not in available},
        "models": {
            path: measure_model(path, photographs, args.device, args.train_data_dir) for path in tqdm(args.models)
        },
        "codecs": {
            name: [measure_quality(name, quality, photographs) for quality in tqdm(args.qualities, desc=name)]
            for name in available
        },
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "rate_distortion.json", record)
    draw(record, args.output_dir / "rate_distortion.png")
    print(all_points(record))
    for name, reason in record["unavailable"].items():
        print(f"{name}: unavailable, {reason}")
    print(f"Plot: {args.output_dir / 'rate_distortion.png'}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
