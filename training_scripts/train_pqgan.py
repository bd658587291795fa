#!/usr/bin/env python
"""Train a PQGAN (or a VQ or KL autoencoder on the same backbone) on any image dataset.

    accelerate launch training_scripts/train_pqgan.py --model_config_name_or_path model_cards/pqgan-f8 \
        --dataset_name ILSVRC/imagenet-1k --output_dir runs/pqgan-f8

The defaults are the paper's (Table 4, appendix A.1) for one process; `training_scripts/README.md` has the recipes.
"""

import argparse
import json
import logging
import math
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, broadcast, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from diffusers_pq import PatchDiscriminator
from diffusers_pq.images import to_uint8
from diffusers_pq.metrics import psnr
from diffusers_pq.reconstruction import codebook_usage
from diffusers_pq.training.arguments import parse_args_with_recipe
from diffusers_pq.training.autoencoders import (
    ReconstructionModel,
    create_autoencoder,
    downsampling_factor,
    load_autoencoder,
)
from diffusers_pq.training.checkpoints import checkpoint_step, find_checkpoint, save_checkpoint
from diffusers_pq.training.data import CentreCrops, EpochSampler, RandomCrops, load_images
from diffusers_pq.training.initialisation import (
    collect_latents,
    copy_matching_weights,
    kmeans_codebooks,
    pca_init,
)
from diffusers_pq.training.losses import load_perceptual_loss
from diffusers_pq.training.trainer import AutoencoderLoss, FiniteSteps, LossWeights
from diffusers_pq.training.validation import evaluate_reconstruction


logger = get_logger(__name__)

PCA_CROPS = 32  # crops that --weight_init pca is fitted to


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model_config_name_or_path", help="config.json, folder or Hub repository to start afresh from"
    )
    model.add_argument("--pretrained_model_name_or_path", help="trained autoencoder to fine-tune")
    model.add_argument(
        "--backbone_name_or_path",
        help="trained autoencoder (PQModel or AutoencoderKL) whose fitting weights a fresh model starts from",
    )
    model.add_argument(
        "--weight_init",
        choices=("default", "pca"),
        default="default",
        help="torch's, as in the paper, or the linear autoencoder that fits the first crops",
    )
    model.add_argument("--quantize_from_step", type=int, default=0, help="train without quantiser up to this step")
    model.add_argument(
        "--codebook_init",
        choices=("normal", "kmeans"),
        default="normal",
        help="N(0, 1) as in the paper, or k-means centres of latents at --quantize_from_step",
    )
    model.add_argument(
        "--kmeans_vectors_per_entry", type=int, default=32, help="latent pixels of k-means, over codebook_size"
    )
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Hub dataset or local dataset folder")
    data.add_argument("--dataset_config_name")
    data.add_argument("--train_data_dir", help="folder in the imagefolder layout")
    data.add_argument("--image_column", default="image")
    data.add_argument("--cache_dir")
    data.add_argument("--resolution", type=int, default=256)
    data.add_argument("--random_flip", action=argparse.BooleanOptionalAction, default=False)
    data.add_argument("--crops_per_image", type=int, default=1, help="crops cut from each decoded picture")
    data.add_argument("--dataloader_num_workers", type=int, default=0)
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--train_batch_size", type=int, default=20, help="crops per process and step")
    optim.add_argument("--gradient_accumulation_steps", type=int, default=1)
    optim.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=False)
    optim.add_argument("--max_train_steps", type=int, default=1_000_000)
    optim.add_argument("--learning_rate", type=float, default=4.5e-6)
    optim.add_argument("--discriminator_learning_rate", type=float, help="defaults to --learning_rate")
    optim.add_argument("--lr_scheduler", default="constant")
    optim.add_argument("--lr_warmup_steps", type=int, default=0)
    optim.add_argument("--adam_beta1", type=float, default=0.5)
    optim.add_argument("--adam_beta2", type=float, default=0.9)
    optim.add_argument("--max_grad_norm", type=float, help="clip gradients to this norm; off by default")
    optim.add_argument(
        "--max_skipped_steps",
        type=int,
        default=10,
        help="steps without a finite gradient are left out; so many in a row end the run",
    )
    optim.add_argument("--use_ema", action=argparse.BooleanOptionalAction, default=False)
    optim.add_argument("--ema_decay", type=float, default=0.9999)
    optim.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"))
    optim.add_argument(
        "--channels_last",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="memory format that convolutions prefer",
    )
    optim.add_argument("--seed", type=int, default=0)
    loss = parser.add_argument_group("losses (0 switches a term off)")
    loss.add_argument("--perceptual_weight", type=float, default=1.0)
    loss.add_argument("--codebook_weight", type=float, default=1.0)
    loss.add_argument("--kl_weight", type=float, default=1e-6, help="for an AutoencoderKL")
    loss.add_argument("--discriminator_weight", type=float, default=0.8)
    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", default="pqgan")
    run.add_argument("--logging_dir", default="logs")
    run.add_argument("--report_to", default="tensorboard")
    run.add_argument("--checkpointing_steps", type=int, default=5000)
    run.add_argument("--checkpoints_total_limit", type=int)
    run.add_argument("--resume_from_checkpoint", help='"latest", a checkpoint, or "none"')
    run.add_argument("--validation_steps", type=int, default=5000)
    run.add_argument("--num_validation_images", type=int, default=64)
    run.add_argument("--push_to_hub", action=argparse.BooleanOptionalAction, default=False)
    run.add_argument("--hub_model_id")
    run.add_argument("--hub_token")
    args = parse_args_with_recipe(parser, argv)

    if (args.model_config_name_or_path is None) == (args.pretrained_model_name_or_path is None):
        parser.error("give exactly one of --model_config_name_or_path and --pretrained_model_name_or_path")
    if args.backbone_name_or_path and args.pretrained_model_name_or_path:
        parser.error("--backbone_name_or_path needs --model_config_name_or_path")
    if args.weight_init == "pca" and not args.model_config_name_or_path:
        parser.error("--weight_init pca starts afresh: it needs --model_config_name_or_path")
    if args.weight_init == "pca" and args.backbone_name_or_path:
        parser.error("--weight_init pca and --backbone_name_or_path exclude each other")
    if args.train_batch_size % args.crops_per_image:
        parser.error(
            f"--train_batch_size {args.train_batch_size} must be a multiple of "
            f"--crops_per_image {args.crops_per_image}"
        )
    return args


def build_model(args):
    if args.pretrained_model_name_or_path:
        autoencoder = load_autoencoder(args.pretrained_model_name_or_path).train()
    else:
        autoencoder = create_autoencoder(args.model_config_name_or_path)
        if args.backbone_name_or_path:
            fresh = copy_matching_weights(autoencoder, load_autoencoder(args.backbone_name_or_path))
            logger.info("Not taken from %s: %s", args.backbone_name_or_path, ", ".join(fresh) or "nothing")
    factor = downsampling_factor(autoencoder)
    if args.resolution % factor:
        raise ValueError(f"--resolution {args.resolution} must be a multiple of the downsampling factor F = {factor}.")
    if args.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    return ReconstructionModel(autoencoder)


def build_discriminator(args):
    """A fresh one, or the one that the pretrained autoencoder was trained against."""
    if not args.discriminator_weight:
        return None
    pretrained = args.pretrained_model_name_or_path
    if pretrained and Path(pretrained, "discriminator").is_dir():
        return PatchDiscriminator.from_pretrained(Path(pretrained, "discriminator"), use_safetensors=True).train()
    return PatchDiscriminator()


def build_loaders(args, first_sample):
    """The training loader, endless and starting at a sample of the run, and the validation loader or `None`."""

    def load(split):
        return load_images(
            args.dataset_name, args.train_data_dir, args.image_column, split, args.dataset_config_name, args.cache_dir
        )

    train, validation = load("train"), load("validation")
    if train is None:
        raise ValueError("The dataset has no `train` split.")
    crops = RandomCrops(train, args.image_column, args.resolution, args.crops_per_image, args.random_flip, args.seed)
    train_loader = DataLoader(
        crops,
        batch_size=args.train_batch_size // args.crops_per_image,
        sampler=EpochSampler(len(crops), args.seed, first_sample),
        collate_fn=torch.cat,
        num_workers=args.dataloader_num_workers,
        # torch draws the workers' seeds from it; from the global generator, a resumed run would draw once more.
        generator=torch.Generator(),
    )
    if validation is None:
        logger.warning("The dataset has no `validation` split: no validation.")
        return train_loader, None
    validation = validation.select(range(min(args.num_validation_images, len(validation))))
    centres = CentreCrops(validation, args.image_column, args.resolution)
    return train_loader, DataLoader(centres, batch_size=args.train_batch_size, collate_fn=torch.cat)


def validate(accelerator, model, loader, step, quantize):
    model = accelerator.unwrap_model(model)
    scores = evaluate_reconstruction(model, loader, quantize)
    accelerator.log({f"validation/{name}": value for name, value in scores.items()}, step=step)
    images = next(iter(loader))[:8].to(accelerator.device)
    model.eval()
    with torch.no_grad():
        pairs = torch.cat([images, model(images, quantize=quantize).sample])
    model.train()
    grid = make_grid(to_uint8(pairs), nrow=len(images))
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("validation/original_and_reconstruction", grid, step)
    logger.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))


@contextmanager
def ema_weights(ema, autoencoder):
    """Hold the averaged weights in the model for a while."""
    if ema is None:
        yield
        return
    ema.store(autoencoder.parameters())
    ema.copy_to(autoencoder.parameters())
    try:
        yield
    finally:
        ema.restore(autoencoder.parameters())


def first_crops(args, crops):
    """Batches of the run's first crops, the same in every process."""
    sampler = EpochSampler(len(crops), args.seed)
    pictures = args.train_batch_size // args.crops_per_image
    return DataLoader(crops, pictures, sampler=sampler, collate_fn=torch.cat)


def fit_to_images(args, autoencoder, crops):
    """Start from the linear autoencoder of the run's first crops."""
    images = torch.cat(list(islice(first_crops(args, crops), math.ceil(PCA_CROPS / args.train_batch_size))))
    quantizer = getattr(autoencoder, "quantizer", None)
    pca_init(autoencoder, images, num_subspaces=1 if quantizer is None else quantizer.num_subspaces)


def init_codebooks(args, accelerator, model, crops):
    """k-means on the first crops of the run, in every process; all then take the codebooks of the first one."""
    autoencoder = accelerator.unwrap_model(model).autoencoder
    batches = first_crops(args, crops)
    wanted = args.kmeans_vectors_per_entry * autoencoder.config.codebook_size
    kmeans_codebooks(autoencoder.quantizer, collect_latents(autoencoder, batches, wanted))
    broadcast(autoencoder.quantizer.codebooks.data)


def codebook_use(codes, autoencoder):
    """Share of the entries that this batch used, over all subspaces."""
    return 1 - codebook_usage(autoencoder, [codes])["dead"]


def save_model(args, accelerator, model, discriminator, ema):
    autoencoder = accelerator.unwrap_model(model).autoencoder
    if ema is not None:
        ema.copy_to(autoencoder.parameters())
    autoencoder.save_pretrained(args.output_dir)
    if discriminator is not None:
        accelerator.unwrap_model(discriminator).save_pretrained(Path(args.output_dir) / "discriminator")
    if args.push_to_hub:
        repo_id = args.hub_model_id or Path(args.output_dir).name
        autoencoder.push_to_hub(repo_id, token=args.hub_token)


def main(args):
    accelerator = Accelerator(
        # Epochs follow each other without a gap, and so does accumulation.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir, args.logging_dir))),
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    set_seed(args.seed)
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    step = 0 if checkpoint is None else checkpoint_step(checkpoint)

    model = build_model(args)
    samples_per_step = args.train_batch_size // args.crops_per_image * args.gradient_accumulation_steps
    train_loader, validation_loader = build_loaders(args, step * samples_per_step * accelerator.num_processes)
    if args.weight_init == "pca" and checkpoint is None:
        fit_to_images(args, model.autoencoder, train_loader.dataset)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    is_quantized = hasattr(model.autoencoder, "quantizer")
    weights = LossWeights(
        args.perceptual_weight, args.codebook_weight if is_quantized else args.kl_weight, args.discriminator_weight
    )
    perceptual_loss = load_perceptual_loss().to(accelerator.device) if args.perceptual_weight else None
    discriminator = build_discriminator(args)

    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate, betas=betas)
    # The schedulers of accelerate take one step per process at each optimisation step.
    schedule = {
        "name": args.lr_scheduler,
        "num_warmup_steps": args.lr_warmup_steps * accelerator.num_processes,
        "num_training_steps": args.max_train_steps * accelerator.num_processes,
    }
    model, optimizer, train_loader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_loader, get_scheduler(optimizer=optimizer, **schedule)
    )
    if discriminator is not None:
        rate = args.discriminator_learning_rate or args.learning_rate
        d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=rate, betas=betas)
        discriminator, d_optimizer, d_scheduler = accelerator.prepare(
            discriminator, d_optimizer, get_scheduler(optimizer=d_optimizer, **schedule)
        )
    ema = None
    if args.use_ema:
        parameters = accelerator.unwrap_model(model).autoencoder.parameters()
        ema = EMAModel(parameters, decay=args.ema_decay, use_ema_warmup=True)
        ema.to(accelerator.device)
        accelerator.register_for_checkpointing(ema)
    finite_steps = FiniteSteps(accelerator, args.max_grad_norm, args.max_skipped_steps)
    finite_d_steps = FiniteSteps(accelerator, limit=args.max_skipped_steps)
    losses = AutoencoderLoss(weights, perceptual_loss, discriminator, accelerator)

    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        logger.info("Resumed from %s", checkpoint)
    if accelerator.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(args).items() if key != "hub_token"}
        Path(args.output_dir, "training_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        accelerator.init_trackers("pqgan")

    kmeans_pending = is_quantized and args.codebook_init == "kmeans" and step <= args.quantize_from_step
    progress = tqdm(total=args.max_train_steps, initial=step, disable=not accelerator.is_local_main_process)
    model.train()
    for images in train_loader:
        if step >= args.max_train_steps:
            break
        quantize = step >= args.quantize_from_step
        if kmeans_pending and quantize:
            init_codebooks(args, accelerator, model, train_loader.dataset)
            kmeans_pending = False
        with accelerator.accumulate(model, *([discriminator] if discriminator is not None else [])):
            output = model(images, quantize=quantize)
            loss, logs = losses.generator(model, images, output)
            accelerator.backward(loss)
            finite_steps.step(optimizer, model.parameters())
            lr_scheduler.step()

            if discriminator is not None:
                d_loss = losses.discriminator_loss(images, output.sample)
                accelerator.backward(d_loss)
                finite_d_steps.step(d_optimizer, discriminator.parameters())
                d_scheduler.step()
                logs["discriminator_loss"] = d_loss.detach()
        if not accelerator.sync_gradients:
            continue

        step += 1
        progress.update()
        if ema is not None:
            ema.step(accelerator.unwrap_model(model).autoencoder.parameters())
        logs["skipped_steps"] = finite_steps.skipped + finite_d_steps.skipped
        logs["psnr"] = psnr(to_uint8(output.sample), to_uint8(images)).mean()
        if output.codes is not None:
            logs["codebook_use"] = codebook_use(output.codes, accelerator.unwrap_model(model).autoencoder)
        logs = {name: float(value) for name, value in logs.items()}
        progress.set_postfix({name: f"{logs[name]:.3g}" for name in ("loss", "psnr", "codebook_use") if name in logs})
        accelerator.log(logs | {"lr": lr_scheduler.get_last_lr()[0]}, step=step)

        is_healthy = not (finite_steps.in_a_row or finite_d_steps.in_a_row)
        if step % args.checkpointing_steps == 0 and is_healthy:
            save_checkpoint(accelerator, args.output_dir, step, args.checkpoints_total_limit)
        if validation_loader is not None and step % args.validation_steps == 0 and accelerator.is_main_process:
            with ema_weights(ema, accelerator.unwrap_model(model).autoencoder):
                validate(accelerator, model, validation_loader, step, quantize)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_model(args, accelerator, model, discriminator, ema)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
