#!/usr/bin/env python
"""Adapt Stable Diffusion to the latents of a PQModel (paper, section 4.5 and Table 4), on any captioned dataset.

    accelerate launch training_scripts/train_pqsd.py --config training_scripts/recipes/pqsd-quick.yaml

The UNet's first and last convolution are widened; the stages of `--stages` follow each other in one resumable run.
`training_scripts/README.md` explains the flags.
"""

import argparse
import logging
import math
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from peft import LoraConfig

from diffusers_pq import PQModel, StableDiffusionPQPipeline, widen_unet
from diffusers_pq.training.arguments import (
    add_data_arguments,
    add_optimisation_arguments,
    add_run_arguments,
    parse_args_with_recipe,
)
from diffusers_pq.training.autoencoders import downsampling_factor, load_autoencoder
from diffusers_pq.training.data import CaptionedCrops, Prompts, load_images, usable_rows
from diffusers_pq.training.denoising import ConditionalDenoiser, DenoiserTrainer, Stage, find_stage, save_lora
from diffusers_pq.training.latent_cache import load_cached_codes
from diffusers_pq.training.latents import channel_weights, encode_latents, scale_latents, set_latent_statistics
from diffusers_pq.training.loaders import build_train_loader, change_data, first_batches
from diffusers_pq.training.run import TrainingRun, create_accelerator, dry_run, whole_module
from diffusers_pq.training.uploads import BestModel
from diffusers_pq.training.validation import DenoisingValidation, ema_weights


logger = logging.getLogger(__name__)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model = parser.add_argument_group("model")
    model.add_argument("--pretrained_model_name_or_path", required=True, help="Stable Diffusion pipeline to adapt")
    model.add_argument("--vae_name_or_path", help="PQModel or AutoencoderKL; default: the pipeline's own")
    model.add_argument(
        "--unet_init",
        choices=("copy", "copy_scaled", "zero", "random"),
        default="copy",
        help="weights of the new channels, see widen_unet; random: no weight of the UNet is kept",
    )
    model.add_argument(
        "--train_text_encoder",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="for pipelines whose text encoder is untrained",
    )
    model.add_argument(
        "--lora_rank",
        type=int,
        help="train LoRA layers of this rank on attention, and the widened convolutions in full",
    )
    model.add_argument(
        "--num_statistics_images", type=int, default=1000, help="pictures that the latents' mean and std are taken of"
    )
    data = add_data_arguments(parser)
    data.add_argument("--caption_column", default="text")
    data.add_argument(
        "--latents_dir", help="what `encode_dataset.py` wrote; pictures are then read for validation only"
    )
    data.add_argument("--center_crop", action=argparse.BooleanOptionalAction, default=False)
    data.add_argument(
        "--proportion_empty_prompts", type=float, default=0.1, help="captions left out, for classifier-free guidance"
    )
    optim = add_optimisation_arguments(parser)
    optim.add_argument("--train_batch_size", type=int, default=8, help="pictures per process and step")
    optim.add_argument(
        "--stages",
        default="384:20000:8e-5:conv 768:800000:8e-5:all 768:200000:2e-5:all",
        help="RESOLUTION:STEPS:LEARNING_RATE:conv (first and last convolution only) or ...:all, one after the other",
    )
    optim.add_argument("--max_train_steps", type=int, help="default: all steps of the stages")
    optim.add_argument("--adam_beta1", type=float, default=0.9)
    optim.add_argument("--adam_beta2", type=float, default=0.999)
    optim.add_argument("--adam_weight_decay", type=float, default=1e-2)
    optim.add_argument("--max_grad_norm", type=float, default=1.0)
    optim.add_argument("--snr_gamma", type=float, help="min-SNR weighting; 5.0 is usual")
    optim.add_argument(
        "--channel_weighting",
        type=float,
        default=0.0,
        help="weigh each latent channel's loss by its standard deviation to this power; 0: all alike, as the paper",
    )
    run = add_run_arguments(parser, output_dir="pqsd", steps=5000)
    run.add_argument("--num_validation_images", type=int, default=256, help="of the validation loss")
    run.add_argument("--validation_prompts", nargs="*", default=[], help="pictures of them go to the log")
    args = parse_args_with_recipe(parser, argv)
    try:
        args.stages = [Stage.parse(text) for text in args.stages.split()]
    except ValueError as error:
        parser.error(f"--stages: {error}")
    if args.max_train_steps is None:
        args.max_train_steps = sum(stage.steps for stage in args.stages)
    return args


def build_pipeline(args, run):
    """The pipeline that is trained; a resumed run takes the autoencoder that holds the latents' statistics."""
    source = args.pretrained_model_name_or_path
    is_pq = DiffusionPipeline.load_config(source)["vae"][-1] == "PQModel"
    source_class = StableDiffusionPQPipeline if is_pq else StableDiffusionPipeline
    pipeline = source_class.from_pretrained(source, safety_checker=None)
    saved = Path(args.output_dir, "vae")
    if run.checkpoint is not None:
        vae = load_autoencoder(str(saved))
    else:
        vae = load_autoencoder(args.vae_name_or_path) if args.vae_name_or_path else pipeline.vae
    components = {name: getattr(pipeline, name) for name in pipeline.components} | {"vae": vae.requires_grad_(False)}
    components["unet"] = build_unet(args, pipeline.unet, vae.config.latent_channels)
    components["scheduler"] = DDPMScheduler.from_config(pipeline.scheduler.config)
    pipeline_class = StableDiffusionPQPipeline if isinstance(vae, PQModel) else StableDiffusionPipeline
    factor = downsampling_factor(vae)
    for stage in args.stages:
        if stage.resolution % factor:
            raise ValueError(
                f"--stages: {stage.resolution} must be a multiple of the downsampling factor F = {factor}."
            )
    components["unet"].register_to_config(sample_size=args.stages[-1].resolution // factor)
    return pipeline_class(**components, requires_safety_checker=False)


def build_unet(args, unet, latent_channels):
    if args.unet_init == "random":
        channels = {"in_channels": latent_channels, "out_channels": latent_channels}
        unet = type(unet).from_config(unet.config, **channels)
    elif unet.config.in_channels != latent_channels:
        unet = widen_unet(unet, latent_channels, args.unet_init)
    if args.lora_rank:
        # alpha = rank: the scale is then 1 whatever the rank.
        rank = {"r": args.lora_rank, "lora_alpha": args.lora_rank}
        unet.add_adapter(LoraConfig(**rank, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.channels_last:
        unet.to(memory_format=torch.channels_last)
    if args.compile:
        unet.compile()
    return unet.train()


def load_split(args, split):
    source = args.dataset_name, args.train_data_dir, args.image_column, split
    options = args.dataset_config_name, args.cache_dir, args.streaming
    return load_images(*source, *options, other_columns=(args.caption_column,))


def load_training_data(args, pipeline, resolution):
    """The rows to train on at a resolution, and the transform that makes examples of them."""
    prompts = Prompts(args.caption_column, pipeline.tokenizer, args.proportion_empty_prompts)
    if args.latents_dir:
        return load_cached_codes(args.latents_dir, resolution, pipeline.vae, prompts)
    images = load_split(args, "train")
    if images is None:
        raise ValueError("The dataset has no `train` split.")
    column, sides = args.image_column, args.min_image_side
    return images, CaptionedCrops(column, resolution, prompts, args.center_crop, args.random_flip, sides)


def latents_of(vae, batch):
    """Unscaled latents of a batch of pictures or of cached codes."""
    if "codes" in batch:
        return vae.quantizer.lookup(batch["codes"].to(vae.device))
    return encode_latents(vae, batch["pixel_values"])


def measure_statistics(args, pipeline):
    """Of the run's first pictures, at the resolution of the last stage."""
    rows, transform = load_training_data(args, pipeline, args.stages[-1].resolution)
    batches = first_batches(rows, transform, args.train_batch_size, None, args.seed, args.shuffle_buffer)
    count = math.ceil(args.num_statistics_images / args.train_batch_size)
    set_latent_statistics(pipeline.vae, (latents_of(pipeline.vae, batch) for batch in islice(batches, count)))


def build_trainer(args, accelerator, pipeline):
    denoiser = ConditionalDenoiser(pipeline.unet, pipeline.text_encoder, args.train_text_encoder)
    learned = denoiser.learned_parameters()
    optimizer = torch.optim.AdamW(
        learned,
        args.stages[0].learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        fused=True,
    )
    lr_scheduler = build_lr_scheduler(args, optimizer, accelerator.num_processes)
    prepared = accelerator.prepare(denoiser, optimizer, lr_scheduler)
    ema = None
    if args.use_ema:
        learned = accelerator.unwrap_model(prepared[0]).learned_parameters()
        ema = EMAModel(learned, decay=args.ema_decay, use_ema_warmup=True)
        ema.to(accelerator.device)
        accelerator.register_for_checkpointing(ema)
    limits = args.max_grad_norm, args.max_skipped_steps
    weights = channel_weights(pipeline.vae, args.channel_weighting)
    return DenoiserTrainer(accelerator, *prepared, pipeline.scheduler, args.snr_gamma, *limits, ema, weights)


def build_lr_scheduler(args, optimizer, num_processes):
    """`--lr_scheduler` over the whole run, times each stage's learning rate."""
    # The schedulers of accelerate take one step per process at each optimisation step.
    warm_up, steps = args.lr_warmup_steps * num_processes, args.max_train_steps * num_processes
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, num_warmup_steps=warm_up, num_training_steps=steps)
    (whole_run,) = lr_scheduler.lr_lambdas
    first = args.stages[0].learning_rate

    def factor(step):
        return whole_run(step) * find_stage(args.stages, step // num_processes).learning_rate / first

    lr_scheduler.lr_lambdas = [factor]
    return lr_scheduler


def samples_seen(args, accelerator, step):
    """By all processes together."""
    return step * args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def build_loader(args, accelerator, data, step):
    return build_train_loader(
        *data,
        accelerator,
        args.train_batch_size,
        seed=args.seed,
        start=samples_seen(args, accelerator, step),
        shuffle_buffer=args.shuffle_buffer,
        num_workers=args.dataloader_num_workers,
        on_bad_image=args.on_bad_image,
    )


def build_validation(args, accelerator, pipeline):
    images = load_split(args, "validation")
    if images is None:
        logger.warning("The dataset has no `validation` split: no validation loss.")
        return None
    rows = usable_rows(images, args.image_column, args.num_validation_images)
    if not rows:
        logger.warning("No picture of the `validation` split can be used: no validation loss.")
        return None
    prompts = Prompts(args.caption_column, pipeline.tokenizer)
    crops = CaptionedCrops(args.image_column, args.stages[-1].resolution, prompts, center_crop=True, min_image_side=1)
    weights = channel_weights(pipeline.vae, args.channel_weighting)
    vae, scheduler = pipeline.vae, pipeline.scheduler
    return DenoisingValidation(accelerator, rows, crops, vae, scheduler, args.train_batch_size, weights)


def optimisation_step(trainer, pipeline, batches):
    """Batches until an optimisation step is complete; returns its logs."""
    while True:
        batch = next(batches)
        # Not in mixed precision: the latents are those that `encode_dataset.py` writes.
        latents = scale_latents(pipeline.vae, latents_of(pipeline.vae, batch))
        logs = trainer.step(latents, batch["input_ids"].to(latents.device))
        if logs is not None:
            return logs


def validate(args, run, trainer, pipeline, validation):
    """Validation loss, and pictures of the prompts, with the averaged weights if there are."""
    denoiser = trainer.accelerator.unwrap_model(trainer.denoiser)
    with ema_weights(trainer.ema, denoiser.learned_parameters()):
        if validation is not None:
            scores = validation.evaluate(trainer.denoiser)
            run.log_scores(scores)
            run.keep_if_best(partial(save_pipeline, args, trainer, pipeline), scores)
        if args.validation_prompts and run.accelerator.is_main_process:
            run.log_images(paint(args, pipeline), images_per_row=4)


def paint(args, pipeline):
    """A picture of each validation prompt, uint8 `[N, 3, H, W]`."""
    pipeline.unet.eval()
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(args.seed + number) for number in range(len(args.validation_prompts))]
    images = pipeline(args.validation_prompts, generator=generators, output_type="pt").images
    pipeline.unet.train()
    return (images * 255).round().to(torch.uint8).cpu()


def save_pipeline(args, trainer, pipeline, folder):
    """The whole pipeline, or with `--lora_rank` what has been trained of it and the autoencoder."""
    unet = whole_module(trainer.accelerator, trainer.denoiser, "unet")
    text_encoder = whole_module(trainer.accelerator, trainer.denoiser, "text_encoder")
    if not trainer.accelerator.is_main_process:
        return
    if args.lora_rank:
        save_lora(unet, type(pipeline), folder)
        pipeline.vae.save_pretrained(Path(folder, "vae"))
    else:
        parts = pipeline.components | {"unet": unet, "text_encoder": text_encoder}
        type(pipeline)(**parts, requires_safety_checker=False).save_pretrained(folder)


def main(args):
    handlers = []
    if any(stage.trained == "conv" for stage in args.stages):
        # Frozen parameters get no gradient in a stage that trains the first and last convolution only.
        handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    accelerator = create_accelerator(args, handlers)
    if accelerator.distributed_type == DistributedType.FSDP and (args.lora_rank or args.validation_prompts):
        raise ValueError(
            "--lora_rank and --validation_prompts need a whole UNet in each process: launch without FSDP."
        )
    run = TrainingRun(args, accelerator, BestModel(args.output_dir, "loss", lower_is_better=True))
    pipeline = build_pipeline(args, run)
    pipeline.vae.to(accelerator.device)
    if run.checkpoint is None:
        measure_statistics(args, pipeline)
    trainer = build_trainer(args, accelerator, pipeline)
    denoiser = accelerator.unwrap_model(trainer.denoiser)
    # A dry run measures the last stage, which takes the most time and memory.
    stage = args.stages[-1] if args.dry_run else find_stage(args.stages, run.step)
    denoiser.train_only(stage.trained)
    loader = build_loader(args, accelerator, load_training_data(args, pipeline, stage.resolution), run.step)
    if args.dry_run:
        batches = iter(loader)
        parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder, "vae": pipeline.vae}
        dry_run(args, accelerator, parts, [trainer.optimizer], lambda: optimisation_step(trainer, pipeline, batches))
        return
    validation = build_validation(args, accelerator, pipeline)
    run.start()
    if accelerator.is_main_process and run.checkpoint is None:
        pipeline.vae.save_pretrained(Path(args.output_dir, "vae"))
    if trainer.ema is not None:
        trainer.ema.to(accelerator.device)  # a resumed average comes on the CPU

    batches = iter(loader)
    while not run.is_finished:
        if find_stage(args.stages, run.step) is not stage:
            stage = find_stage(args.stages, run.step)
            denoiser.train_only(stage.trained)
            data = load_training_data(args, pipeline, stage.resolution)
            change_data(loader, *data, samples_seen(args, accelerator, run.step))
            batches = iter(loader)
        logs = optimisation_step(trainer, pipeline, batches)
        run.advance()
        if run.is_due(args.logging_steps):
            logs |= {"lr": trainer.lr_scheduler.get_last_lr()[0], "resolution": stage.resolution}
            logs |= {
                "skipped_steps": trainer.steps.skipped,
                "skipped_images": loader.dataset.bad_images.total(accelerator),
            }
            run.log(logs)
        if run.is_due(args.checkpointing_steps) and not trainer.steps.in_a_row:
            run.save_checkpoint()
        if run.is_due(args.validation_steps):
            validate(args, run, trainer, pipeline, validation)
    with ema_weights(trainer.ema, denoiser.learned_parameters()):
        run.finish(partial(save_pipeline, args, trainer, pipeline))


if __name__ == "__main__":
    main(parse_args())
