#!/usr/bin/env python
"""Time the codebook search against its alternatives, alone and as a share of a whole reconstruction (Figure 5).

    python benchmarks/quantizer_speed.py                  # on a GPU: --device cuda
    python benchmarks/quantizer_speed.py --models         # without the full-size models

Writes quantizer_speed.json and quantizer_speed.png. All methods run in this one process, with the same threads, on the
same latents; times are medians after a warm-up, and only ratios between them mean anything on another machine.
"""

import datetime
import functools
import importlib.util
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from diffusers_pq import PQModel, ProductQuantizer
from diffusers_pq.console import one_line_errors
from diffusers_pq.devices import usable_device
from diffusers_pq.flags import COUNT, FlagParser
from diffusers_pq.measuring import describe_machine, measure_peak_bytes, measure_seconds
from diffusers_pq.models import search


# (d, S, K) of the paper's models and around them, and latent pixels N: 32 x 32 and 96 x 96.
SHAPES = [(128, 64, 512), (256, 128, 128), (256, 64, 256), (128, 32, 512), (128, 16, 512), (128, 128, 512)]
SIZES = [1024, 9216]


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="device to compute on, such as cuda or mps")
    parser.add_argument("--threads", type=COUNT, default=torch.get_num_threads(), help="threads on a CPU")
    parser.add_argument("--repeats", type=COUNT, default=15, help="measurements, of which the median counts")
    parser.add_argument("--sizes", nargs="+", type=COUNT, default=SIZES, help="numbers of latent pixels N")
    parser.add_argument(
        "--models",
        nargs="*",
        default=["model_cards/pqgan-f8", "model_cards/pqgan-f16", "model_cards/pqgan-f32"],
        help="PQModels whose d, S and K are measured",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    return parser.parse_args(argv)


def loop(latents, codebooks):
    """One subspace after the other with a full distance matrix, as in VQGAN-style code."""
    codes = []
    for part, entries in zip(latents.chunk(len(codebooks), dim=1), codebooks):
        z = part.permute(0, 2, 3, 1).reshape(-1, entries.shape[1])
        distances = z.square().sum(1, keepdim=True) + entries.square().sum(1) - 2 * z @ entries.T
        codes.append(distances.argmin(1))
    return torch.stack(codes)


def batched_product(latents, codebooks):
    """All distances of all subspaces in one batched product, [S, N, K] in memory."""
    z = latents.reshape(len(latents), len(codebooks), codebooks.shape[2], -1).permute(1, 0, 3, 2).flatten(1, 2)
    squared_norms = codebooks.square().sum(-1).unsqueeze(1)
    return torch.baddbmm(squared_norms, z, codebooks.transpose(1, 2), alpha=-2).argmin(-1)


def build_methods(codebooks, device, threads):
    """name -> function of latents; those whose package is missing or that cannot do this shape are left out."""
    subspaces, size, dimension = codebooks.shape
    channels = subspaces * dimension
    quantizer = ProductQuantizer(channels, subspaces, size).eval().to(device)
    quantizer.codebooks.data.copy_(codebooks)
    methods = {
        "ours": lambda latents: search.nearest_codes(quantizer.split(latents), quantizer.codebooks),
        "loop": lambda latents: loop(latents, codebooks),
        "batched product": lambda latents: batched_product(latents, codebooks),
    }
    if importlib.util.find_spec("faiss") and device == "cpu" and math.log2(size).is_integer():
        import faiss

        faiss.omp_set_num_threads(threads)
        index = faiss.ProductQuantizer(channels, subspaces, int(math.log2(size)))
        faiss.copy_array_to_vector(codebooks.numpy().ravel(), index.centroids)
        methods["faiss"] = lambda latents: index.compute_codes(
            latents.flatten(2).mT.flatten(0, 1).contiguous().numpy()
        )
    if importlib.util.find_spec("vector_quantize_pytorch"):
        from vector_quantize_pytorch import VectorQuantize

        module = VectorQuantize(
            dim=channels, codebook_dim=dimension, codebook_size=size, heads=subspaces, separate_codebook_per_head=True
        )
        module = module.eval().to(device)
        methods["vector-quantize-pytorch"] = lambda latents: module(latents.flatten(2).mT)
    return methods


def calls_until_compiled(distances):
    """After so many searches of this many distances, ours has had itself compiled, as it would in a long run."""
    return 1 + search._COMPILE_AFTER // distances


@torch.no_grad()
def measure_search(channels, subspaces, size, count, args):
    """Times of all methods on one shape, and the share of codes in which ours differs from float64 brute force."""
    generator = torch.Generator().manual_seed(0)
    codebooks = torch.randn(subspaces, size, channels // subspaces, generator=generator).to(args.device)
    side = math.isqrt(count)
    latents = torch.randn(1, channels, side, side, generator=generator).to(args.device)
    row = {"d": channels, "S": subspaces, "K": size, "N": count, "seconds": {}, "peak_bytes": {}}
    for name, method in build_methods(codebooks, args.device, args.threads).items():
        warm_up = calls_until_compiled(count * subspaces * size) if name == "ours" else 1
        search_once = functools.partial(method, latents)
        row["seconds"][name] = measure_seconds(search_once, args.repeats, args.device, warm_up, at_most=2)
        if name != "faiss":
            row["peak_bytes"][name] = measure_peak_bytes(search_once, args.device)
    row["ours_over"] = {name: row["seconds"]["ours"] / value for name, value in row["seconds"].items()}
    row["codes_unlike_float64"] = unlike_float64(latents, codebooks)
    return row


def unlike_float64(latents, codebooks):
    z = latents.flatten(2).unflatten(1, (len(codebooks), -1))[0]
    codes = search.nearest_codes(z[None], codebooks)[0]
    wrong = 0
    for part, entries, found in zip(z.double(), codebooks.double(), codes):
        wrong += int(
            (torch.cdist(part.T, entries, compute_mode="donot_use_mm_for_euclid_dist").argmin(1) != found).sum()
        )
    return wrong / codes.numel()


@torch.no_grad()
def measure_model(path, args, pixels=256):
    """What share of a full-size reconstruction the quantiser takes; random weights, since only time is measured."""
    model = PQModel.from_config(PQModel.load_config(path)).eval().to(args.device)
    images = torch.rand(1, 3, pixels, pixels, device=args.device) * 2 - 1
    latents = model.encode(images).latents
    config = model.config
    distances = latents[0, 0].numel() * config.num_subspaces * config.codebook_size
    warm_up = calls_until_compiled(distances)
    quantisation = measure_seconds(lambda: model.quantize(latents), args.repeats, args.device, warm_up)
    whole = measure_seconds(lambda: model(images), 3, args.device)
    return {
        "model": path,
        "pixels": pixels,
        "seconds": whole,
        "quantisation": quantisation,
        "share": quantisation / whole,
    }


def draw(rows, path):
    labels = [f"d={row['d']} S={row['S']}\nK={row['K']} N={row['N']}" for row in rows]
    methods = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    figure, axes = plt.subplots(figsize=(1.1 * len(rows) + 2, 4.5))
    for position, name in enumerate(methods):
        known = [(i, row["seconds"][name] * 1e3) for i, row in enumerate(rows) if name in row["seconds"]]
        offset = (position - (len(methods) - 1) / 2) * 0.8 / len(methods)
        axes.bar([i + offset for i, _ in known], [value for _, value in known], 0.8 / len(methods), label=name)
    axes.set(yscale="log", ylabel="milliseconds a search")
    axes.set_xticks(range(len(rows)), labels, fontsize=7)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args):
    usable_device(args.device)
    torch.set_num_threads(args.threads)
    rows = []
    for channels, subspaces, size in SHAPES:
        for count in args.sizes:
            rows.append(measure_search(channels, subspaces, size, count, args))
            times = ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in rows[-1]["seconds"].items())
            print(f"d={channels} S={subspaces} K={size} N={count}: {times}", flush=True)
    models = [measure_model(path, args) for path in args.models]
    for model in models:
        print(
            f"{model['model']}: quantisation {model['share']:.2%} of {model['seconds']:.2f} s at {model['pixels']} px"
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(args.device)
    record = {"date": datetime.date.today().isoformat(), "machine": machine, "search": rows, "models": models}
    (args.output_dir / "quantizer_speed.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(rows, args.output_dir / "quantizer_speed.png")
    print(f"Plot: {args.output_dir / 'quantizer_speed.png'}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
