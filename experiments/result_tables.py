"""Markdown of the measurements in `benchmarks/results/` and `experiments/results/`, each with its date and machine."""

from pathlib import Path

import pandas as pd

from diffusers_pq.files import read_json
from diffusers_pq.tables import markdown_table


ROOT = Path(__file__).parent.parent
MINI_MODELS = {"vq": "S = 1, K = 1024", "pq": "S = 32, K = 256"}
VARIANTS = ("contiguous", "default", "compile")
SEARCHES = {
    "ours": "this package",
    "faiss": "faiss",
    "flash-kmeans": "flash-kmeans",
    "batched product": "batched product",
    "loop": "loop over subspaces",
    "vector-quantize-pytorch": "vector-quantize-pytorch",
}
STARTS = {
    "copy": "`copy`, as in the paper",
    "copy_scaled": "`copy_scaled`",
    "zero": "`zero`",
    "random": "the same UNet from scratch",
}


def measured(command, record):
    return f"`{command}`, {record['date']}, {record['machine']}:"


def _cell(row, key, spec):
    return format(row[key], spec) if key in row else "-"


def _multiple(ratio):
    return f"{ratio:.1f} x" if ratio < 10 else f"{ratio:.0f} x"


def _seconds(value):
    return f"{1e3 * value:.1f} ms" if value < 1 else f"{value:.1f} s" if value < 60 else f"{value:.0f} s"


def photographs(record):
    """Scores of the included models on the photographs of `reconstruct_photographs.py`."""
    lines = []
    for label, source in (model.split("=", 1) for model in record["models"]):
        row = record["results"][label]
        config = read_json(ROOT / source / "config.json")
        quantiser = [config.get(key, "-") for key in ("latent_channels", "num_subspaces", "codebook_size")]
        scores = (("psnr", ".2f"), ("psnr_pooled", ".2f"), ("ssim", ".3f"), ("H_n", ".3f"), ("P_n", ".3f"))
        name = f"`{Path(source).name}`"
        lines.append(
            [name, *quantiser, _cell(row, "bits_per_pixel", ".3g"), *(_cell(row, *score) for score in scores)]
        )
    head = ("model", "d", "S", "K", "bits per pixel", "PSNR (dB)", "PSNR, pooled (dB)", "SSIM", "H_n", "P_n")
    return f"{measured('make demo', record)}\n\n{markdown_table(head, lines)}"


def codebook_search(record):
    """Times of the codebook search, those of the others as a multiple of ours, and its share of a reconstruction."""
    names = [name for name in SEARCHES if name in record["search"][0]["seconds"]]
    lines = []
    for row in record["search"]:
        seconds = row["seconds"]
        others = [_multiple(seconds[name] / seconds["ours"]) if name in seconds else "-" for name in names[1:]]
        lines.append(
            [*(row[key] for key in ("d", "S", "K", "N")), f"{row['codes_unlike_float64']:.2%}"]
            + [f"{1e3 * seconds['ours']:.1f} ms", *others]
        )
    head = ("d", "S", "K", "latent pixels", "codes unlike float64's", *(SEARCHES[name] for name in names))
    shares = [
        (f"`{Path(row['model']).name}`", row["pixels"], f"{row['seconds']:.1f} s", f"{row['share']:.2%}")
        for row in record["models"]
    ]
    whole = markdown_table(("model", "pixels", "a reconstruction", "of which quantisation"), shares)
    where = measured("benchmarks/quantizer_speed.py", record)
    return f"{where}\n\n{markdown_table(head, lines)}\n\n{whole}"


def model_speed(rows):
    """Seconds of encoding and decoding one picture and, of the default, peak memory."""
    found = {(row["model"], row["pixels"], _variant(row)): row for row in rows if row.get("batch_size", 1) == 1}
    lines = []
    for model, pixels in dict.fromkeys((model, pixels) for model, pixels, _ in sorted(found)):
        variants = [found.get((model, pixels, variant)) for variant in VARIANTS]
        times = [f"{row['encode_seconds']:.1f} / {row['decode_seconds']:.1f} s" if row else "-" for row in variants]
        row = variants[1] or variants[0]
        memory = f"{row['encode_peak_gib']:.2f} / {row['decode_peak_gib']:.2f} GiB"
        lines.append((f"`{Path(model).name}`", pixels, *times, memory))
    head = ("encoding / decoding", "pixels", "contiguous", "default (channels_last)", "compiled", "peak memory")
    return f"{measured('benchmarks/model_speed.py', rows[0])}\n\n{markdown_table(head, lines)}"


def _variant(row):
    return "compile" if row.get("mode") == "compiled" and row["variant"] == "default" else row["variant"]


def tiling(rows):
    """PSNR of tiled decoding against whole decoding and the photographs."""
    keys = ("tiled_to_whole", "whole_to_original", "tiled_to_original")
    rows = sorted(rows, key=lambda row: row["pixels"])
    lines = [
        (f"`{Path(row['model']).name}`", row["pixels"], row["tile"], *(f"{row[key]:.1f} dB" for key in keys))
        for row in rows
    ]
    head = ("model", "pixels", "tile", "tiled to whole", "whole to original", "tiled to original")
    return f"{measured('benchmarks/model_speed.py', rows[0])}\n\n{markdown_table(head, lines)}"


def generation_speed(record):
    """Table 3: time and memory of a picture."""
    lines = []
    for name, row in record["systems"].items():
        side = row["pixels"] // row["F"]
        lines.append(
            (
                name,
                row["pixels"],
                f"{side} x {side} x {row['d']}",
                _seconds(row["step_seconds"]),
                _seconds(row["decode_seconds"]),
                _seconds(row["picture_seconds"]),
                f"{row['peak_gib']:.1f} GiB",
                f"{row['speed_ratio']:.2f}",
                f"{row['paper_ratio']:.2f}" if row["paper_ratio"] else "-",
            )
        )
    head = (
        "model",
        "pixels",
        "latents",
        "a step",
        "decoding",
        "a picture",
        "peak memory",
        "speed over the first",
        "paper",
    )
    where = f"`benchmarks/generation_speed.py`, {record['machine']}, {record['num_inference_steps']} steps a picture:"
    return f"{where}\n\n{markdown_table(head, lines)}"


def training_speed(record):
    """A step of `train_pqgan.py` and one of the loop of diffusers' `train_vqgan.py`."""
    lines = [
        (name, f"{row['seconds']:.2f} s", f"{1 / row['speed_ratio']:.0%}", f"{row['memory_ratio']:.0%}")
        for name, row in record["steps"].items()
    ]
    where = measured("experiments/training_speed.py", record)
    crops = f"{record['batch_size']} crops of {record['resolution']} pixels a step"
    return f"{where} {crops}.\n\n{markdown_table(('loop', 'a step', 'time', 'memory'), lines)}"


def gpu_goals(record):
    """Goals on a GPU, and what was found in one run."""
    lines = [
        (row["what"], *("-" if row[key] is None else f"{row[key]:.3g}" for key in ("goal", "found")), row["verdict"])
        for row in record["goals"]
    ]
    table = markdown_table(("what", "goal", "found", "verdict"), lines)
    return f"{measured('make gpu-check', record)}\n\n{table}"


def adaptation(record):
    """Loss on held-out pictures, by the start of the new weights."""
    curves = {name: dict(run["validation/loss"]) for name, run in record["runs"].items()}
    early = min(max(curve) for curve in curves.values())
    lines = []
    for name, curve in curves.items():
        lowest = min(curve, key=curve.get)
        ended = max(curve) == early
        lines.append(
            (STARTS.get(name, name), f"{curve[early]:.3f}", "-" if ended else f"{curve[lowest]:.3f} ({lowest:,})")
        )
    head = ("start", f"loss after {early} steps", "lowest loss (at step)")
    return f"`experiments/adaptation.py`, {record['date']}:\n\n{markdown_table(head, lines)}"


def codebook_remedies(record):
    """Scores with each remedy against unused entries."""
    columns = {"psnr": ".2f", "ssim": ".3f", "H_n": ".3f", "P_n": ".3f", "dead": ".3f"}
    lines = [
        (MINI_MODELS[row["model"]], row["remedy"], *(f"{row[key]:{spec}}" for key, spec in columns.items()))
        for row in record["runs"]
    ]
    head = ("codebooks", "remedy", "PSNR (dB)", "SSIM", "H_n", "P_n", "dead entries")
    where = measured("experiments/codebook_remedies.py", record)
    crops = f"{record['steps']} steps of {record['batch_size']} crops of {record['resolution']} pixels, one run each"
    return f"{where} {crops}.\n\n{markdown_table(head, lines)}"


def quantisation_overhead(record):
    """The largest share that quantisation adds to a reconstruction, over S."""
    rows = pd.DataFrame(record["configurations"])
    table = rows.pivot_table("overhead", index="d", columns="K", aggfunc="max")
    lines = [(f"d = {d}", *(f"{value:.2%}" for value in row)) for d, row in table.iterrows()]
    head = ("", *(f"K = {size}" for size in table))
    where = measured("experiments/quantisation_overhead.py", record)
    times = f"a reconstruction of {record['pixels']} x {record['pixels']} pixels takes {rows.seconds.min():.1f} to"
    model = f"`{Path(record['model']).name}` with random weights; {times} {rows.seconds.max():.1f} s."
    return f"{where} {model}\n\n{markdown_table(head, lines)}"


def product_quantization(record):
    """Pictures and denoisers against the bits that codes of an autoencoder's latents take."""
    rows = {}
    for row in record["quantizers"]:
        setting = row["num_subspaces"], row["codebook_size"], row["bits_per_latent_value"]
        rows.setdefault(setting, {})[row["learned_rotation"]] = row
    losses = {row["latents"]: row["loss"] for row in record["denoisers"]}
    exact = losses.pop("exact")
    lines = []
    for (subspaces, size, bits), pair in rows.items():
        loss = losses.get(f"{subspaces}:{size}")
        scores = [f"{pair[rotated]['psnr']:.2f}" for rotated in (False, True)]
        errors = [f"{pair[rotated]['relative_error']:.1%}" for rotated in (False, True)]
        denoiser = "-" if loss is None else f"{loss:.4f} ({loss / exact - 1:+.1%})"
        lines.append([subspaces, size, f"{bits:.2f}", f"{16 / bits:.1f} x", *scores, *errors, denoiser])
    none = f"{record['psnr_without_quantisation']:.2f}"
    lines.append(["-", "-", "16 (float16)", "1 x", none, none, "0.0%", "0.0%", f"{exact:.4f}"])
    head = ("S", "K", "bits per latent value", "smaller than float16", "PSNR (dB)", "PSNR, rotation learned (dB)")
    head += ("error of the latents", "error, rotation learned", "loss of a denoiser")
    where = f"`{Path(record['model']).name}`, d = {record['latent_channels']}"
    return f"{where}; {measured('experiments/product_quantization.py', record)}\n\n{markdown_table(head, lines)}"
