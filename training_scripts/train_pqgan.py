#!/usr/bin/env python
"""Train a PQGAN (or a VQ or KL autoencoder on the same backbone) on any image dataset.

    accelerate launch training_scripts/train_pqgan.py --model_config_name_or_path model_cards/pqgan-f8 \\
        --dataset_name ILSVRC/imagenet-1k --output_dir runs/pqgan-f8

The defaults are the paper's (Table 4, appendix A.1) for one process; `training_scripts/README.md` has the recipes.
"""

import argparse
import logging
import math
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from accelerate.utils import DistributedType, broadcast
from diffusers.training_utils import EMAModel

from diffusers_pq import PatchDiscriminator
from diffusers_pq.autoencoders import (
    ReconstructionModel,
    create_autoencoder,
    downsampling_factor,
    load_autoencoder,
)
from diffusers_pq.data.loaders import build_train_loader, first_batches
from diffusers_pq.data.pictures import RandomCrops, load_images, usable_rows
from diffusers_pq.metrics import WeightsUnavailableError, load_lpips
from diffusers_pq.training.codebooks import DeadEntryReseeder, EMACodebooks
from diffusers_pq.training.initialisation import (
    collect_latents,
    copy_matching_weights,
    kmeans_codebooks,
    pca_init,
)
from diffusers_pq.training.losses import load_perceptual_loss
from diffusers_pq.training.options import (
    add_data_arguments,
    add_optimisation_arguments,
    add_run_arguments,
    parse_args_with_recipe,
    positive,
)
from diffusers_pq.training.run import TrainingRun, build_lr_scheduler, create_accelerator, dry_run
from diffusers_pq.training.trainer import AutoencoderLoss, AutoencoderTrainer, LossWeights
from diffusers_pq.training.uploads import BestModel
from diffusers_pq.training.validation import ReconstructionValidation, ema_weights


logger = logging.getLogger(__name__)

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
    codebooks = parser.add_argument_group("codebooks (the paper uses none of these)")
    codebooks.add_argument("--quantize_from_step", type=int, default=0, help="train without quantiser up to this step")
    codebooks.add_argument(
        "--codebook_init",
        choices=("normal", "kmeans"),
        default="normal",
        help="N(0, 1) as in the paper, or k-means centres of latents at --quantize_from_step",
    )
    codebooks.add_argument(
        "--kmeans_vectors_per_entry", type=int, default=32, help="latent pixels of k-means, over codebook_size"
    )
    codebooks.add_argument("--codebook_distance", choices=("euclidean", "cosine"), help="default: the config's")
    codebooks.add_argument(
        "--codebook_ema_decay",
        type=float,
        help="move the codebooks by running means with this decay, not by gradients",
    )
    codebooks.add_argument(
        "--reseed_dead_entries", type=positive, help="move unused entries to data after so many steps"
    )
    codebooks.add_argument(
        "--gradient_estimator",
        choices=("straight_through", "rotation"),
        default="straight_through",
        help="how gradients pass the quantiser",
    )
    data = add_data_arguments(parser)
    data.add_argument("--resolution", type=int, default=256)
    data.add_argument("--crops_per_image", type=positive, default=1, help="crops cut from each decoded picture")
    optim = add_optimisation_arguments(parser)
    optim.add_argument("--train_batch_size", type=int, default=20, help="crops per process and step")
    optim.add_argument("--max_train_steps", type=int, default=1_000_000)
    optim.add_argument("--learning_rate", type=float, default=4.5e-6)
    optim.add_argument("--discriminator_learning_rate", type=float, help="defaults to --learning_rate")
    optim.add_argument("--adam_beta1", type=float, default=0.5)
    optim.add_argument("--adam_beta2", type=float, default=0.9)
    optim.add_argument("--max_grad_norm", type=float, help="clip gradients to this norm; off by default")
    loss = parser.add_argument_group("losses (0 switches a term off)")
    loss.add_argument("--perceptual_weight", type=float, default=1.0)
    loss.add_argument("--codebook_weight", type=float, default=1.0)
    loss.add_argument("--kl_weight", type=float, default=1e-6, help="for an AutoencoderKL")
    loss.add_argument("--discriminator_weight", type=float, default=0.8)
    run = add_run_arguments(parser, output_dir="pqgan", steps=5000)
    run.add_argument("--num_validation_images", type=int, default=64)
    args = parse_args_with_recipe(parser, argv)

    if (args.model_config_name_or_path is None) == (args.pretrained_model_name_or_path is None):
        parser.error("give exactly one of --model_config_name_or_path and --pretrained_model_name_or_path")
    if args.backbone_name_or_path and args.pretrained_model_name_or_path:
        parser.error("--backbone_name_or_path needs --model_config_name_or_path")
    if args.codebook_distance and args.pretrained_model_name_or_path:
        parser.error("--codebook_distance needs --model_config_name_or_path")
    if args.weight_init == "pca" and not args.model_config_name_or_path:
        parser.error("--weight_init pca starts afresh: it needs --model_config_name_or_path")
    if args.weight_init == "pca" and args.backbone_name_or_path:
        parser.error("--weight_init pca and --backbone_name_or_path exclude each other")
    if args.codebook_ema_decay is not None and not 0 < args.codebook_ema_decay < 1:
        parser.error(f"--codebook_ema_decay {args.codebook_ema_decay} must lie between 0 and 1, such as 0.99")
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
        overrides = {"codebook_distance": args.codebook_distance} if args.codebook_distance else {}
        autoencoder = create_autoencoder(args.model_config_name_or_path, **overrides)
        if args.backbone_name_or_path:
            fresh = copy_matching_weights(autoencoder, load_autoencoder(args.backbone_name_or_path))
            logger.info("Not taken from %s: %s", args.backbone_name_or_path, ", ".join(fresh) or "nothing")
    factor = downsampling_factor(autoencoder)
    if args.resolution % factor:
        raise ValueError(f"--resolution {args.resolution} must be a multiple of the downsampling factor F = {factor}.")
    if hasattr(autoencoder, "quantizer"):
        autoencoder.quantizer.gradient_estimator = args.gradient_estimator
        # Before DDP wraps the model, which waits for the gradients of all parameters that had one then.
        autoencoder.quantizer.codebooks.requires_grad_(not args.codebook_ema_decay)
    return ReconstructionModel(autoencoder)


def save_memory_and_time(args, autoencoder):
    if args.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    if args.channels_last:
        autoencoder.to(memory_format=torch.channels_last)
    if args.compile:
        autoencoder.encoder.compile()
        autoencoder.decoder.compile()


def build_discriminator(args):
    """A fresh one, or the one that the pretrained autoencoder was trained against."""
    if not args.discriminator_weight:
        return None
    pretrained = args.pretrained_model_name_or_path
    if pretrained and Path(pretrained, "discriminator").is_dir():
        return PatchDiscriminator.from_pretrained(Path(pretrained, "discriminator"), use_safetensors=True).train()
    return PatchDiscriminator()


def load_split(args, split):
    source = args.dataset_name, args.train_data_dir, args.image_column, split
    return load_images(*source, args.dataset_config_name, args.cache_dir, args.streaming)


def random_crops(args):
    return RandomCrops(args.image_column, args.resolution, args.crops_per_image, args.random_flip, args.min_image_side)


def first_crops(args, train_images):
    """Batches of the run's first crops, the same in every process."""
    pictures = args.train_batch_size // args.crops_per_image
    return first_batches(train_images, random_crops(args), pictures, torch.cat, args.seed, args.shuffle_buffer)


def fit_to_images(args, autoencoder, train_images):
    """Start from the linear autoencoder of the run's first crops."""
    batches = islice(first_crops(args, train_images), math.ceil(PCA_CROPS / args.train_batch_size))
    quantizer = getattr(autoencoder, "quantizer", None)
    pca_init(autoencoder, torch.cat(list(batches)), num_subspaces=1 if quantizer is None else quantizer.num_subspaces)


def init_codebooks(args, trainer, train_images):
    """k-means on the run's first crops, in every process; all then take the codebooks of the first one."""
    autoencoder = trainer.autoencoder
    wanted = args.kmeans_vectors_per_entry * autoencoder.config.codebook_size
    kmeans_codebooks(autoencoder.quantizer, collect_latents(autoencoder, first_crops(args, train_images), wanted))
    broadcast(autoencoder.quantizer.codebooks.data)
    trainer.restart_codebook_averages()


def build_train_images_loader(args, accelerator, train_images, step):
    pictures = args.train_batch_size // args.crops_per_image
    return build_train_loader(
        train_images,
        random_crops(args),
        accelerator,
        pictures,
        collate_fn=torch.cat,
        seed=args.seed,
        start=step * pictures * args.gradient_accumulation_steps * accelerator.num_processes,
        shuffle_buffer=args.shuffle_buffer,
        num_workers=args.dataloader_num_workers,
        on_bad_image=args.on_bad_image,
    )


def available_lpips():
    try:
        return load_lpips("vgg")
    except WeightsUnavailableError as error:
        logger.info("The validation goes without LPIPS: %s", error)
        return None


def build_validation(args, accelerator, perceptual_loss):
    images = load_split(args, "validation")
    if images is None:
        logger.warning("The dataset has no `validation` split: no validation.")
        return None
    rows = usable_rows(images, args.image_column, args.num_validation_images)
    if not rows:
        logger.warning("No picture of the `validation` split can be used: no validation.")
        return None
    lpips = perceptual_loss or available_lpips()
    return ReconstructionValidation(
        accelerator, rows, args.image_column, args.resolution, args.train_batch_size, lpips
    )


def build_trainer(args, accelerator, model, perceptual_loss):
    def optimiser(module, rate):
        adam = torch.optim.Adam(module.parameters(), rate, betas=(args.adam_beta1, args.adam_beta2), fused=True)
        return adam, build_lr_scheduler(args, adam, accelerator.num_processes)

    model, optimizer, lr_scheduler = accelerator.prepare(model, *optimiser(model, args.learning_rate))
    discriminator = build_discriminator(args)
    adversary = [discriminator, None, None]
    if discriminator is not None:
        rate = args.learning_rate if args.discriminator_learning_rate is None else args.discriminator_learning_rate
        adversary = accelerator.prepare(discriminator, *optimiser(discriminator, rate))
    autoencoder = accelerator.unwrap_model(model).autoencoder
    quantizer = getattr(autoencoder, "quantizer", None)
    regularisation_weight = args.kl_weight if quantizer is None else args.codebook_weight
    weights = LossWeights(args.perceptual_weight, regularisation_weight, args.discriminator_weight)
    helpers = {}
    if args.use_ema:
        helpers["ema"] = EMAModel(autoencoder.parameters(), decay=args.ema_decay, use_ema_warmup=True)
        helpers["ema"].to(accelerator.device)
    if quantizer is not None and args.codebook_ema_decay:
        helpers["ema_codebooks"] = EMACodebooks(quantizer, accelerator, args.codebook_ema_decay)
    if quantizer is not None and args.reseed_dead_entries:
        helpers["reseeder"] = DeadEntryReseeder(quantizer, accelerator, args.reseed_dead_entries)
    accelerator.register_for_checkpointing(*helpers.values())
    return AutoencoderTrainer(
        accelerator,
        model,
        optimizer,
        lr_scheduler,
        AutoencoderLoss(weights, perceptual_loss, adversary[0], accelerator),
        *adversary,
        max_grad_norm=args.max_grad_norm,
        max_skipped_steps=args.max_skipped_steps,
        **helpers,
    )


def optimisation_step(trainer, batches, quantize):
    """Batches until an optimisation step is complete; returns its logs."""
    while True:
        logs = trainer.step(next(batches).to(trainer.accelerator.device, non_blocking=True), quantize)
        if logs is not None:
            return logs


def save_autoencoder(trainer, folder):
    if trainer.accelerator.is_main_process:
        trainer.autoencoder.save_pretrained(folder)


def save_model(trainer, folder):
    save_autoencoder(trainer, folder)
    if trainer.discriminator is not None and trainer.accelerator.is_main_process:
        trainer.accelerator.unwrap_model(trainer.discriminator).save_pretrained(folder / "discriminator")


def check_accelerator(args, accelerator):
    """Refuse what two models and the adaptive weight, a gradient of the decoder's last layer, do not allow."""
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"train_pqgan.py cannot run with {accelerator.distributed_type.value}, which would shard its models: "
            "launch it with `--config_file training_scripts/accelerate_configs/ddp.yaml`."
        )
    if accelerator.mixed_precision == "fp16" and args.gradient_accumulation_steps > 1 and args.discriminator_weight:
        raise ValueError(
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps} cannot be combined with fp16 and a "
            "discriminator, since one loss scale serves both optimisers: use `--mixed_precision bf16`, or 1 step."
        )


def main(args, build_model=build_model):
    accelerator = create_accelerator(args)
    check_accelerator(args, accelerator)
    run = TrainingRun(args, accelerator, BestModel(args.output_dir, "psnr"))
    train_images = load_split(args, "train")
    if train_images is None:
        raise ValueError("The dataset has no `train` split.")
    model = build_model(args)
    if args.weight_init == "pca" and run.checkpoint is None:
        fit_to_images(args, model.autoencoder, train_images)
    save_memory_and_time(args, model.autoencoder)
    perceptual_loss = load_perceptual_loss().to(accelerator.device) if args.perceptual_weight else None
    trainer = build_trainer(args, accelerator, model, perceptual_loss)
    loader = build_train_images_loader(args, accelerator, train_images, run.step)
    if args.dry_run:
        parts = dict(trainer.autoencoder.named_children())
        parts |= {"discriminator": trainer.discriminator} if trainer.discriminator else {}
        optimizers = [optimizer for optimizer in (trainer.optimizer, trainer.d_optimizer) if optimizer]
        batches = iter(loader)
        dry_run(args, accelerator, parts, optimizers, lambda: optimisation_step(trainer, batches, quantize=True))
        return
    validation = build_validation(args, accelerator, perceptual_loss)
    run.start()
    if trainer.ema is not None:
        trainer.ema.to(accelerator.device)  # a resumed average comes on the CPU

    kmeans_pending = args.codebook_init == "kmeans" and run.step <= args.quantize_from_step
    kmeans_pending = kmeans_pending and hasattr(trainer.autoencoder, "quantizer")
    trainer.model.train()
    batches = iter(loader)
    while not run.is_finished:
        quantize = run.step >= args.quantize_from_step
        if kmeans_pending and quantize:
            init_codebooks(args, trainer, train_images)
            kmeans_pending = False
        logs = optimisation_step(trainer, batches, quantize)
        run.advance()
        if run.is_due(args.logging_steps):
            logs |= trainer.codebook_use() | {"lr": trainer.lr_scheduler.get_last_lr()[0]}
            logs |= {
                "skipped_steps": trainer.skipped_steps,
                "skipped_images": loader.dataset.bad_images.total(accelerator),
            }
            run.log(logs, shown=("loss", "psnr", "H_n"))
        if validation is not None and run.is_due(args.validation_steps):
            with ema_weights(trainer.ema, trainer.autoencoder.parameters()):
                scores, pictures = validation.evaluate(trainer.model, quantize)
                run.log_scores(scores)
                run.log_images(pictures, images_per_row=len(pictures) // 2)
                run.keep_if_best(partial(save_autoencoder, trainer), scores)
        # After a validation, whose random numbers its state then has behind it.
        if run.is_due(args.checkpointing_steps) and trainer.is_healthy:
            run.save_checkpoint()
    with ema_weights(trainer.ema, trainer.autoencoder.parameters()):
        run.finish(partial(save_model, trainer))


if __name__ == "__main__":
    main(parse_args())
