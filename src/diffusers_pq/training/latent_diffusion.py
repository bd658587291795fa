"""Class-conditional latent diffusion from scratch (supplement D and Table 5)."""

import argparse
import json
import logging
from functools import partial
from pathlib import Path

from accelerate.utils import DistributedType

from ..autoencoders import downsampling_factor
from ..data.pictures import ClassLabels, class_names
from ..evaluation.systems import load_pretrained
from ..models.class_conditioning import create_class_conditional_denoiser, num_classes, token_dimension
from ..pipelines.pipeline_latent_diffusion_pq import LatentDiffusionPQPipeline
from .denoiser import (
    ClassConditionalDenoiser,
    DenoiserTask,
    Stage,
    check_resolution,
    paint_each,
    saved_autoencoder,
    train_denoiser,
)
from .noise import create_scheduler, latent_shift
from .options import (
    add_data_arguments,
    add_denoising_arguments,
    add_optimisation_arguments,
    add_run_arguments,
    parse_args_with_recipe,
)
from .run import TrainingRun, create_accelerator, load_train_split, prepare_model, whole_module
from .uploads import BestModel


logger = logging.getLogger(__name__)


def train_latent_diffusion(args: argparse.Namespace):
    """
    Train, validate, keep checkpoints and write the pipeline; or do a dry run. To be called by all processes.

    Args:
        args (`argparse.Namespace`): What [`parse_args`] returns.

    Raises:
        ValueError: if the flags contradict each other, the models or the data.
    """
    accelerator = create_accelerator(args)
    if accelerator.distributed_type == DistributedType.FSDP and args.validation_labels:
        raise ValueError("--validation_labels need a whole denoiser in each process: launch without FSDP.")
    run = TrainingRun(args, accelerator, BestModel(args.output_dir, "loss", lower_is_better=True))
    names = class_names(load_train_split(args, args.label_column), args.label_column, args.class_names_file)
    pipeline = _build_pipeline(args, run, names)
    logger.info("%d classes: %s", num_classes(pipeline.denoiser), ", ".join(names[:10]))
    pipeline.get_label_ids(args.validation_labels)  # a wrong one shows before the training
    train_denoiser(args, accelerator, run, _build_task(args, pipeline, names))


def parse_args(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """The flags of `train_ldm.py`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--vae_name_or_path", required=True, help="PQModel or another image autoencoder of diffusers; folder or Hub"
    )
    model.add_argument("--vae_subfolder", help='of the autoencoder, "vae" of a pipeline')
    model.add_argument(
        "--model_config_name_or_path",
        required=True,
        help="JSON file of a UNet2DConditionModel or DiTTransformer2DModel; channels, size and classes are filled in",
    )
    noise = parser.add_argument_group("noise")
    noise.add_argument("--objective", choices=("diffusion", "flow_matching"), default="diffusion")
    noise.add_argument("--prediction_type", choices=("epsilon", "v_prediction"), default="epsilon")
    noise.add_argument(
        "--weighting_scheme",
        choices=("none", "logit_normal"),
        default="none",
        help="how the timesteps of flow matching are drawn",
    )
    data = add_data_arguments(parser)
    data.add_argument("--label_column", default="label", help="ClassLabel, whole numbers or strings")
    data.add_argument("--class_names_file", help="text file with a name in each line; for streams that hold none")
    data.add_argument("--resolution", type=int, default=256)
    data.add_argument(
        "--proportion_empty_labels", type=float, default=0.1, help="labels left out, for classifier-free guidance"
    )
    optim = add_optimisation_arguments(parser)
    optim.add_argument("--learning_rate", type=float, default=6.4e-5)
    optim.add_argument("--max_train_steps", type=int, default=2_000_000)
    run = add_run_arguments(parser, output_dir="ldm", steps=5000)
    run.add_argument("--validation_labels", nargs="*", default=[], help="numbers or names; pictures go to the log")
    add_denoising_arguments(data, optim, run)
    args = parse_args_with_recipe(parser, argv)

    if args.objective == "flow_matching":
        for name, default in (("prediction_type", "epsilon"), ("rescale_betas_zero_snr", False), ("snr_gamma", None)):
            if getattr(args, name) != default:
                parser.error(f"--{name} is of diffusion: leave it out with --objective flow_matching")
    elif args.weighting_scheme != "none":
        parser.error("--weighting_scheme needs --objective flow_matching")
    if args.rescale_betas_zero_snr and args.prediction_type == "epsilon":
        parser.error("--rescale_betas_zero_snr needs --prediction_type v_prediction")
    args.validation_labels = [int(label) if label.isdecimal() else label for label in args.validation_labels]
    return args


def _build_pipeline(args, run, names):
    """The pipeline that is trained; a resumed run takes the autoencoder that holds the latents' statistics."""
    if run.checkpoint is not None:
        vae = load_pretrained(str(saved_autoencoder(args, run)))
    else:
        vae = load_pretrained(args.vae_name_or_path, subfolder=args.vae_subfolder)
    factor = downsampling_factor(vae)
    check_resolution("--resolution", args.resolution, factor)
    channels, side = vae.config.latent_channels, args.resolution // factor
    config = json.loads(Path(args.model_config_name_or_path).read_text(encoding="utf-8"))
    denoiser = create_class_conditional_denoiser(config, channels, side, len(names))
    dimension, width = token_dimension(denoiser)
    if width < dimension:
        # Zheng et al. (2025, "Diffusion Transformers with Representation Autoencoders"), section 4.1.
        logger.warning("The denoiser is %d wide, but sees %d values at a place: it cannot fit them.", width, dimension)
    noise_shift = latent_shift(channels, side, side) if args.noise_shift == "auto" else args.noise_shift
    return LatentDiffusionPQPipeline(
        vae=vae.requires_grad_(False),
        scheduler=create_scheduler(args.objective, args.prediction_type, noise_shift, args.rescale_betas_zero_snr),
        **_component(prepare_model(args, denoiser)),
        id2label=dict(enumerate(names)),
    )


def _component(denoiser):
    """A denoiser under the name that pipelines have for it."""
    name = "unet" if "UNet" in type(denoiser).__name__ else "transformer"
    return {name: denoiser}


def _build_task(args, pipeline, names):
    paint = partial(paint_each, args, pipeline.denoiser, pipeline, args.validation_labels)
    return DenoiserTask(
        denoiser=ClassConditionalDenoiser(pipeline.denoiser),
        vae=pipeline.vae,
        scheduler=pipeline.scheduler,
        stages=[Stage(args.resolution, args.max_train_steps, args.learning_rate, "all")],
        condition_column=args.label_column,
        condition=ClassLabels(args.label_column, names, args.proportion_empty_labels),
        validation_condition=ClassLabels(args.label_column, names),
        save=partial(_save_pipeline, pipeline),
        paint=paint if args.validation_labels else None,
        weighting_scheme=args.weighting_scheme,
        parts=_component(pipeline.denoiser) | {"vae": pipeline.vae},
    )


def _save_pipeline(pipeline, trainer, folder):
    denoiser = whole_module(trainer.accelerator, trainer.denoiser, "denoiser")
    if trainer.accelerator.is_main_process:
        parts = pipeline.components | _component(denoiser)
        LatentDiffusionPQPipeline(**parts, id2label=pipeline.config.id2label).save_pretrained(folder)
