#!/usr/bin/env python
"""Table 3: time and memory of generating pictures with Stable Diffusion 2.1 and with the three PQSD models; and the
same for Stable Diffusion XL.

    python benchmarks/generation_speed.py
    python benchmarks/generation_speed.py --device cuda --dtype float16 --batch_sizes 1 4 16 \\
        --layouts default channels_last
    python benchmarks/generation_speed.py --systems SDXL SDXL-PQ-HR SDXL-PQ-Precise SDXL-PQ-Quick

The networks have their full size (SD 2.1's UNet: 866M parameters, SDXL's 2.6B) and random weights, since only time and
memory are measured. A denoising step is one forward of the UNet on two pictures for each that is made (classifier-free
guidance); pictures take --num_inference_steps of them and one decoding. On CUDA all is measured as it is, as a CUDA
graph, with compiled blocks (`compile_repeated_blocks`), and with both. Writes generation_speed.json and .png.
"""

import datetime
import itertools
import json
import math
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from diffusers_pq import PQModel, widen_unet
from diffusers_pq.console import one_line_errors
from diffusers_pq.files import replacing, write_json
from diffusers_pq.flags import COUNT, number
from diffusers_pq.measuring import (
    MeasuringParser,
    describe_machine,
    in_passes,
    measure_modes,
    results_folder,
    shrunk,
)


# Of Stable Diffusion 2.1, but for the channels of the latents.
SD21_UNET = UNet2DConditionModel.load_config("model_cards/pqsd-precise/unet") | {"in_channels": 4, "out_channels": 4}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS = {"SD 2.1": SD21_UNET, "SDXL": SDXL_UNET}
# Of both.
KL = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 768,
}
LAYOUTS = {"default": torch.contiguous_format, "channels_last": torch.channels_last}
# For --small.
SMALL_UNET = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
}
PROMPT_TOKENS = 77
POOLED_PROMPT = 1280  # dimensions, of SDXL


@dataclass
class System:
    """
    Args:
        base (`str`): The system that it is compared with, whose UNet it has but for the latents' channels.
        autoencoder (`str`, *optional*): Configuration of a PQModel; by default the KL autoencoder.
        pixels (`int`): Side of the pictures.
        paper_ratio (`float`, *optional*): The paper's samples per second over those of `base` (Table 3).
    """

    base: str
    autoencoder: str | None
    pixels: int
    paper_ratio: float | None = None


F8, F16 = "model_cards/pqgan-f8", "model_cards/pqgan-f16-d256"
SYSTEMS = {
    "SD 2.1": System("SD 2.1", None, 768, 1.0),
    "PQSD-HR": System("SD 2.1", F16, 1536, 0.112 / 0.116),
    "PQSD-Precise": System("SD 2.1", F8, 768, 0.116 / 0.116),
    "PQSD-Quick": System("SD 2.1", F16, 768, 0.465 / 0.116),
    "SDXL": System("SDXL", None, 1024),
    "SDXL-PQ-HR": System("SDXL", F16, 2048),
    "SDXL-PQ-Precise": System("SDXL", F8, 1024),
    "SDXL-PQ-Quick": System("SDXL", F16, 1024),
}
TABLE3 = [name for name, system in SYSTEMS.items() if system.base == "SD 2.1"]


def parse_args(argv=None):
    parser = MeasuringParser("benchmarks/results", description=__doc__)
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=SYSTEMS,
        default=TABLE3,
        help="systems to measure, in this order; SD 2.1 or SDXL, which the others are compared with, always first",
    )
    parser.add_argument("--num_inference_steps", type=COUNT, default=50, help="steps that a picture is counted with")
    parser.add_argument("--steps", type=COUNT, default=2, help="steps that are timed; the median counts")
    parser.add_argument(
        "--most_seconds",
        type=number(float, above=0),
        default=math.inf,
        help="time fewer, once they take so long together; by default no limit",
    )
    parser.add_argument(
        "--layouts", nargs="+", choices=LAYOUTS, default=["default"], help="memory formats of the networks' weights"
    )
    return parser.parse_args(argv)


def systems_to_measure(names):
    """Those named, in this order, each after what it is compared with; those of one base together."""
    bases = dict.fromkeys(SYSTEMS[name].base for name in names)
    wanted = [name for base in bases for name in (base, *(name for name in names if SYSTEMS[name].base == base))]
    return {name: SYSTEMS[name] for name in wanted}


def build_unet(base, args):
    with torch.device(args.device):
        unet = UNet2DConditionModel.from_config(UNETS[base] | (SMALL_UNET if args.small else {}))
    return unet.eval().to(dtype=getattr(torch, args.dtype))


def build(system, unet, args):
    """The UNet for an autoencoder's latents, the autoencoder and its latents' channels and downsampling factor."""
    is_kl = system.autoencoder is None
    config = KL if is_kl else PQModel.load_config(system.autoencoder)
    if args.small:
        config = shrunk(config)
    with torch.device(args.device):
        vae = AutoencoderKL(**config) if is_kl else PQModel.from_config(config)
    channels, factor = vae.config.latent_channels, 2 ** (len(config["block_out_channels"]) - 1)
    if not is_kl:
        unet = widen_unet(unet, channels)
    placement = args.device, getattr(torch, args.dtype)
    return unet.to(*placement), vae.eval().to(*placement), channels, factor


def compile_parts(unet, vae):
    # The UNet's repeated blocks take seconds where the whole takes minutes; of all sizes, so that few are compiled.
    unet.compile_repeated_blocks(fullgraph=True, dynamic=True)
    vae.decoder.compile(dynamic=True)


def parts_of(unet, vae, latents_shape, batch_size, args):
    """A denoising step and a decoding, for so many pictures."""
    placement = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    pairs = 2 * batch_size  # with and without the prompt
    latents = torch.randn(pairs, *latents_shape, **placement)
    prompts = torch.randn(pairs, PROMPT_TOKENS, unet.config.cross_attention_dim, **placement)
    # On the device: a number would be brought there in every step, which waits for it.
    timestep = torch.tensor(500, device=args.device)
    conditions = None
    if unet.config.addition_embed_type == "text_time":
        sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * pairs, **placement)
        conditions = {"text_embeds": torch.randn(pairs, POOLED_PROMPT, **placement), "time_ids": sizes}
    return {
        "step": lambda: unet(latents, timestep, prompts, added_cond_kwargs=conditions),
        "decode": lambda: vae.decode(latents[:batch_size]),
    }


@torch.no_grad()
def measure(parts, modes, weights, batch_size, args):
    """Rows of one batch size by mode; `weights` are GiB."""
    limits = args.steps, args.device, args.most_seconds
    found = {name: measure_modes(part, modes, *limits) for name, part in parts.items()}
    return {mode: summarise(mode, found, weights, batch_size, args.num_inference_steps) for mode in modes}


def summarise(mode, found, weights, batch_size, num_inference_steps):
    row, errors = {}, {name: rows[mode]["error"] for name, rows in found.items() if "error" in rows[mode]}
    if errors:
        return {"error": errors}
    for name, rows in found.items():
        row[f"{name}_seconds"] = rows[mode]["seconds"]
        row[f"{name}_first_seconds"] = rows[mode]["first_seconds"]
        row[f"{name}_peak_gib"] = weights + rows[mode]["peak_gib"]
    row["picture_seconds"] = (num_inference_steps * row["step_seconds"] + row["decode_seconds"]) / batch_size
    row["peak_gib"] = max(row["step_peak_gib"], row["decode_peak_gib"])
    return row


def measure_system(system, unet, args):
    """
    The row of a system, again whenever more of it is known: below `batches` all batch sizes, modes and layouts, and as
    its own what was found for the first of each.
    """
    own_unet, vae, channels, factor = build(system, unet, args)
    weights = sum(p.numel() * p.element_size() for module in (own_unet, vae) for p in module.parameters()) / 2**30
    side = (64 if args.small else system.pixels) // factor
    row = {"pixels": side * factor, "F": factor, "d": channels, "paper_ratio": system.paper_ratio}
    row |= {"weights_gib": weights, "batches": {str(size): {} for size in args.batch_sizes}}
    for modes in in_passes(args.modes, lambda: compile_parts(own_unet, vae)):
        for layout, batch_size in itertools.product(args.layouts, args.batch_sizes):
            for module in (own_unet, vae):
                module.to(memory_format=LAYOUTS[layout])
            parts = parts_of(own_unet, vae, (channels, side, side), batch_size, args)
            for mode, found in measure(parts, modes, weights, batch_size, args).items():
                row["batches"][str(batch_size)][setting(mode, layout)] = found
            first = row["batches"][str(args.batch_sizes[0])].get(setting(args.modes[0], args.layouts[0]), {})
            yield row | first


def setting(mode, layout):
    return mode if layout == "default" else f"{mode} {layout}"


def add_ratios(row, base):
    """The speed over the base system's under the same settings."""
    for size, settings in row["batches"].items():
        for name, one in settings.items():
            other = base["batches"][size][name]
            if "error" not in one and "error" not in other:
                one["speed_ratio"] = other["picture_seconds"] / one["picture_seconds"]
    if "picture_seconds" in row and "picture_seconds" in base:
        row["speed_ratio"] = base["picture_seconds"] / row["picture_seconds"]


def table(rows):
    """One line for each system and batch size: seconds a picture, and speed over the base's, by mode and layout."""
    for name, row in rows.items():
        for size, settings in row["batches"].items():
            cells = [
                f"{title} {one['picture_seconds']:.3g} s ({one.get('speed_ratio', 1):.2f} x)"
                for title, one in settings.items()
                if "error" not in one
            ]
            yield f"{name}, {row['pixels']} px, {size} at once: " + ", ".join(cells)


def plot(rows, num_inference_steps, machine, path):
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    rows = {name: row for name, row in rows.items() if "picture_seconds" in row}
    names = list(rows)
    steps = [num_inference_steps * row["step_seconds"] for row in rows.values()]
    decoding = [row["decode_seconds"] for row in rows.values()]
    axes[0].bar(names, steps, label=f"{num_inference_steps} denoising steps")
    axes[0].bar(names, decoding, bottom=steps, label="decoding")
    axes[0].set(ylabel="seconds a batch")
    axes[0].legend()
    places = range(len(names))
    paper = {place: row["paper_ratio"] for place, row in zip(places, rows.values()) if row["paper_ratio"]}
    axes[1].bar([place - 0.2 for place in places], [row["speed_ratio"] for row in rows.values()], 0.4, label="here")
    axes[1].bar([place + 0.2 for place in paper], paper.values(), 0.4, label="paper")
    axes[1].set(ylabel="speed over SD 2.1 or SDXL", xticks=list(places), xticklabels=names)
    axes[1].legend()
    for axis in axes:
        axis.tick_params("x", labelsize=7)
    figure.suptitle(machine, fontsize=8)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=120)
    plt.close(figure)


def main(args):
    torch.manual_seed(0)
    folder = args.output_dir or results_folder("benchmarks/results", args.device, args.small)
    today = datetime.date.today().isoformat()
    machine = f"{describe_machine(args.device)}, {args.dtype}, {today}"
    rows, unets = {}, {}
    record = {"date": today, "machine": machine, "num_inference_steps": args.num_inference_steps, "systems": rows}
    for name, system in systems_to_measure(args.systems).items():
        if system.base not in unets:
            unets = {system.base: build_unet(system.base, args)}
        for row in measure_system(system, unets[system.base], args):
            rows[name] = row
            add_ratios(row, rows[system.base])
            write_json(folder / "generation_speed.json", record)
        print(name, json.dumps(rows[name]), flush=True)
    plot(rows, args.num_inference_steps, machine, folder / "generation_speed.png")
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
