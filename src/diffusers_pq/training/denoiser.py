"""
How a denoiser is trained, whatever it is conditioned on and whether its noise is Gaussian or a mask: its objective,
stages, optimisation steps and the run.
"""

import argparse
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Protocol, Self

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import LabelEmbedding
from diffusers.training_utils import EMAModel, offload_models
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from ..autoencoders import (
    channel_weights,
    encode_latents,
    reused_latents,
    scale_latents,
    set_latent_statistics,
)
from ..data.conditions import ClassLabels, Prompts
from ..data.latent_cache import load_cached_codes
from ..data.loaders import build_train_loader, change_data, first_batches
from ..data.memory_cache import encode_in_memory
from ..data.pictures import BucketCrops, ConditionedCrops, Crops, usable_rows
from ..models.class_conditioning import predict
from ..models.widening import outer_layers
from .families import EncodedCaptions, Family
from .noise import denoising_loss
from .optimizers import build_optimizer
from .options import (
    ConditionedDataOptions,
    DenoiserDataOptions,
    DenoiserOptimisationOptions,
    DenoiserRunOptions,
    NoiseOptions,
    TrainingOptions,
)
from .run import (
    FiniteSteps,
    TrainingRun,
    build_ema,
    build_lr_scheduler,
    complete_step,
    count_steps,
    dry_run,
    ema_weights,
    first_samples,
    load_train_split,
    load_validation_split,
    share_out,
)


logger = logging.getLogger(__name__)

_STAGE = "RESOLUTION:STEPS:LEARNING_RATE:conv or ...:all"


@dataclass
class Stage:
    """
    A part of a run with settings of its own (a row of Table 4).

    Args:
        resolution (`int`): Side of the square pictures, in pixels.
        steps (`int`): Optimisation steps.
        learning_rate (`float`)
        trained (`str`): `"conv"`, only the first and last convolution, or `"all"`.
    """

    resolution: int
    steps: int
    learning_rate: float
    trained: str

    def __post_init__(self):
        if self.resolution < 1 or self.steps < 1 or not 0 <= self.learning_rate < math.inf:
            raise ValueError(
                f"a stage needs a resolution and steps of at least 1 and a learning rate of at least 0, but is {self}"
            )

    @classmethod
    def parse(cls, text: str) -> "Stage":
        """
        A stage as a command line writes it, such as `384:20000:8e-5:conv`.

        Raises:
            ValueError: if there are not four parts, or a part is invalid.
        """
        parts = text.split(":")
        if len(parts) != 4:
            raise ValueError(f"a stage is {_STAGE}, but one is {text!r}")
        return cls._of(parts, text)

    @classmethod
    def of(cls, mapping: Mapping[str, str]) -> "Stage":
        """
        A stage as a recipe writes it, such as `{resolution: 384, steps: 20000, learning_rate: 8e-5, trained: conv}`.

        Raises:
            ValueError: if there are not these four entries, or one is invalid.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(mapping, Mapping) or mapping.keys() != set(names):
            raise ValueError(f"a stage has {', '.join(names)}, but one is {mapping!r}")
        return cls._of([mapping[name] for name in names], mapping)

    @classmethod
    def _of(cls, parts, source) -> "Stage":
        resolution, steps, learning_rate, trained = parts
        if trained not in ("conv", "all"):
            raise ValueError(f"a stage is {_STAGE}, but one is {source!r}")
        try:
            return cls(int(resolution), int(steps), float(learning_rate), trained)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source!r} is not a stage: {error}") from None

    def __str__(self) -> str:
        return f"{self.resolution}:{self.steps}:{self.learning_rate}:{self.trained}"


def parse_stages(stages: str | list) -> tuple[Stage, ...]:
    """
    The stages of a command line, one string with spaces between them, or of a recipe, a list of mappings or strings.

    Raises:
        argparse.ArgumentTypeError: if there is none, or one is invalid.
    """
    parts = stages.split() if isinstance(stages, str) else stages
    try:
        if not isinstance(parts, list) or not parts:
            raise ValueError(f"there must be one or more, but there is {stages!r}")
        return tuple(Stage.parse(part) if isinstance(part, str) else Stage.of(part) for part in parts)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def find_stage(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that goes on after `step` steps of the run; beyond the last one, the last."""
    for stage, end in zip(stages, accumulate(stage.steps for stage in stages)):
        if step < end:
            return stage
    return stages[-1]


class ConditionalDenoiser(nn.Module):
    """
    A text-conditioned denoiser and its text encoders, so that one forward gives all that a training step needs.

    Both are its attributes, by the names of the pipeline's components. Text encoders that are not trained are not part
    of its state.

    Args:
        family ([`Family`])
        denoiser (`nn.Module`)
        text_encoders (`dict[str, nn.Module]`): By the names of their components.
        train_text_encoders (`bool`): All but those that the family calls optional.
        offload (`bool`): Whether text encoders that are not trained wait on their own device until they are needed.
    """

    def __init__(
        self,
        family: Family,
        denoiser: nn.Module,
        text_encoders: Mapping[str, nn.Module],
        train_text_encoders: bool = False,
        offload: bool = False,
    ):
        super().__init__()
        self.family, self.offload = family, offload
        self.captions: EncodedCaptions | None = None
        self._outer = tuple(f"{layer}." for layer in outer_layers(denoiser))
        setattr(self, family.denoiser_name, denoiser)
        trained = {*family.text_encoders} - {*family.optional_text_encoders} if train_text_encoders else {}
        for name in trained:
            setattr(self, name, text_encoders[name].requires_grad_(True))
        self.trained_text_encoders = {name: text_encoders[name] for name in text_encoders if name in trained}
        self.frozen_text_encoders = {
            name: encoder.requires_grad_(False).eval()
            for name, encoder in text_encoders.items()
            if name not in trained
        }
        self.register_load_state_dict_pre_hook(_leave_out_frozen)

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self, self.family.denoiser_name)

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Mapping[str, dict]) -> torch.Tensor:
        """
        The prediction for noisy latents, both `[B, d, h, w]`, at timesteps `[B]`.

        Args:
            condition (`dict`): `tokens`, see [`Family.tokenize`], or `caption`, numbers of captions that have been
                encoded before; and `sizes` where the family takes them.
        """
        if "caption" in condition:
            states = self.captions.of(condition["caption"])
        else:
            states = self.encode(condition["tokens"], noisy.device)
        states = {name: value.to(noisy.dtype) for name, value in states.items()}
        return self.family.predict(self.denoiser, noisy, timesteps, states, condition.get("sizes"))

    def encode(self, tokens: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        """See [`Family.encode`]; tokens are on `device`."""
        with offload_models(*self.frozen_text_encoders.values(), device=device, offload=self.offload):
            return self.family.encode(self.frozen_text_encoders | self.trained_text_encoders, tokens)

    def train_only(self, trained: str):
        """Let gradients reach the first and last layer only (`"conv"`), or all that is learned (`"all"`)."""
        self.denoiser.requires_grad_(False)
        for name, parameter in self._learned_in_denoiser():
            parameter.requires_grad_(trained == "all" or name.startswith(self._outer))

    def learned_parameters(self) -> list[nn.Parameter]:
        """Those that some stage trains."""
        learned = [parameter for _, parameter in self._learned_in_denoiser()]
        for encoder in self.trained_text_encoders.values():
            learned += encoder.parameters()
        return learned

    def _learned_in_denoiser(self) -> list[tuple[str, nn.Parameter]]:
        """All of the denoiser; with LoRA layers in it, these and the first and last layer."""
        named = list(self.denoiser.named_parameters())
        if not any("lora_" in name for name, _ in named):
            return named
        return [(name, parameter) for name, parameter in named if "lora_" in name or name.startswith(self._outer)]


def _leave_out_frozen(module: ConditionalDenoiser, state_dict: dict, prefix: str, *_):
    # Earlier checkpoints hold text encoders that are not trained.
    frozen = tuple(f"{prefix}{name}." for name in module.frozen_text_encoders)
    for name in [name for name in state_dict if name.startswith(frozen)]:
        del state_dict[name]


class ClassConditionalDenoiser(nn.Module):
    """
    A denoiser that is given class labels.

    Args:
        denoiser (`UNet2DConditionModel` or `DiTTransformer2DModel`): See [`create_class_conditional_denoiser`].
    """

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser = denoiser
        for module in denoiser.modules():
            if isinstance(module, LabelEmbedding):
                # Each block of DiT would drop labels for itself, so that hardly a sample were without one in all.
                module.dropout_prob = 0.0

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
        """The prediction for noisy latents, both `[B, d, h, w]`, at timesteps `[B]`, given labels `[B]`."""
        return predict(self.denoiser, noisy, timesteps, labels)

    def learned_parameters(self) -> list[nn.Parameter]:
        return list(self.denoiser.parameters())


def save_lora(denoiser: nn.Module, pipeline_class: type, folder: str | os.PathLike, name: str = "unet"):
    """
    Write a denoiser's LoRA layers, with its first and last layer in full, for `load_lora_weights` of our pipelines.

    Args:
        denoiser (`nn.Module`): With an adapter of peft.
        pipeline_class: The pipeline that the adapter is for.
        folder: Gets a `pytorch_lora_weights.safetensors`.
        name (`str`): Of the denoiser among the pipeline's components.
    """
    layers = get_peft_model_state_dict(denoiser)
    if name == "unet":  # in diffusers' own names, as ever; transformers keep those of peft
        layers = convert_state_dict_to_diffusers(layers)
    outer = tuple(f"{layer}." for layer in outer_layers(denoiser))
    layers |= {key: value for key, value in denoiser.state_dict().items() if key.startswith(outer)}
    metadata = denoiser.peft_config["default"].to_dict()
    pipeline_class.save_lora_weights(
        folder, **{f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": metadata}
    )


class Objective(Protocol):
    """What is learned from a batch; `inputs` and `condition` of the batch go to `losses`."""

    def inputs(self, batch: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
        """What the model learns from, of a batch with `pixel_values` or `codes`, on a device."""

    def losses(
        self, model: nn.Module, inputs: torch.Tensor, condition, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """The loss of each example, `[B]`."""

    def for_validation(self) -> Self:
        """The same without what only helps the training."""


@dataclass
class DenoisingObjective:
    """
    To denoise latents.

    Args:
        vae (`nn.Module`): See [`encode_latents`]; its statistics are set before the first loss.
        scheduler: See [`denoising_loss`].
        channel_weighting (`float`): See [`channel_weights`].
        snr_gamma (`float`, *optional*): See [`denoising_loss`].
        weighting_scheme (`str`): See [`draw_timesteps`].
        noise_offset, input_perturbation (`float`): See [`denoising_loss`].
    """

    vae: nn.Module
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler
    channel_weighting: float = 0.0
    snr_gamma: float | None = None
    weighting_scheme: str = "none"
    noise_offset: float = 0.0
    input_perturbation: float = 0.0

    @classmethod
    def of(cls, noise: NoiseOptions, vae: nn.Module, scheduler, weighting_scheme: str) -> Self:
        """
        The objective that options ask for.

        Raises:
            ValueError: if options contradict each other.
        """
        if noise.snr_gamma is not None and noise.rescale_betas_zero_snr:
            raise ValueError(
                "--snr_gamma leaves the last timestep of --rescale_betas_zero_snr untrained: give one of them."
            )
        return cls(
            vae,
            scheduler,
            noise.channel_weighting,
            noise.snr_gamma,
            weighting_scheme,
            noise.noise_offset,
            noise.input_perturbation,
        )

    @cached_property
    def _channel_weights(self) -> torch.Tensor | None:
        return channel_weights(self.vae, self.channel_weighting)

    def inputs(self, batch: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
        """Normalised latents `[B, d, h, w]`."""
        return scale_latents(self.vae, latents_of(self.vae, batch, device))

    def losses(
        self, model: nn.Module, inputs: torch.Tensor, condition, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """See [`denoising_loss`]."""
        return denoising_loss(
            model,
            self.scheduler,
            inputs,
            condition,
            snr_gamma=self.snr_gamma,
            channel_weights=self._channel_weights,
            generator=generator,
            weighting_scheme=self.weighting_scheme,
            noise_offset=self.noise_offset,
            input_perturbation=self.input_perturbation,
        )

    def for_validation(self) -> Self:
        """All timesteps have the same weight, and noise is plain."""
        return DenoisingObjective(self.vae, self.scheduler, self.channel_weighting)


@contextmanager
def fetched(vae: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """An autoencoder on a device, to which it is fetched for the moment if it waits elsewhere."""
    with offload_models(vae, device=device, offload=vae.device.type != device.type):
        yield vae


def latents_of(vae: nn.Module, batch: dict, device: torch.device) -> torch.Tensor:
    """Unscaled latents of a batch of pictures or of what was encoded of them, on a device."""
    latents = reused_latents(vae, batch, device)
    if latents is not None:
        return latents
    with fetched(vae, device):
        return encode_latents(vae, batch["pixel_values"])


class DenoiserTrainer:
    """
    A denoiser and what a step does with it.

    Args:
        accelerator (`Accelerator`)
        denoiser, optimizer, lr_scheduler: Prepared by the accelerator.
        objective ([`Objective`])
        max_grad_norm (`float`, *optional*): See [`FiniteSteps`].
        max_skipped_steps (`int`): See [`FiniteSteps`].
        ema (`EMAModel`, *optional*): Of the denoiser's `learned_parameters`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        denoiser: nn.Module,
        optimizer,
        lr_scheduler,
        objective: Objective,
        max_grad_norm: float | None = None,
        max_skipped_steps: int = 10,
        ema: EMAModel | None = None,
    ):
        self.accelerator = accelerator
        self.denoiser, self.optimizer, self.lr_scheduler = denoiser, optimizer, lr_scheduler
        self.objective = objective
        self.steps = FiniteSteps(accelerator, max_grad_norm, max_skipped_steps)
        self.ema = ema

    @property
    def schedules(self) -> list[tuple]:
        """Optimisers, each with its scheduler."""
        return [(self.optimizer, self.lr_scheduler)]

    def step(self, inputs: torch.Tensor, condition: torch.Tensor | Mapping) -> dict[str, torch.Tensor] | None:
        """
        Learn from one batch, as the objective prepares it; returns what to log, `None` while gradients are being
        accumulated.
        """
        with self.accelerator.accumulate(self.denoiser):
            loss = self.objective.losses(self.denoiser, inputs, condition).mean()
            self.accelerator.backward(loss)
            self.steps.step(self.optimizer, self.denoiser.parameters())
            self.lr_scheduler.step()
        if not self.accelerator.sync_gradients:
            return None
        if self.ema is not None:
            self.ema.step(self.accelerator.unwrap_model(self.denoiser).learned_parameters())
        return {"loss": loss.detach()}


class DenoisingValidation:
    """
    Measures the loss on held-out pictures, with the same noise each time.

    Args:
        accelerator (`Accelerator`): The pictures are shared out among its processes.
        rows (`list[dict]`): What [`usable_rows`] returns, the same in every process.
        transform: Makes an example from a row and a `random.Random`, such as [`ConditionedCrops`].
        objective ([`Objective`])
        batch_size (`int`): Per process.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        rows: list[dict],
        transform: Callable,
        objective: Objective,
        batch_size: int,
    ):
        self.accelerator = accelerator
        self.objective = objective
        rows, self.count = share_out(rows, accelerator)
        examples = [transform(row, random.Random(number)) for number, row in enumerate(rows)]
        self.loader = DataLoader(examples, batch_size=batch_size)

    @torch.no_grad()
    def evaluate(self, denoiser: nn.Module) -> dict[str, float]:
        """The mean `loss` of a denoiser, prepared or bare; to be called by all processes."""
        device = self.accelerator.device
        generator = torch.Generator().manual_seed(self.accelerator.process_index)
        mean = MeanMetric().to(device)
        was_training = denoiser.training
        denoiser.eval()
        remaining = self.count
        for batch in self.loader:
            condition = send_to_device(batch["condition"], device)
            losses = self.objective.losses(denoiser, self.objective.inputs(batch, device), condition, generator)
            mean.update(losses[:remaining])
            remaining = max(0, remaining - len(losses))
        denoiser.train(was_training)
        return {"loss": float(mean.compute())}


@dataclass(kw_only=True)
class DenoiserOptions(TrainingOptions):
    """What every training of a denoiser has."""

    data: ConditionedDataOptions
    optim: DenoiserOptimisationOptions
    run: DenoiserRunOptions


@dataclass
class DenoiserTask:
    """
    What a script trains.

    Args:
        denoiser (`nn.Module`): Its forward is called by the objective; its `learned_parameters` are trained.
        vae (`nn.Module`): See [`encode_latents`].
        objective ([`Objective`])
        stages (`Sequence[Stage]`): Of the run, one after the other.
        condition_column (`str`): Of the dataset.
        condition ([`Prompts`] or [`ClassLabels`]): Of the pictures that are trained on.
        validation_condition ([`Prompts`] or [`ClassLabels`]): Of those that are validated on.
        save: Writes the trained model; takes the trainer and a folder and is called by all processes.
        paint: Makes uint8 pictures `[N, 3, H, W]` for the log; called by the main process, or `None`.
        start_stage: Called with the denoiser and a stage at the stage's beginning.
        with_sizes (`bool`): Whether conditions hold sizes, see [`ConditionedCrops`].
        parts (`dict[str, nn.Module]`): That a dry run counts, by name.
        offloaded (`tuple[nn.Module, ...]`): What stays on the CPU until pictures are generated, beside the `vae`.
        buckets:
            Makes the sizes of the pictures of a resolution, see
            [`~diffusers_pq.data.pictures.aspect_ratio_buckets`]; `None` for squares.
    """

    denoiser: nn.Module
    vae: nn.Module
    objective: Objective
    stages: Sequence[Stage]
    condition_column: str
    condition: Prompts | ClassLabels
    validation_condition: Prompts | ClassLabels
    save: Callable[[DenoiserTrainer, Path], object]
    paint: Callable[[], torch.Tensor] | None = None
    start_stage: Callable[[nn.Module, Stage], object] = lambda denoiser, stage: None
    with_sizes: bool = False
    parts: dict[str, nn.Module] = field(default_factory=dict)
    offloaded: tuple[nn.Module, ...] = ()
    buckets: Callable[[int], list[tuple[int, int]] | None] = lambda resolution: None


def train_denoiser(options: DenoiserOptions, accelerator: Accelerator, run: TrainingRun, task: DenoiserTask):
    """
    Train, validate, keep checkpoints and write the trained model; or do a dry run. To be called by all processes.

    Args:
        options ([`DenoiserOptions`])
        accelerator (`Accelerator`)
        run ([`TrainingRun`])
        task ([`DenoiserTask`])

    Raises:
        ValueError: if options contradict each other.
    """
    data = options.data
    if not options.optim.offload:
        task.vae.to(accelerator.device)
    if options.optim.num_train_epochs is not None:
        rows, _ = load_training_data(data, task, task.stages[-1].resolution)
        count_steps(options.optim, rows, options.optim.train_batch_size, accelerator)
    trainer = _build_trainer(options, accelerator, task)
    denoiser = accelerator.unwrap_model(trainer.denoiser)
    # A dry run measures the last stage, which takes the most time and memory.
    stage = task.stages[-1] if options.run.dry_run else find_stage(task.stages, run.step)
    task.start_stage(denoiser, stage)
    loader = _build_loader(options, accelerator, _load_stage(options, accelerator, task, stage), run.step)
    if options.run.dry_run:
        batches = iter(loader)
        dry_run(options, accelerator, task.parts, [trainer.optimizer], lambda: _take_step(trainer, batches))
        return
    validation = _build_validation(options, accelerator, task)
    run.start(trainer)
    vae_folder = Path(options.run.output_dir, "vae")
    is_own = run.checkpoint is not None and saved_autoencoder(run).resolve() == vae_folder.resolve()
    if accelerator.is_main_process and not (is_own and vae_folder.is_dir()):
        task.vae.save_pretrained(vae_folder)

    batches = iter(loader)
    while not run.is_finished:
        if find_stage(task.stages, run.step) is not stage:
            stage = find_stage(task.stages, run.step)
            task.start_stage(denoiser, stage)
            pictures = _load_stage(options, accelerator, task, stage)
            seen = _samples_seen(options.optim, accelerator, run.step)
            change_data(loader, *pictures, seen, pictures[1].groups(pictures[0]))
            batches = iter(loader)
        logs = _take_step(trainer, batches)
        run.advance()
        if run.is_due(options.run.logging_steps):
            logs |= {"lr": trainer.lr_scheduler.get_last_lr()[0], "resolution": stage.resolution}
            logs |= {
                "skipped_steps": trainer.steps.skipped,
                "skipped_images": loader.dataset.bad_images.total(accelerator),
            }
            run.log(logs)
        # Before the checkpoint, which keeps the state of the random numbers that a validation draws.
        if run.is_due(options.run.validation_steps):
            _validate(run, trainer, task, validation)
        if run.is_due(options.run.checkpointing_steps) and not trainer.steps.in_a_row:
            run.save_checkpoint()
    with ema_weights(trainer.ema, denoiser.learned_parameters()):
        run.finish(partial(task.save, trainer))


def saved_autoencoder(run: TrainingRun) -> Path:
    """The folder of the autoencoder, with the latents' statistics, of the run that is resumed."""
    beside = run.checkpoint.parent / "vae"  # another run's, if its checkpoint was named
    return beside if beside.is_dir() else Path(run.options.run.output_dir, "vae")


def load_training_data(
    data: ConditionedDataOptions,
    task: DenoiserTask,
    resolution: int,
    buckets: Sequence[tuple[int, int]] | None = None,
) -> tuple:
    """
    The rows to train on at a resolution, square or of the proportions of buckets, and the transform that makes
    examples of them.
    """
    if data.latents_dir:
        source = data.latents_dir, resolution, task.vae, task.condition, data.cache_dir
        codes, transform = load_cached_codes(*source, with_sizes=task.with_sizes)
        return first_samples(codes, data.max_train_samples), transform
    images = load_train_split(data, task.condition_column)
    options = {
        "image_interpolation_mode": data.image_interpolation_mode,
        "center_crop": data.center_crop,
        "random_flip": data.random_flip,
        "min_image_side": data.min_image_side,
    }
    if buckets:
        crops = BucketCrops(data.image_column, resolution, buckets=buckets, **options)
    else:
        crops = Crops(data.image_column, resolution, resize_mode=data.resize_mode, **options)
    return images, ConditionedCrops(crops, task.condition, task.with_sizes)


def _load_stage(options, accelerator, task, stage) -> tuple:
    """[`load_training_data`] of a stage, in buckets and encoded if options ask for it; a dry run encodes nothing."""
    data, optim = options.data, options.optim
    rows, transform = load_training_data(data, task, stage.resolution, task.buckets(stage.resolution))
    if not data.cache_latents or options.run.dry_run:
        return rows, transform
    with fetched(task.vae, accelerator.device):
        return encode_in_memory(
            task.vae, rows, transform, task.condition_column, accelerator, optim.train_batch_size, data.on_bad_image
        )


def paint_each(model: nn.Module, pipeline: Callable, argument: str, values: list, seed: int) -> torch.Tensor:
    """
    A picture of each value of a pipeline's argument, uint8 `[N, 3, H, W]`; `model`, its denoiser, is left in training
    mode.
    """
    model.eval()
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(values))]
    images = pipeline(**{argument: values}, generator=generators, output_type="pt").images
    model.train()
    return (images * 255).round().to(torch.uint8).cpu()


def measure_statistics(
    data: DenoiserDataOptions, optim: DenoiserOptimisationOptions, accelerator: Accelerator, run: TrainingRun, task
):
    """
    Set the statistics of the latents by the run's first pictures, at the resolution of the last stage; a run that is
    resumed has them.
    """
    if run.checkpoint is not None or not data.num_statistics_images:
        return
    rows, transform = load_training_data(data, task, task.stages[-1].resolution)
    batches = first_batches(rows, transform, optim.train_batch_size, None, optim.seed, data.shuffle_buffer)
    count = math.ceil(data.num_statistics_images / optim.train_batch_size)
    device = accelerator.device
    with fetched(task.vae, device):
        set_latent_statistics(task.vae, (latents_of(task.vae, batch, device) for batch in islice(batches, count)))


def _build_trainer(options, accelerator, task) -> DenoiserTrainer:
    optim = options.optim
    learned, learning_rate = task.denoiser.learned_parameters(), _highest_rate(task.stages)
    optimizer = build_optimizer(optim, learned, learning_rate, optim.adam_weight_decay)
    lr_scheduler = _build_lr_scheduler(optim, task.stages, optimizer)
    prepared = accelerator.prepare(task.denoiser, optimizer, lr_scheduler)
    ema = None
    if optim.use_ema:
        learned = accelerator.unwrap_model(prepared[0]).learned_parameters()
        ema = build_ema(optim, accelerator, learned)
        accelerator.register_for_checkpointing(ema)
    return DenoiserTrainer(
        accelerator,
        *prepared,
        task.objective,
        max_grad_norm=optim.max_grad_norm,
        max_skipped_steps=optim.max_skipped_steps,
        ema=ema,
    )


def _build_lr_scheduler(optim, stages, optimizer):
    """`--lr_scheduler` over the whole run, times each stage's share of the highest learning rate."""
    lr_scheduler = build_lr_scheduler(optim, optimizer)
    (whole_run,) = lr_scheduler.lr_lambdas
    highest = _highest_rate(stages) or 1.0
    lr_scheduler.lr_lambdas = [lambda step: whole_run(step) * find_stage(stages, step).learning_rate / highest]
    return lr_scheduler


def _highest_rate(stages) -> float:
    return max(stage.learning_rate for stage in stages)


def _samples_seen(optim, accelerator, step) -> int:
    """By all processes together."""
    return step * optim.train_batch_size * optim.gradient_accumulation_steps * accelerator.num_processes


def _build_loader(options, accelerator, pictures, step) -> DataLoader:
    data, optim = options.data, options.optim
    return build_train_loader(
        *pictures,
        accelerator,
        optim.train_batch_size,
        seed=optim.seed,
        start=_samples_seen(optim, accelerator, step),
        shuffle_buffer=data.shuffle_buffer,
        num_workers=data.dataloader_num_workers,
        prefetch_factor=data.dataloader_prefetch,
        on_bad_image=data.on_bad_image,
        groups=pictures[1].groups(pictures[0]),
    )


def _build_validation(options, accelerator, task) -> DenoisingValidation | None:
    data = options.data
    images = load_validation_split(data, task.condition_column)
    if images is None:
        return None
    rows = usable_rows(images, data.image_column, options.run.num_validation_images)
    if not rows:
        logger.warning("No picture of the validation can be used: no validation loss.")
        return None
    crops = data.validation_crops(task.stages[-1].resolution)
    transform = ConditionedCrops(crops, task.validation_condition, task.with_sizes)
    objective, batch_size = task.objective.for_validation(), options.optim.train_batch_size
    return DenoisingValidation(accelerator, rows, transform, objective, batch_size)


def _take_step(trainer, batches) -> dict[str, torch.Tensor]:
    def learn():
        batch = next(batches)
        # Not in mixed precision: the latents are those that `encode_dataset.py` writes.
        inputs = trainer.objective.inputs(batch, trainer.accelerator.device)
        return trainer.step(inputs, send_to_device(batch["condition"], inputs.device))

    return complete_step(learn)


def _validate(run, trainer, task, validation):
    """Validation loss, and pictures, with the averaged weights if there are."""
    denoiser = run.accelerator.unwrap_model(trainer.denoiser)
    with ema_weights(trainer.ema, denoiser.learned_parameters()):
        if validation is not None:
            scores = validation.evaluate(trainer.denoiser)
            run.log_scores(scores)
            run.keep_if_best(partial(task.save, trainer), scores)
        if task.paint is not None and run.accelerator.is_main_process:
            device, waits = run.accelerator.device, bool(task.offloaded)
            with fetched(task.vae, device), offload_models(*task.offloaded, device=device, offload=waits):
                run.log_images(task.paint(), images_per_row=4)
