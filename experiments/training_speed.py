#!/usr/bin/env python
"""Training speed and memory against the loop of diffusers' `examples/vqgan/train_vqgan.py`, in one run.

    python experiments/training_speed.py
    python experiments/training_speed.py --device cuda --config model_cards/pqgan-f8/config.json --resolution 256 \\
        --batch_size 20 --mixed_precision bf16 --variants plain channels_last compiled compiled_channels_last

Both have the same blocks, pictures, optimiser and discriminator, and the losses that both know: L1, codebook and
adversarial with adaptive weight. A step is one update of the autoencoder and one of the discriminator. diffusers' loop
takes turns, and so reconstructs a batch for each of the two; ours hands the reconstruction on. Writes
training_speed.json.
"""

import datetime
import functools
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import VQModel
from diffusers.optimization import get_scheduler

from diffusers_pq import PatchDiscriminator, PQModel
from diffusers_pq.console import one_line_errors
from diffusers_pq.files import write_json
from diffusers_pq.flags import COUNT, FlagParser, device, output_folder
from diffusers_pq.measuring import describe_machine, measure_peak_bytes, measure_seconds, results_folder
from diffusers_pq.training.options import OptimisationOptions
from diffusers_pq.training.pqgan import (
    AutoencoderLoss,
    AutoencoderTrainer,
    LossWeights,
    ReconstructionModel,
    adaptive_weight,
    hinge_discriminator_loss,
)
from diffusers_pq.training.run import prepare_model


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


# Flags of a training.
VARIANTS = {
    "plain": {},
    "channels_last": {"channels_last": True},
    "compiled": {"compile": True},
    "compiled_channels_last": {"compile": True, "channels_last": True},
}


def add_training_flags(parser):
    """What is trained, where and how, and where the results go."""
    parser.add_argument(
        "--config",
        type=Path,
        default=Path("model_cards/pqgan-mini-f8-pq/config.json"),
        help="config.json of a PQModel",
    )
    parser.add_argument("--device", type=device, default="cpu", help="device to compute on")
    parser.add_argument(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        default="no",
        help="precision of the forward pass, such as bf16",
    )
    parser.add_argument(
        "--output_dir", type=output_folder, help="folder of the results; default: experiments/results/ and the device"
    )


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    add_training_flags(parser)
    parser.add_argument("--resolution", type=COUNT, default=128, help="side of the pictures, in pixels")
    parser.add_argument("--batch_size", type=COUNT, default=4, help="pictures at once")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=["plain"], help="ways in which ours is trained"
    )
    parser.add_argument("--repeats", type=COUNT, default=7, help="measurements, of which the median counts")
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


def our_trainer(config, accelerator, flags, adversarial=True, **overrides):
    """What `train_pqgan.py` trains with, without its data."""
    autoencoder = PQModel.from_config(config, **overrides)
    optim = OptimisationOptions(**flags)
    model = ReconstructionModel(prepare_model(optim, autoencoder, dynamic=False))
    prepared = []
    for module in (model.train(), PatchDiscriminator())[: 1 + adversarial]:
        optimizer = adam(module, fused=True)
        prepared.append(accelerator.prepare(module, optimizer, get_scheduler("constant", optimizer)))
    discriminator = prepared[1] if adversarial else (None, None, None)
    losses = AutoencoderLoss(WEIGHTS, None, discriminator[0], accelerator)
    return AutoencoderTrainer(accelerator, *prepared[0], losses, *discriminator)


def our_step(config, images, accelerator, variant, **overrides):
    trainer = our_trainer(config, accelerator, VARIANTS[variant], **overrides)
    return lambda: trainer.step(images)


def main(args):
    torch.backends.cudnn.benchmark = True  # as in a training
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=args.mixed_precision)
    folder = args.output_dir or results_folder("experiments/results", args.device)
    config = PQModel.load_config(args.config)
    torch.manual_seed(0)
    images = torch.rand(args.batch_size, 3, args.resolution, args.resolution, device=args.device) * 2 - 1
    builders = {
        "diffusers train_vqgan loop, VQ": lambda: diffusers_loop(config, images, accelerator),
        "train_pqgan, VQ": lambda: our_step(config, images, accelerator, "plain", num_subspaces=1),
    }
    for variant in args.variants:
        name = f"train_pqgan, PQ (S={config['num_subspaces']})" + (f", {variant}" if variant != "plain" else "")
        builders[name] = functools.partial(our_step, config, images, accelerator, variant)
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{describe_machine(args.device)}, mixed precision {args.mixed_precision}",
        "config": str(args.config),
        "resolution": args.resolution,
        "batch_size": args.batch_size,
        "steps": {},
    }
    rows = record["steps"]
    for name, build in builders.items():
        step = build()
        started = time.perf_counter()
        step()  # compiles
        first_seconds = time.perf_counter() - started
        peak = measure_peak_bytes(step, args.device) / 2**30
        seconds = measure_seconds(step, args.repeats, args.device)
        rows[name] = {"seconds": seconds, "first_seconds": first_seconds, "peak_gib": peak}
        first = next(iter(rows.values()))
        rows[name] |= {"speed_ratio": first["seconds"] / seconds, "memory_ratio": peak / first["peak_gib"]}
        print(name, json.dumps(rows[name]), flush=True)
        write_json(folder / "training_speed.json", record)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
