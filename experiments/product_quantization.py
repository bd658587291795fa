#!/usr/bin/env python
"""Product quantisation of a trained autoencoder's latents: pictures and denoisers against bits per latent value.

    python experiments/product_quantization.py                       # some minutes on one core

Writes product_quantization.json. Each half of the photographs is quantised with codebooks that were fitted to the
other. Denoisers with the same start, order of data and noise are trained on the latents themselves and on those that
come back from codes; all are scored by their loss on the exact latents of a photograph that none has seen.
"""

import datetime
import statistics
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel
from tqdm import tqdm

from diffusers_pq import product_quantize
from diffusers_pq.autoencoders import load_autoencoder
from diffusers_pq.console import one_line_errors
from diffusers_pq.files import write_json
from diffusers_pq.flags import COUNT, FlagParser, output_folder
from diffusers_pq.images import to_tensor, to_uint8
from diffusers_pq.measuring import describe_machine
from diffusers_pq.metrics import psnr
from diffusers_pq.models.quantizer import bits_per_code
from diffusers_pq.photographs import load_photographs
from diffusers_pq.training.noise import denoising_loss


HELD_OUT = "coffee"  # of the denoisers


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument("--model", default="model_cards/pqgan-mini-f8-kl", help="AutoencoderKL, folder or repository")
    parser.add_argument("--num_subspaces", nargs="+", type=COUNT, default=[1, 2, 4], help="numbers of subspaces S")
    parser.add_argument("--codebook_size", nargs="+", type=COUNT, default=[16, 64, 256], help="sizes of a codebook K")
    parser.add_argument(
        "--denoisers", nargs="*", default=["2:16", "2:256", "4:256"], help="S:K of which a denoiser is trained"
    )
    parser.add_argument("--train_steps", type=COUNT, default=400, help="steps of each denoiser's training")
    parser.add_argument(
        "--output_dir", type=output_folder, default=Path("experiments/results"), help="folder of the results"
    )
    return parser.parse_args(argv)


def load_pictures(factor):
    """By name, `[1, 3, H, W]`, cropped to multiples of F."""
    pictures = {name: to_tensor(picture)[None] for name, picture in load_photographs().items()}
    return {
        name: image[..., : image.shape[-2] // factor * factor, : image.shape[-1] // factor * factor]
        for name, image in pictures.items()
    }


def fit(args, pictures, num_subspaces, codebook_size, learned_rotation):
    return product_quantize(load_autoencoder(args.model), pictures, num_subspaces, codebook_size, learned_rotation)


@torch.no_grad()
def measure_quantizer(pictures, args, num_subspaces, codebook_size, learned_rotation):
    """Means over the photographs, each half of them with codebooks of the other."""
    images, rows, seconds = list(pictures.values()), [], 0.0
    for half in (0, 1):
        start = time.perf_counter()
        model = fit(args, images[half::2], num_subspaces, codebook_size, learned_rotation)
        seconds += time.perf_counter() - start
        rows += [score(model, image) for image in images[1 - half :: 2]]
    return {
        "num_subspaces": num_subspaces,
        "codebook_size": codebook_size,
        "learned_rotation": learned_rotation,
        "bits_per_latent_value": num_subspaces * bits_per_code(codebook_size) / model.config.latent_channels,
        "psnr": statistics.mean(row[0] for row in rows),
        "relative_error": statistics.mean(row[1] for row in rows),
        "seconds_to_fit": seconds / 2,
    }


def score(model, image):
    """PSNR of the decoded codes, and the error of the latents over their variance."""
    latents = model.encode(image).latents
    quantized = model.quantize(latents).latents
    error = (quantized - latents).square().mean() / latents.var()
    sample = model.decode(quantized, quantize=False).sample
    return psnr(to_uint8(sample), to_uint8(image)).item(), error.item()


@torch.no_grad()
def measure_unquantized(pictures, args):
    vae = load_autoencoder(args.model)
    scores = []
    for image in pictures.values():
        sample = vae.decode(vae.encode(image).latent_dist.mode()).sample
        scores.append(psnr(to_uint8(sample), to_uint8(image)).item())
    return statistics.mean(scores)


class Unconditional(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        sizes = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        self.unet = UNet2DModel(sample_size=16, in_channels=channels, out_channels=channels, **sizes, **blocks)

    def forward(self, noisy, timesteps, condition):
        return self.unet(noisy, timesteps).sample


def random_crops(latents, count, generator, side=16):
    crops = []
    for _ in range(count):
        picture = latents[int(torch.randint(len(latents), (), generator=generator))]
        top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for size in picture.shape[-2:])
        crops.append(picture[0, :, top : top + side, left : left + side])
    return torch.stack(crops)


def train_on(train_latents, test_latents, steps):
    """The loss on the test latents, without quantisation, of a denoiser that learned from the train latents."""
    torch.manual_seed(0)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    denoiser, crops = Unconditional(test_latents[0].shape[1]), torch.Generator().manual_seed(0)
    optimizer, noise = torch.optim.AdamW(denoiser.parameters(), 1e-3), torch.Generator().manual_seed(1)
    for _ in tqdm(range(steps), desc="denoiser", leave=False):
        loss = denoising_loss(denoiser, scheduler, random_crops(train_latents, 8, crops), None, generator=noise)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    crops, noise = torch.Generator().manual_seed(2), torch.Generator().manual_seed(3)
    with torch.no_grad():
        batches = [random_crops(test_latents, 16, crops) for _ in range(16)]
        losses = [denoising_loss(denoiser.eval(), scheduler, batch, None, generator=noise) for batch in batches]
    return torch.cat(losses).mean().item()


@torch.no_grad()
def measure_denoisers(pictures, args):
    vae = load_autoencoder(args.model)
    latents = {name: vae.encode(image).latent_dist.mode() for name, image in pictures.items()}
    scale = 1 / torch.cat([value.flatten() for value in latents.values()]).std()
    test = [latents[HELD_OUT] * scale]
    names = [name for name in pictures if name != HELD_OUT]
    with torch.enable_grad():
        rows = [
            {"latents": "exact", "loss": train_on([latents[name] * scale for name in names], test, args.train_steps)}
        ]
    for setting in args.denoisers:
        num_subspaces, codebook_size = map(int, setting.split(":"))
        model = fit(args, [pictures[name] for name in names], num_subspaces, codebook_size, True)
        codes = [model.quantize(latents[name]).codes for name in names]
        train = [model.quantizer.lookup(code) * scale for code in codes]
        bits = num_subspaces * bits_per_code(codebook_size) / model.config.latent_channels
        with torch.enable_grad():
            loss = train_on(train, test, args.train_steps)
        rows.append({"latents": setting, "bits_per_latent_value": bits, "loss": loss})
    return rows


def main(args):
    start = time.perf_counter()
    vae = load_autoencoder(args.model)
    if not isinstance(vae, AutoencoderKL):
        raise ValueError(f"--model {args.model} must be an AutoencoderKL, but is of class {type(vae).__name__}.")
    pictures = load_pictures(2 ** (len(vae.config.block_out_channels) - 1))
    settings = [
        (subspaces, size, rotation)
        for subspaces in args.num_subspaces
        for size in args.codebook_size
        for rotation in (False, True)
    ]
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine("cpu"),
        "model": args.model,
        "latent_channels": vae.config.latent_channels,
        "psnr_without_quantisation": measure_unquantized(pictures, args),
        "quantizers": [measure_quantizer(pictures, args, *setting) for setting in tqdm(settings, desc="quantizers")],
        "denoiser_train_steps": args.train_steps,
        "denoisers": measure_denoisers(pictures, args),
        "seconds": time.perf_counter() - start,
    }
    write_json(args.output_dir / "product_quantization.json", record)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
