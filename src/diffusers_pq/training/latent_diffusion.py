"""Class-conditional latent diffusion from scratch (supplement D and Table 5)."""

import logging
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from accelerate.utils import DistributedType

from ..autoencoders import check_resolution, downsampling_factor, load_pretrained
from ..data.conditions import ClassLabels, class_names
from ..files import naming, read_json
from ..flags import REQUIRED, Options, flag, with_default
from ..models.class_conditioning import create_class_conditional_denoiser, num_classes, token_dimension
from ..pipelines.class_labels import class_label
from ..pipelines.pipeline_latent_diffusion_pq import LatentDiffusionPQPipeline
from .denoiser import (
    ClassConditionalDenoiser,
    DenoiserOptions,
    DenoiserTask,
    DenoisingObjective,
    Stage,
    measure_statistics,
    paint_each,
    saved_autoencoder,
    train_denoiser,
)
from .noise import create_scheduler, latent_shift
from .options import (
    DenoiserDataOptions,
    DenoiserOptimisationOptions,
    DenoiserRunOptions,
    LabelledDataOptions,
    NoiseOptions,
)
from .run import TrainingRun, create_accelerator, load_split, prepare_model, whole_module
from .uploads import BestModel


logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class LatentDiffusionModelOptions(Options):
    """Which denoiser to train, on the latents of which autoencoder."""

    title: ClassVar[str] = "model"

    vae_name_or_path: str = flag(
        REQUIRED, "PQModel or another image autoencoder of diffusers; folder or Hub", fixed=True
    )
    vae_subfolder: str | None = flag(None, 'of the autoencoder, "vae" of a pipeline', fixed=True)
    revision: str | None = flag(None, "branch, tag or commit of the autoencoder on the Hub; default: main", fixed=True)
    variant: str | None = flag(None, 'of the autoencoder\'s files, such as "fp16"', fixed=True)
    model_config_name_or_path: str = flag(
        REQUIRED,
        "JSON file of a UNet2DConditionModel or DiTTransformer2DModel; channels, size and classes are filled in",
    )


@dataclass(kw_only=True)
class ObjectiveOptions(NoiseOptions):
    """How latents are mixed with noise, what is predicted, and how errors weigh."""

    objective: str = flag("diffusion", "what the denoiser learns", choices=("diffusion", "flow_matching"), fixed=True)
    prediction_type: str = flag(
        "epsilon",
        "what the denoiser of diffusion predicts; that of flow matching predicts the velocity, or with sample the "
        "latents, too",
        choices=("epsilon", "v_prediction", "sample"),
        fixed=True,
    )
    weighting_scheme: str = flag(
        "none", "how the timesteps of flow matching are drawn", choices=("none", "logit_normal")
    )

    def check(self):
        super().check()
        if self.objective == "flow_matching":
            for name, default in {"rescale_betas_zero_snr": False, "snr_gamma": None}.items():
                if getattr(self, name) != default:
                    raise ValueError(f"--{name} is of diffusion: leave it out with --objective flow_matching")
            if self.prediction_type == "v_prediction":
                raise ValueError("--prediction_type v_prediction is of diffusion: flow matching knows sample")
        elif self.weighting_scheme != "none":
            raise ValueError("--weighting_scheme needs --objective flow_matching")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError("--rescale_betas_zero_snr needs --prediction_type v_prediction or sample")


@dataclass(kw_only=True)
class LabelledLatentsOptions(LabelledDataOptions, DenoiserDataOptions):
    """What labelled pictures to train on, as latents."""


@dataclass(kw_only=True)
class LatentDiffusionOptimisationOptions(DenoiserOptimisationOptions):
    """Optimiser, precision and accumulation (Table 5)."""

    learning_rate: float = flag(6.4e-5, "learning rate, after the warm-up", minimum=0)
    max_train_steps: int = with_default(DenoiserOptimisationOptions, "max_train_steps", 2_000_000)


@dataclass(kw_only=True)
class LatentDiffusionRunOptions(DenoiserRunOptions):
    """Output, logs, checkpoints and the Hub."""

    output_dir: str = with_default(DenoiserRunOptions, "output_dir", "ldm")
    validation_labels: list[int | str] = flag(
        [], "numbers or names of classes; pictures of them go to the log", parse=class_label, differs="always"
    )


@dataclass(kw_only=True)
class LatentDiffusionOptions(DenoiserOptions):
    """All of a training of latent diffusion."""

    model: LatentDiffusionModelOptions
    noise: ObjectiveOptions
    data: LabelledLatentsOptions
    optim: LatentDiffusionOptimisationOptions
    run: LatentDiffusionRunOptions


def train_latent_diffusion(options: LatentDiffusionOptions):
    """
    Train, validate, keep checkpoints and write the pipeline; or do a dry run. To be called by all processes.

    Args:
        options ([`LatentDiffusionOptions`])

    Raises:
        ValueError: if the options contradict the models or the data.
    """
    data, labels = options.data, options.run.validation_labels
    accelerator = create_accelerator(options.optim, options.run)
    if accelerator.distributed_type == DistributedType.FSDP and labels:
        raise ValueError("--validation_labels need a whole denoiser in each process: launch without FSDP.")
    run = TrainingRun(options, accelerator, BestModel(options.run.output_dir, "loss", lower_is_better=True))
    labelled = load_split(data, "train", data.label_column)
    if labelled is None:
        raise ValueError("The dataset has no `train` split.")
    names = class_names(labelled, data.label_column, data.class_names_file)
    pipeline = _build_pipeline(options, run, names)
    logger.info("%d classes: %s", num_classes(pipeline.denoiser), ", ".join(names[:10]))
    pipeline.get_label_ids(labels)  # a wrong one shows before the training
    task = _build_task(options, pipeline, names)
    measure_statistics(data, options.optim, accelerator, run, task)
    train_denoiser(options, accelerator, run, task)


def _build_pipeline(options, run, names):
    """The pipeline that is trained; a resumed run takes the autoencoder that holds the latents' statistics."""
    model, noise, resolution = options.model, options.noise, options.data.resolution
    if run.checkpoint is not None:
        vae = load_pretrained(str(saved_autoencoder(run)))
    else:
        files = {"subfolder": model.vae_subfolder, "revision": model.revision, "variant": model.variant}
        vae = load_pretrained(model.vae_name_or_path, **files)
    factor = downsampling_factor(vae)
    check_resolution("--resolution", resolution, factor)
    channels, side = vae.config.latent_channels, resolution // factor
    config = read_json(model.model_config_name_or_path, dict)
    with naming(model.model_config_name_or_path):
        denoiser = create_class_conditional_denoiser(config, channels, side, len(names))
    dimension, width = token_dimension(denoiser)
    if width < dimension:
        # Zheng et al. (2025, "Diffusion Transformers with Representation Autoencoders"), section 4.1.
        logger.warning("The denoiser is %d wide, but sees %d values at a place: it cannot fit them.", width, dimension)
    shift = latent_shift(channels, side, side) if noise.noise_shift == "auto" else noise.noise_shift
    return LatentDiffusionPQPipeline(
        vae=vae.requires_grad_(False),
        scheduler=create_scheduler(noise.objective, noise.prediction_type, shift, noise.rescale_betas_zero_snr),
        **_component(prepare_model(options.optim, denoiser)),
        id2label=dict(enumerate(names)),
    )


def _component(denoiser):
    """A denoiser under the name that pipelines have for it."""
    name = "unet" if "UNet" in type(denoiser).__name__ else "transformer"
    return {name: denoiser}


def _build_task(options, pipeline, names):
    data, optim, labels = options.data, options.optim, options.run.validation_labels
    return DenoiserTask(
        denoiser=ClassConditionalDenoiser(pipeline.denoiser),
        vae=pipeline.vae,
        objective=DenoisingObjective.of(
            options.noise, pipeline.vae, pipeline.scheduler, options.noise.weighting_scheme
        ),
        stages=[Stage(data.resolution, optim.max_train_steps, optim.learning_rate, "all")],
        condition_column=data.label_column,
        condition=ClassLabels(data.label_column, names, data.proportion_empty_labels),
        validation_condition=ClassLabels(data.label_column, names),
        save=partial(_save_pipeline, pipeline),
        paint=partial(paint_each, pipeline.denoiser, pipeline, "class_labels", labels, optim.seed) if labels else None,
        parts=_component(pipeline.denoiser) | {"vae": pipeline.vae},
    )


def _save_pipeline(pipeline, trainer, folder):
    denoiser = whole_module(trainer.accelerator, trainer.denoiser, "denoiser")
    if trainer.accelerator.is_main_process:
        parts = pipeline.components | _component(denoiser)
        LatentDiffusionPQPipeline(**parts, id2label=pipeline.config.id2label).save_pretrained(folder)
