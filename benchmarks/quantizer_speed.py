#!/usr/bin/env python
"""Time the codebook search against its alternatives, alone and as a share of a whole reconstruction (Figure 5).

    python benchmarks/quantizer_speed.py                # on a GPU: --device cuda --batch_sizes 1 16
    python benchmarks/quantizer_speed.py --models       # without the full-size models

Writes quantizer_speed.json and quantizer_speed.png. All methods run in this one process, with the same threads, on the
same latents; times are medians after a warm-up, and only ratios between them mean anything on another machine. On CUDA
a search is also timed as a CUDA graph, without the host's part, and a reconstruction compiled, too.
"""

import datetime
import functools
import importlib.util
import math

import matplotlib.pyplot as plt
import torch

from diffusers_pq import PQModel, ProductQuantizer
from diffusers_pq.autoencoders import autoencoder_class
from diffusers_pq.console import one_line_errors
from diffusers_pq.files import replacing, write_json
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


# (d, S, K) of the paper's models and around them, and latent pixels N: 32 x 32 and 96 x 96.
SHAPES = [(128, 64, 512), (256, 128, 128), (256, 64, 256), (128, 32, 512), (128, 16, 512), (128, 128, 512)]
SIZES = [1024, 9216]
# For --small.
SMALL_SHAPES = [(16, 4, 16), (16, 16, 16)]


def parse_args(argv=None):
    parser = MeasuringParser("benchmarks/results", description=__doc__)
    parser.add_argument("--threads", type=COUNT, default=torch.get_num_threads(), help="threads on a CPU")
    parser.add_argument("--repeats", type=COUNT, default=15, help="measurements, of which the median counts")
    parser.add_argument("--sizes", nargs="+", type=COUNT, default=SIZES, help="numbers of latent pixels N")
    parser.add_argument("--pixels", type=COUNT, default=256, help="side of the reconstructed pictures, in pixels")
    parser.add_argument(
        "--models",
        nargs="*",
        default=["model_cards/pqgan-f8", "model_cards/pqgan-f16", "model_cards/pqgan-f32"],
        help="PQModels whose d, S and K are measured",
    )
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
    if importlib.util.find_spec("faiss") and torch.device(device).type == "cpu" and math.log2(size).is_integer():
        import faiss

        faiss.omp_set_num_threads(threads)
        index = faiss.ProductQuantizer(channels, subspaces, int(math.log2(size)))
        faiss.copy_array_to_vector(codebooks.numpy().ravel(), index.centroids)
        methods["faiss"] = lambda latents: index.compute_codes(
            latents.flatten(2).mT.flatten(0, 1).contiguous().numpy()
        )
    if importlib.util.find_spec("flash_kmeans") and torch.device(device).type == "cuda":
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton

        def flash(latents):
            z = latents.reshape(len(latents), subspaces, dimension, -1).permute(1, 0, 3, 2).flatten(1, 2)
            return euclid_assign_triton(z, codebooks, z.square().sum(-1))

        methods["flash-kmeans"] = flash
    if importlib.util.find_spec("vector_quantize_pytorch"):
        from vector_quantize_pytorch import VectorQuantize

        module = VectorQuantize(
            dim=channels, codebook_dim=dimension, codebook_size=size, heads=subspaces, separate_codebook_per_head=True
        )
        module = module.eval().to(device)
        methods["vector-quantize-pytorch"] = lambda latents: module(latents.flatten(2).mT)
    return methods


def warm_up(search_once, distances, args):
    """Search until so many distances have been computed that ours has itself compiled, as it would in a long run."""
    for _ in range(1 if args.small else 1 + search.COMPILE_AFTER // distances):
        search_once()


@torch.no_grad()
def measure_search(channels, subspaces, size, count, args):
    """Times of all methods on one shape, and the share of codes in which ours differs from float64 brute force."""
    generator = torch.Generator().manual_seed(0)
    codebooks = torch.randn(subspaces, size, channels // subspaces, generator=generator).to(args.device)
    side = math.isqrt(count)
    latents = torch.randn(1, channels, side, side, generator=generator).to(args.device)
    row = {"d": channels, "S": subspaces, "K": size, "N": count, "seconds": {}, "peak_bytes": {}, "modes": {}}
    # A search launches few kernels or compiles itself: there is nothing left to compile.
    modes = [mode for mode in args.modes if "compiled" not in mode]
    for name, method in build_methods(codebooks, args.device, args.threads).items():
        search_once = functools.partial(method, latents)
        if name == "ours":
            warm_up(search_once, count * subspaces * size, args)
        found = measure_modes(search_once, modes, args.repeats, args.device, at_most=2)
        row["modes"][name] = found
        row["seconds"][name] = found["eager"]["seconds"]
        if name != "faiss":
            row["peak_bytes"][name] = round(found["eager"]["peak_gib"] * 2**30)
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
def measure_share(model, modes, batch_size, args):
    """By mode: seconds of a reconstruction and of its quantisation; random weights, since only time is measured."""
    images = torch.rand(batch_size, 3, args.pixels, args.pixels, device=args.device, dtype=model.dtype) * 2 - 1
    latents = model.encode(images).latents
    distances = latents[:, 0].numel() * model.config.num_subspaces * model.config.codebook_size
    warm_up(lambda: model.quantize(latents), distances, args)
    parts = measure_modes(lambda: model.quantize(latents), modes, args.repeats, args.device)
    wholes = measure_modes(lambda: model(images), modes, min(args.repeats, 5), args.device)
    return {mode: share_of(parts[mode], wholes[mode]) for mode in modes}


def share_of(part, whole):
    if "error" in part or "error" in whole:
        return {"error": part.get("error") or whole["error"]}
    share = {"quantisation": part["seconds"], "share": part["seconds"] / whole["seconds"]}
    return {"seconds": whole["seconds"]} | share | {"peak_gib": whole["peak_gib"]}


def measure_model(path, args):
    """A row for each batch size: by mode, and what was found in the first of them as the row's own."""
    model = random_autoencoder(PQModel, path, args)
    by_size = {size: {} for size in args.batch_sizes}
    for modes in in_passes(args.modes, lambda: compile_autoencoder(model)):
        for size, found in by_size.items():
            found |= measure_share(model, modes, size, args)
    for size, found in by_size.items():
        row = {"model": path, "pixels": args.pixels, "batch_size": size, "dtype": args.dtype}
        yield row | found[args.modes[0]] | {"modes": found}


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
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=110)
    plt.close(figure)


def main(args):
    torch.set_num_threads(args.threads)
    for path in args.models:
        autoencoder_class(path)  # one that is missing is named now, not after minutes
    folder = args.output_dir or results_folder("benchmarks/results", args.device, args.small)
    where = {"date": datetime.date.today().isoformat(), "machine": describe_machine(args.device)}
    rows, models = [], []

    def save():
        write_json(folder / "quantizer_speed.json", where | {"search": rows, "models": models})

    for channels, subspaces, size in SMALL_SHAPES if args.small else SHAPES:
        for count in args.sizes:
            rows.append(measure_search(channels, subspaces, size, count, args))
            times = ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in rows[-1]["seconds"].items())
            print(f"d={channels} S={subspaces} K={size} N={count}: {times}", flush=True)
            save()
    for path in args.models:
        for row in measure_model(path, args):
            models.append(row)
            save()
            for mode, one in row["modes"].items():
                share = one.get("error") or f"quantisation {one['share']:.2%} of {one['seconds'] * 1e3:.1f} ms"
                print(f"{path}, {row['batch_size']} x {args.pixels} px, {mode}: {share}", flush=True)
    draw(rows, folder / "quantizer_speed.png")
    print(f"Plot: {folder / 'quantizer_speed.png'}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
