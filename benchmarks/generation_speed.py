#!/usr/bin/env python
"""Table 3: time and memory of generating one picture with Stable Diffusion 2.1 and with the three PQSD models.

    python benchmarks/generation_speed.py                    # on a GPU: --device cuda --dtype float16 --steps 50

The networks have their full size (SD 2.1's UNet: 866M parameters) and random weights, since only time and memory are
measured. A denoising step is one forward of the UNet on two pictures (classifier-free guidance); a picture takes
--num_inference_steps of them and one decoding. Writes generation_speed.json and .png.
"""

import datetime
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from diffusers_pq import PQModel, widen_unet
from diffusers_pq.console import one_line_errors
from diffusers_pq.devices import usable_device
from diffusers_pq.files import write_json
from diffusers_pq.flags import COUNT, FlagParser
from diffusers_pq.measuring import describe_machine, measure_peak_bytes, measure_seconds


# Of Stable Diffusion 2.1, but for the channels of the latents.
SD21_UNET = UNet2DConditionModel.load_config("model_cards/pqsd-precise/unet") | {"in_channels": 4, "out_channels": 4}
SD21_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 768,
}
# Name: autoencoder, side of the picture, and the paper's samples per second over Stable Diffusion's (Table 3).
SYSTEMS = {
    "SD 2.1": ("sd", 768, 1.0),
    "PQSD-HR": ("model_cards/pqgan-f16-d256", 1536, 0.112 / 0.116),
    "PQSD-Precise": ("model_cards/pqgan-f8", 768, 0.116 / 0.116),
    "PQSD-Quick": ("model_cards/pqgan-f16-d256", 768, 0.465 / 0.116),
}
PROMPT_TOKENS = 77


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=SYSTEMS,
        default=list(SYSTEMS),
        help="systems to measure; SD 2.1, which all are compared with, always",
    )
    parser.add_argument("--num_inference_steps", type=COUNT, default=50, help="steps that a picture is counted with")
    parser.add_argument("--steps", type=COUNT, default=2, help="steps that are timed; the median counts")
    parser.add_argument("--device", default="cpu", help="device to compute on, such as cuda or mps")
    parser.add_argument("--dtype", default="float32", help="precision of the models")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    return parser.parse_args(argv)


def build(autoencoder, unet, args):
    """The UNet for an autoencoder's latents, the autoencoder and its latents' channels and downsampling factor."""
    placement = args.device, getattr(torch, args.dtype)
    if autoencoder == "sd":
        return unet.to(*placement), AutoencoderKL(**SD21_VAE).eval().to(*placement), 4, 8
    vae = PQModel.from_config(PQModel.load_config(autoencoder)).eval()
    channels = vae.config.latent_channels
    return widen_unet(unet, channels).to(*placement), vae.to(*placement), channels, vae.downsampling_factor


@torch.no_grad()
def measure(unet, vae, channels, side, args):
    placement = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    latents = torch.randn(2, channels, side, side, **placement)
    prompts = torch.randn(2, PROMPT_TOKENS, SD21_UNET["cross_attention_dim"], **placement)
    weights = sum(p.numel() * p.element_size() for module in (unet, vae) for p in module.parameters())
    parts = {"step": lambda: unet(latents, 500, prompts), "decode": lambda: vae.decode(latents[:1])}
    row = {"weights_gib": weights / 2**30}
    for name, part in parts.items():
        row[f"{name}_peak_gib"] = (weights + measure_peak_bytes(part, args.device)) / 2**30
        row[f"{name}_seconds"] = measure_seconds(part, args.steps, args.device, warm_up=0)
    row["picture_seconds"] = args.num_inference_steps * row["step_seconds"] + row["decode_seconds"]
    row["peak_gib"] = max(row["step_peak_gib"], row["decode_peak_gib"])
    return row


def plot(rows, num_inference_steps, machine, path):
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    names = list(rows)
    steps = [num_inference_steps * row["step_seconds"] for row in rows.values()]
    decoding = [row["decode_seconds"] for row in rows.values()]
    axes[0].bar(names, steps, label=f"{num_inference_steps} denoising steps")
    axes[0].bar(names, decoding, bottom=steps, label="decoding")
    axes[0].set(ylabel="seconds a picture")
    axes[0].legend()
    places = range(len(names))
    axes[1].bar([place - 0.2 for place in places], [row["speed_ratio"] for row in rows.values()], 0.4, label="here")
    axes[1].bar([place + 0.2 for place in places], [row["paper_ratio"] for row in rows.values()], 0.4, label="paper")
    axes[1].set(ylabel="speed over SD 2.1", xticks=list(places), xticklabels=names)
    axes[1].legend()
    figure.suptitle(machine, fontsize=8)
    figure.savefig(path, dpi=120)


def main(args):
    usable_device(args.device)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(SD21_UNET).eval()
    rows = {}
    machine = f"{describe_machine(args.device)}, {args.dtype}, {datetime.date.today().isoformat()}"
    for name in SYSTEMS:
        if name not in ("SD 2.1", *args.systems):
            continue
        autoencoder, pixels, paper_ratio = SYSTEMS[name]
        own_unet, vae, channels, factor = build(autoencoder, unet, args)
        rows[name] = measure(own_unet, vae, channels, pixels // factor, args)
        rows[name] |= {"pixels": pixels, "F": factor, "d": channels, "paper_ratio": paper_ratio}
        rows[name]["speed_ratio"] = rows["SD 2.1"]["picture_seconds"] / rows[name]["picture_seconds"]
        print(name, json.dumps(rows[name]), flush=True)
        del own_unet, vae
        record = {"machine": machine, "num_inference_steps": args.num_inference_steps, "systems": rows}
        write_json(args.output_dir / "generation_speed.json", record)
    plot(rows, args.num_inference_steps, machine, args.output_dir / "generation_speed.png")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
