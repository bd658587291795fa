#!/usr/bin/env python
"""Training speed and memory against the loop of diffusers' `examples/vqgan/train_vqgan.py`, in one run.

    python experiments/training_speed.py                      # on a GPU: --config model_cards/pqgan-f8/config.json
                                                             #           --resolution 256 --batch_size 20

Both have the same blocks, pictures, optimiser and discriminator, and the losses that both know: L1, codebook and
adversarial with adaptive weight. A step is one update of the autoencoder and one of the discriminator. diffusers' loop
takes turns, and so reconstructs a batch for each of the two; ours hands the reconstruction on. Writes
training_speed.json.
"""

import datetime
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import VQModel
from diffusers.optimization import get_scheduler

from diffusers_pq import PatchDiscriminator, PQModel
from diffusers_pq.console import one_line_errors
from diffusers_pq.files import write_json
from diffusers_pq.flags import COUNT, FlagParser, output_folder
from diffusers_pq.measuring import describe_machine, measure_peak_bytes, measure_seconds, results_folder
from diffusers_pq.training.pqgan import (
    AutoencoderLoss,
    AutoencoderTrainer,
    LossWeights,
    ReconstructionModel,
    adaptive_weight,
    hinge_discriminator_loss,
)


WEIGHTS = LossWeights(perceptual=0.0)
# Of a PQModel's config, what a VQModel has too.
BLOCKS = (
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "mid_block_add_attention",
)


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument(
        "--config",
        type=Path,
        default=Path("model_cards/pqgan-mini-f8-pq/config.json"),
        help="config.json of a PQModel",
    )
    parser.add_argument("--resolution", type=COUNT, default=128, help="side of the pictures, in pixels")
    parser.add_argument("--batch_size", type=COUNT, default=4, help="pictures at once")
    parser.add_argument("--repeats", type=COUNT, default=7, help="measurements, of which the median counts")
    parser.add_argument(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        default="no",
        help="precision of the forward pass, such as bf16",
    )
    parser.add_argument(
        "--output_dir", type=output_folder, help="folder of the results; default: experiments/results/ and the device"
    )
    return parser.parse_args(argv)


def adam(module, **options):
    return torch.optim.Adam(module.parameters(), 4.5e-6, betas=(0.5, 0.9), **options)


def diffusers_loop(config, images, accelerator):
    """One update of both networks as diffusers' example makes them: forward for each, plain Adam."""
    channels = {"latent_channels": config["latent_channels"], "vq_embed_dim": config["latent_channels"]}
    blocks = {name: config[name] for name in BLOCKS}
    model = VQModel(**blocks, **channels, num_vq_embeddings=config["codebook_size"])
    discriminator = PatchDiscriminator()
    parts = model, discriminator, adam(model), adam(discriminator)
    model, discriminator, optimizer, d_optimizer = accelerator.prepare(*parts)
    last_layer = accelerator.unwrap_model(model).decoder.conv_out.weight

    def generator_update():
        sample, commitment = model(images, return_dict=False)
        reconstruction = F.l1_loss(sample, images)
        adversarial = -discriminator(sample).mean()
        weight = WEIGHTS.discriminator * adaptive_weight(reconstruction, adversarial, last_layer)
        accelerator.backward(reconstruction + commitment + weight * adversarial)
        optimizer.step()
        optimizer.zero_grad()

    def discriminator_update():
        sample, _ = model(images, return_dict=False)
        d_optimizer.zero_grad()  # of the gradients that the generator's update left there
        accelerator.backward(hinge_discriminator_loss(discriminator(images), discriminator(sample.detach())))
        d_optimizer.step()

    def step():
        generator_update()
        discriminator_update()

    return step


def our_step(config, images, accelerator, **overrides):
    """One step of `train_pqgan.py`."""
    model = ReconstructionModel(PQModel.from_config(config, **overrides)).train()
    discriminator = PatchDiscriminator()
    prepared = []
    for module in (model, discriminator):
        optimizer = adam(module, fused=True)
        prepared.append(accelerator.prepare(module, optimizer, get_scheduler("constant", optimizer)))
    losses = AutoencoderLoss(WEIGHTS, None, prepared[1][0], accelerator)
    trainer = AutoencoderTrainer(accelerator, *prepared[0], losses, *prepared[1])
    return lambda: trainer.step(images)


def main(args):
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    device = str(accelerator.device)
    config = PQModel.load_config(args.config)
    torch.manual_seed(0)
    images = torch.rand(args.batch_size, 3, args.resolution, args.resolution, device=device) * 2 - 1
    one_subspace = {"num_subspaces": 1}
    builders = {
        "diffusers train_vqgan loop, VQ": lambda: diffusers_loop(config, images, accelerator),
        "train_pqgan, VQ": lambda: our_step(config, images, accelerator, **one_subspace),
        f"train_pqgan, PQ (S={config['num_subspaces']})": lambda: our_step(config, images, accelerator),
    }
    rows = {}
    for name, build in builders.items():
        step = build()
        peak = measure_peak_bytes(step, device) / 2**30
        rows[name] = {"seconds": measure_seconds(step, args.repeats, device), "peak_gib": peak}
    first = next(iter(rows.values()))
    for name, row in rows.items():
        row |= {"speed_ratio": first["seconds"] / row["seconds"], "memory_ratio": row["peak_gib"] / first["peak_gib"]}
        print(name, json.dumps(row))
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{describe_machine(device)}, mixed precision {args.mixed_precision}",
        "config": str(args.config),
        "resolution": args.resolution,
        "batch_size": args.batch_size,
        "steps": rows,
    }
    folder = args.output_dir or results_folder("experiments/results", device)
    write_json(folder / "training_speed.json", record)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
