"""The run of a denoiser on latents, whatever it is conditioned on: what `train_pqsd.py` and `train_ldm.py` share."""

import argparse
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import torch
import torch.nn as nn
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

from ..autoencoders import channel_weights, encode_latents, scale_latents, set_latent_statistics
from ..data.latent_cache import load_cached_codes
from ..data.loaders import build_train_loader, change_data, first_batches
from ..data.pictures import ClassLabels, ConditionedCrops, Prompts, load_images, usable_rows
from .noise import DenoiserTrainer, Stage, find_stage
from .run import TrainingRun, build_lr_scheduler, dry_run
from .validation import DenoisingValidation, ema_weights


logger = logging.getLogger(__name__)


@dataclass
class DenoiserTask:
    """
    What a script trains.

    Args:
        denoiser (`nn.Module`): Its forward takes noisy latents, timesteps and conditions and gives a prediction; its
            `learned_parameters` are trained.
        vae (`nn.Module`): See [`encode_latents`].
        scheduler: See [`denoising_loss`].
        stages (`list[Stage]`): Of the run, one after the other.
        condition_column (`str`): Of the dataset.
        condition ([`Prompts`] or [`ClassLabels`]): Of the pictures that are trained on.
        validation_condition ([`Prompts`] or [`ClassLabels`]): Of those that are validated on.
        save: Writes the trained model; takes the trainer and a folder and is called by all processes.
        paint: Makes uint8 pictures `[N, 3, H, W]` for the log; called by the main process, or `None`.
        start_stage: Called with the denoiser and a stage at the stage's beginning.
        weighting_scheme (`str`): See [`draw_timesteps`].
        parts (`dict[str, nn.Module]`): That a dry run counts, by name.
    """

    denoiser: nn.Module
    vae: nn.Module
    scheduler: object
    stages: list[Stage]
    condition_column: str
    condition: Prompts | ClassLabels
    validation_condition: Prompts | ClassLabels
    save: Callable[[DenoiserTrainer, Path], object]
    paint: Callable[[], torch.Tensor] | None = None
    start_stage: Callable[[nn.Module, Stage], object] = lambda denoiser, stage: None
    weighting_scheme: str = "none"
    parts: dict[str, nn.Module] = field(default_factory=dict)


def train_denoiser(args: argparse.Namespace, accelerator: Accelerator, run: TrainingRun, task: DenoiserTask):
    """
    Train, validate, keep checkpoints and write the trained model; or do a dry run. To be called by all processes.

    Args:
        args (`argparse.Namespace`): With the flags of `arguments.py`.
        accelerator (`Accelerator`)
        run ([`TrainingRun`])
        task ([`DenoiserTask`])

    Raises:
        ValueError: if the flags contradict each other.
    """
    if args.snr_gamma is not None and args.rescale_betas_zero_snr:
        raise ValueError(
            "--snr_gamma leaves the last timestep of --rescale_betas_zero_snr untrained: give one of them."
        )
    task.vae.to(accelerator.device)
    if run.checkpoint is None and args.num_statistics_images:
        _measure_statistics(args, task)
    trainer = _build_trainer(args, accelerator, task)
    denoiser = accelerator.unwrap_model(trainer.denoiser)
    # A dry run measures the last stage, which takes the most time and memory.
    stage = task.stages[-1] if args.dry_run else find_stage(task.stages, run.step)
    task.start_stage(denoiser, stage)
    loader = _build_loader(args, accelerator, load_training_data(args, task, stage.resolution), run.step)
    if args.dry_run:
        batches = iter(loader)
        dry_run(args, accelerator, task.parts, [trainer.optimizer], lambda: _take_step(trainer, task.vae, batches))
        return
    validation = _build_validation(args, accelerator, task)
    run.start()
    vae_folder = Path(args.output_dir, "vae")
    is_there = run.checkpoint is not None and saved_autoencoder(args, run).resolve() == vae_folder.resolve()
    if accelerator.is_main_process and not is_there:
        task.vae.save_pretrained(vae_folder)
    if trainer.ema is not None:
        trainer.ema.to(accelerator.device)  # a resumed average comes on the CPU

    batches = iter(loader)
    while not run.is_finished:
        if find_stage(task.stages, run.step) is not stage:
            stage = find_stage(task.stages, run.step)
            task.start_stage(denoiser, stage)
            data = load_training_data(args, task, stage.resolution)
            change_data(loader, *data, _samples_seen(args, accelerator, run.step))
            batches = iter(loader)
        logs = _take_step(trainer, task.vae, batches)
        run.advance()
        if run.is_due(args.logging_steps):
            logs |= {"lr": trainer.lr_scheduler.get_last_lr()[0], "resolution": stage.resolution}
            logs |= {
                "skipped_steps": trainer.steps.skipped,
                "skipped_images": loader.dataset.bad_images.total(accelerator),
            }
            run.log(logs)
        # Before the checkpoint, which keeps the state of the random numbers that a validation draws.
        if run.is_due(args.validation_steps):
            _validate(run, trainer, task, validation)
        if run.is_due(args.checkpointing_steps) and not trainer.steps.in_a_row:
            run.save_checkpoint()
    with ema_weights(trainer.ema, denoiser.learned_parameters()):
        run.finish(partial(task.save, trainer))


def saved_autoencoder(args: argparse.Namespace, run: TrainingRun) -> Path:
    """The folder of the autoencoder, with the latents' statistics, of the run that is resumed."""
    beside = run.checkpoint.parent / "vae"  # another run's, if its checkpoint was named
    return beside if beside.is_dir() else Path(args.output_dir, "vae")


def load_split(
    args: argparse.Namespace, split: str, column: str
) -> datasets.Dataset | datasets.IterableDataset | None:
    """A split with the pictures and one more column; see [`load_images`]."""
    source = args.dataset_name, args.train_data_dir, args.image_column, split
    return load_images(*source, args.dataset_config_name, args.cache_dir, args.streaming, other_columns=(column,))


def load_train_split(args: argparse.Namespace, column: str) -> datasets.Dataset | datasets.IterableDataset:
    """[`load_split`] of what is trained on; a `ValueError` if there is none."""
    images = load_split(args, "train", column)
    if images is None:
        raise ValueError("The dataset has no `train` split.")
    return images


def load_training_data(args: argparse.Namespace, task: DenoiserTask, resolution: int) -> tuple:
    """The rows to train on at a resolution, and the transform that makes examples of them."""
    if args.latents_dir:
        return load_cached_codes(args.latents_dir, resolution, task.vae, task.condition, args.cache_dir)
    images = load_train_split(args, task.condition_column)
    options = args.center_crop, args.random_flip, args.min_image_side
    return images, ConditionedCrops(args.image_column, resolution, task.condition, *options)


def check_resolution(name: str, resolution: int, factor: int):
    """Raise a `ValueError` if pictures of this side have no whole latents; `name` is that of the flag."""
    if resolution % factor:
        raise ValueError(f"{name}: {resolution} must be a multiple of the downsampling factor F = {factor}.")


def prepare_model(args: argparse.Namespace, model: nn.Module) -> nn.Module:
    """A diffusers model in training mode, with what the flags on memory and speed ask for."""
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.compile:
        model.compile()
    return model.train()


def paint_each(args: argparse.Namespace, model: nn.Module, pipeline: Callable, inputs: list) -> torch.Tensor:
    """A picture of each input of a pipeline, uint8 `[N, 3, H, W]`; `model`, its denoiser, is left in training mode."""
    model.eval()
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(args.seed + number) for number in range(len(inputs))]
    images = pipeline(inputs, generator=generators, output_type="pt").images
    model.train()
    return (images * 255).round().to(torch.uint8).cpu()


def _latents_of(vae: nn.Module, batch: dict) -> torch.Tensor:
    """Unscaled latents of a batch of pictures or of cached codes."""
    if "codes" in batch:
        return vae.quantizer.lookup(batch["codes"].to(vae.device))
    return encode_latents(vae, batch["pixel_values"])


def _measure_statistics(args, task):
    """Of the run's first pictures, at the resolution of the last stage."""
    rows, transform = load_training_data(args, task, task.stages[-1].resolution)
    batches = first_batches(rows, transform, args.train_batch_size, None, args.seed, args.shuffle_buffer)
    count = math.ceil(args.num_statistics_images / args.train_batch_size)
    set_latent_statistics(task.vae, (_latents_of(task.vae, batch) for batch in islice(batches, count)))


def _build_trainer(args, accelerator, task) -> DenoiserTrainer:
    optimizer = torch.optim.AdamW(
        task.denoiser.learned_parameters(),
        task.stages[0].learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        fused=True,
    )
    lr_scheduler = _build_lr_scheduler(args, task.stages, optimizer, accelerator.num_processes)
    prepared = accelerator.prepare(task.denoiser, optimizer, lr_scheduler)
    ema = None
    if args.use_ema:
        learned = accelerator.unwrap_model(prepared[0]).learned_parameters()
        ema = EMAModel(learned, decay=args.ema_decay, use_ema_warmup=True)
        ema.to(accelerator.device)
        accelerator.register_for_checkpointing(ema)
    return DenoiserTrainer(
        accelerator,
        *prepared,
        task.scheduler,
        snr_gamma=args.snr_gamma,
        max_grad_norm=args.max_grad_norm,
        max_skipped_steps=args.max_skipped_steps,
        ema=ema,
        channel_weights=channel_weights(task.vae, args.channel_weighting),
        weighting_scheme=task.weighting_scheme,
    )


def _build_lr_scheduler(args, stages, optimizer, num_processes):
    """`--lr_scheduler` over the whole run, times each stage's learning rate."""
    lr_scheduler = build_lr_scheduler(args, optimizer, num_processes)
    (whole_run,) = lr_scheduler.lr_lambdas
    first = stages[0].learning_rate

    def factor(step):
        return whole_run(step) * find_stage(stages, step // num_processes).learning_rate / first

    lr_scheduler.lr_lambdas = [factor]
    return lr_scheduler


def _samples_seen(args, accelerator, step) -> int:
    """By all processes together."""
    return step * args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def _build_loader(args, accelerator, data, step) -> DataLoader:
    return build_train_loader(
        *data,
        accelerator,
        args.train_batch_size,
        seed=args.seed,
        start=_samples_seen(args, accelerator, step),
        shuffle_buffer=args.shuffle_buffer,
        num_workers=args.dataloader_num_workers,
        on_bad_image=args.on_bad_image,
    )


def _build_validation(args, accelerator, task) -> DenoisingValidation | None:
    images = load_split(args, "validation", task.condition_column)
    if images is None:
        logger.warning("The dataset has no `validation` split: no validation loss.")
        return None
    rows = usable_rows(images, args.image_column, args.num_validation_images)
    if not rows:
        logger.warning("No picture of the `validation` split can be used: no validation loss.")
        return None
    crops = {"center_crop": True, "min_image_side": 1}
    resolution = task.stages[-1].resolution
    transform = ConditionedCrops(args.image_column, resolution, task.validation_condition, **crops)
    weights = channel_weights(task.vae, args.channel_weighting)
    latents = task.vae, task.scheduler, args.train_batch_size, weights
    return DenoisingValidation(accelerator, rows, transform, *latents)


def _take_step(trainer, vae, batches) -> dict[str, torch.Tensor]:
    """Batches until an optimisation step is complete; returns its logs."""
    while True:
        batch = next(batches)
        # Not in mixed precision: the latents are those that `encode_dataset.py` writes.
        latents = scale_latents(vae, _latents_of(vae, batch))
        logs = trainer.step(latents, batch["condition"].to(latents.device))
        if logs is not None:
            return logs


def _validate(run, trainer, task, validation):
    """Validation loss, and pictures, with the averaged weights if there are."""
    denoiser = run.accelerator.unwrap_model(trainer.denoiser)
    with ema_weights(trainer.ema, denoiser.learned_parameters()):
        if validation is not None:
            scores = validation.evaluate(trainer.denoiser)
            run.log_scores(scores)
            run.keep_if_best(partial(task.save, trainer), scores)
        if task.paint is not None and run.accelerator.is_main_process:
            run.log_images(task.paint(), images_per_row=4)
