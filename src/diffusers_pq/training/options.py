"""Options that the training programs share, in groups."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..data.pictures import INTERPOLATION_MODES, RESIZE_MODES, Crops, PictureSource
from ..files import check_output_folder
from ..flags import Command, Options, as_flag, changed_on_resuming, flag, with_default


SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


def noise_shift(text: str | float) -> float | str:
    """A number, or `"auto"`."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be a number above 0 or "auto", but is {text!r}') from None


@dataclass(kw_only=True)
class DataOptions(Options):
    """What pictures to train on and how they are read; see [`PictureSource`] and [`build_train_loader`]."""

    title: ClassVar[str] = "data"

    dataset_name: str | None = flag(None, "Hub dataset, or local folder of parquet files or webdataset tars")
    dataset_config_name: str | None = flag(None, "configuration of the dataset, where it has several")
    train_data_dir: str | None = flag(None, "folder in the imagefolder layout", differs="between machines")
    image_column: str = flag("image", "column of the pictures", differs="between machines")
    cache_dir: str | None = flag(None, "where datasets are kept; default: the Hub's cache", differs="always")
    streaming: bool = flag(
        False,
        "read the dataset while training instead of downloading it first",
        differs="between machines",
        fixed=True,
    )
    shuffle_buffer: int = flag(
        1000, "pictures of a stream shuffled together", minimum=1, differs="between machines", fixed=True
    )
    on_bad_image: str = flag(
        "skip", "what to do with a picture that cannot be used", choices=("skip", "raise"), differs="always"
    )
    min_image_side: int | None = flag(
        None, "pictures with a shorter side are bad; default: the resolution, so that none is enlarged", minimum=1
    )
    image_interpolation_mode: str = flag(
        "bicubic", "filter of the resizing; the paper's authors: bilinear", choices=INTERPOLATION_MODES
    )
    random_flip: bool = flag(False, "mirror half the pictures")
    max_train_samples: int | None = flag(None, "train on so many of the pictures only; by default on all", minimum=1)
    validation_share: float = flag(
        0.02,
        "where there is no `validation` split, this share of the pictures, at most 256, is held back for it; 0: none",
        minimum=0,
        below=1,
    )
    dataloader_num_workers: int = flag(
        0, "worker processes that read pictures, per process", minimum=0, differs="between machines"
    )
    dataloader_prefetch: int | None = flag(
        None, "batches that each worker reads ahead; default: 2", minimum=1, differs="between machines"
    )

    def check(self):
        if self.dataloader_prefetch is not None and not self.dataloader_num_workers:
            raise ValueError("--dataloader_prefetch needs --dataloader_num_workers: nobody reads ahead without")

    @property
    def source(self) -> PictureSource:
        """Where the pictures come from."""
        return PictureSource(
            self.dataset_name,
            self.train_data_dir,
            self.image_column,
            self.dataset_config_name,
            self.cache_dir,
            self.streaming,
        )

    def validation_crops(self, resolution: int) -> Crops:
        """The same of each picture in all validations."""
        interpolation = {"image_interpolation_mode": self.image_interpolation_mode}
        return Crops.middle(self.image_column, resolution, self.resize_mode, **interpolation)


@dataclass(kw_only=True)
class OptimisationOptions(Options):
    """Optimiser, precision and accumulation."""

    title: ClassVar[str] = "optimisation"
    usual_batch_size: ClassVar[int] = 8  # of a process, where no flag says another

    total_batch_size: int | None = flag(
        None,
        "pictures of an optimisation step, shared out among processes and --gradient_accumulation_steps",
        minimum=1,
    )
    train_batch_size: int | None = flag(
        None,
        "pictures per process and forward pass; default: this process's share of --total_batch_size, else 8",
        minimum=1,
        differs="between machines",
    )
    max_train_steps: int = flag(1_000_000, "optimisation steps of the whole run", minimum=1)
    num_train_epochs: int | None = flag(None, "passes over the pictures, instead of --max_train_steps", minimum=1)
    optimizer: str = flag(
        "adamw",
        "adamw, or prodigy of the package prodigyopt, which finds the learning rate itself",
        choices=("adamw", "prodigy"),
        fixed=True,
    )
    use_8bit_adam: bool = flag(False, "keep Adam's state in 8 bits, by the package bitsandbytes", fixed=True)
    adam_beta1: float = flag(0.9, "decay of Adam's mean of the gradients", minimum=0, below=1)
    adam_beta2: float = flag(0.999, "decay of Adam's mean of their squares", minimum=0, below=1)
    max_grad_norm: float | None = flag(None, "clip gradients to this norm; by default they are not clipped", above=0)
    gradient_accumulation_steps: int = flag(
        1, "forward passes for each optimisation step", minimum=1, differs="between machines"
    )
    gradient_checkpointing: bool = flag(
        False, "save memory by computing activations twice", differs="between machines"
    )
    lr_scheduler: str = flag("constant", "how the learning rate goes on after the warm-up", choices=SCHEDULERS)
    lr_warmup_steps: int = flag(0, "steps in which the learning rate rises from 0", minimum=0)
    max_skipped_steps: int = flag(
        10,
        "steps without a finite gradient are left out; so many in a row end the run",
        minimum=1,
        differs="always",
    )
    use_ema: bool = flag(False, "also keep an average of the weights, and save that", fixed=True)
    ema_decay: float = flag(0.9999, "decay of that average", minimum=0, maximum=1)
    mixed_precision: str | None = flag(
        None,
        "precision of the forward pass; default: that of `accelerate config`",
        choices=("no", "fp16", "bf16"),
        differs="between machines",
    )
    allow_tf32: bool = flag(False, "let Ampere GPUs round float32 matrix products to TF32", differs="between machines")
    channels_last: bool = flag(False, "use the memory format that convolutions prefer", differs="between machines")
    compile: bool = flag(
        False, "compile the blocks that the model repeats with torch.compile", differs="between machines"
    )
    seed: int = flag(0, "seed of weights, order, crops and noise", minimum=0, maximum=2**32 - 1, fixed=True)

    def pictures_per_step(self, num_processes: int) -> int:
        """Of all processes, once `train_batch_size` is known."""
        return self.train_batch_size * self.gradient_accumulation_steps * num_processes

    def check(self):
        if self.use_8bit_adam and self.optimizer != "adamw":
            raise ValueError(f"--use_8bit_adam is of adamw: leave it out with --optimizer {self.optimizer}")

    def share_out_batch(self, num_processes: int):
        """
        Set `train_batch_size`, if it is not given, for so many processes.

        Raises:
            ValueError: if `total_batch_size` does not divide, or is not what the other flags make.
        """
        parts = num_processes * self.gradient_accumulation_steps
        accumulation = f"{num_processes} processes x --gradient_accumulation_steps {self.gradient_accumulation_steps}"
        if self.total_batch_size is None:
            self.train_batch_size = self.train_batch_size or self.usual_batch_size
        elif self.train_batch_size is None:
            if self.total_batch_size % parts:
                raise ValueError(
                    f"--total_batch_size {self.total_batch_size} does not divide by {accumulation}: change either."
                )
            self.train_batch_size = self.total_batch_size // parts
        elif self.train_batch_size * parts != self.total_batch_size:
            raise ValueError(
                f"--total_batch_size {self.total_batch_size} is not --train_batch_size {self.train_batch_size} x "
                f"{accumulation}: leave out --train_batch_size."
            )


@dataclass(kw_only=True)
class RunOptions(Options):
    """Output, logs, checkpoints and the Hub."""

    title: ClassVar[str] = "run"

    output_dir: str = flag("output", "folder of the trained model, checkpoints and logs", differs="always")
    logging_dir: str = flag("logs", "folder of the logs, within --output_dir", differs="always")
    logging_steps: int = flag(10, "steps between two lines of the log", minimum=1, differs="always")
    report_to: str = flag("tensorboard", 'where logs go: "tensorboard", "wandb", ... or "none"', differs="always")
    tracker_project_name: str = flag(
        "diffusers_pq", "project of the logs, where they go to a service", differs="always"
    )
    checkpointing_steps: int = flag(5000, "steps between two checkpoints", minimum=1, differs="always")
    checkpoints_total_limit: int | None = flag(
        None, "keep only so many of the newest checkpoints; by default all", minimum=1, differs="always"
    )
    resume_from_checkpoint: str | None = flag(
        None,
        'checkpoint to go on from: "latest", a folder, or "none" to start anew; needed where a run has been before',
        differs="always",
    )
    overwrite_output_dir: bool = flag(
        False, "start anew where a run has been before; its checkpoints and models are set aside", differs="always"
    )
    validation_steps: int = flag(5000, "steps between two validations", minimum=1, differs="always")
    num_validation_images: int = flag(64, "pictures to validate on", minimum=1, differs="always")
    push_to_hub: bool = flag(False, "upload the best and the last model", differs="always")
    hub_model_id: str | None = flag(
        None, "repository to upload to; default: the name of --output_dir", differs="always"
    )
    hub_token: str | None = flag(None, "token to upload with; default: that of `hf auth login`", differs="always")
    dry_run: bool = flag(
        False,
        "print configuration, sizes, memory and an estimate of the time, from a few real steps; writes nothing",
        differs="always",
    )

    def check(self):
        try:
            check_output_folder(self.output_dir)
        except ValueError as error:
            raise ValueError(f"--output_dir: {error}") from None
        if self.overwrite_output_dir and self.resume_from_checkpoint not in (None, "none"):
            raise ValueError(
                "--overwrite_output_dir starts anew, but --resume_from_checkpoint "
                f'{self.resume_from_checkpoint} goes on: leave out the first, or give "none" for the second'
            )


@dataclass(kw_only=True)
class ConditionedDataOptions(DataOptions):
    """What pictures, with conditions, to train on, or what codes of them."""

    latents_dir: str | None = flag(
        None, "what `encode_dataset.py` wrote; pictures are then read for validation only", differs="between machines"
    )
    cache_latents: bool = flag(
        False,
        "encode one crop of each picture, mirrored or not, before the training, and keep that in the CPU's memory",
        fixed=True,
    )
    resize_mode: str = flag(
        "short_side",
        "take a square from pictures resized to a short side of the resolution (short_side), from pictures as they "
        "are (native), or make whole pictures squares (stretch)",
        choices=RESIZE_MODES,
    )
    center_crop: bool = flag(False, "take the middle of each picture instead of a random part")

    def check(self):
        super().check()
        if self.cache_latents and (self.streaming or self.latents_dir):
            other = "--streaming" if self.streaming else "--latents_dir"
            raise ValueError(f"--cache_latents keeps all pictures' latents in memory: leave out {other}")


@dataclass(kw_only=True)
class LabelledDataOptions(ConditionedDataOptions):
    """What labelled pictures to train on."""

    label_column: str = flag("label", "column of the classes: ClassLabel, whole numbers or strings")
    class_names_file: str | None = flag(None, "text file with a name in each line; for streams that hold none")
    resolution: int = flag(256, "side of the pictures, in pixels", minimum=1)
    proportion_empty_labels: float = flag(0.1, "labels left out, for classifier-free guidance", minimum=0, maximum=1)


@dataclass(kw_only=True)
class DenoiserDataOptions(ConditionedDataOptions):
    """What pictures a denoiser of latents is trained on."""

    num_statistics_images: int = flag(
        1000,
        "pictures that the latents' mean and std are taken of; 0 keeps those in the autoencoder's config",
        minimum=0,
        fixed=True,
    )


@dataclass(kw_only=True)
class DenoiserOptimisationOptions(OptimisationOptions):
    """Optimiser, precision and accumulation of a denoiser."""

    adam_weight_decay: float = flag(1e-2, "weight decay of AdamW", minimum=0)
    offload: bool = flag(
        False,
        "let the autoencoder and text encoders that are not trained wait on the CPU until they are needed",
        differs="between machines",
    )
    max_grad_norm: float | None = with_default(OptimisationOptions, "max_grad_norm", 1.0)


@dataclass(kw_only=True)
class DenoiserRunOptions(RunOptions):
    """Output, logs, checkpoints and the Hub, of a denoiser."""

    num_validation_images: int = with_default(RunOptions, "num_validation_images", 256)


@dataclass(kw_only=True)
class NoiseOptions(Options):
    """How latents are mixed with noise, and how errors weigh."""

    title: ClassVar[str] = "noise"

    snr_gamma: float | None = flag(None, "min-SNR weighting; 5.0 is usual", above=0)
    channel_weighting: float = flag(
        0.0,
        "weight each latent channel's loss by its standard deviation to this power; 0: no weighting, as in the paper",
    )
    noise_shift: float | str = flag(
        1.0,
        'more noise for larger latents: "auto", by their size and channels, or a number; 1 shifts nothing',
        parse=noise_shift,
    )
    rescale_betas_zero_snr: bool = flag(False, "end in pure noise; needs v prediction or sample prediction")
    noise_offset: float = flag(
        0.0,
        "also add noise that is the same all over a channel, times this; helps with very dark and bright pictures",
        minimum=0,
    )
    input_perturbation: float = flag(
        0.0,
        "also add noise that the denoiser is not told of, times this, against exposure bias; 0.1 is usual",
        minimum=0,
    )

    def check(self):
        if self.noise_shift != "auto" and not self.noise_shift > 0:
            raise ValueError(f'--noise_shift: must be above 0 or "auto", but is {self.noise_shift}')


@dataclass(kw_only=True)
class TrainingOptions(Command):
    """What every training has."""

    data: DataOptions
    optim: OptimisationOptions
    run: RunOptions

    def check_resuming(self, earlier: Mapping[str, Any]):
        """
        Raise a `ValueError` if a run cannot go on with these options.

        Args:
            earlier (`Mapping`): The settings that the checkpoint was written with.
        """
        for name, (before, now) in changed_on_resuming(type(self), earlier, self.settings()).items():
            raise ValueError(
                f"{as_flag(name, now)}: the checkpoint was written with {as_flag(name, before)}, which a resumed run "
                "has to keep. Give that again, or start anew with `--resume_from_checkpoint none`."
            )
