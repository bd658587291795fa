"""Stable Diffusion on the latents of any autoencoder: its adaptation (section 4.5), and untrained pipelines."""

import argparse
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch.nn as nn
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..autoencoders import downsampling_factor, load_autoencoder
from ..data.pictures import Prompts
from ..models.autoencoder_pq import PQModel
from ..models.widening import widen_unet
from ..pipelines.pipeline_stable_diffusion_pq import StableDiffusionPQPipeline
from .denoiser import (
    ConditionalDenoiser,
    DenoiserTask,
    Stage,
    check_resolution,
    paint_each,
    save_lora,
    saved_autoencoder,
    train_denoiser,
)
from .noise import adapt_schedule, latent_shift
from .options import (
    add_data_arguments,
    add_denoising_arguments,
    add_optimisation_arguments,
    add_run_arguments,
    parse_args_with_recipe,
)
from .run import TrainingRun, create_accelerator, prepare_model, whole_module
from .uploads import BestModel


_START, _END = "<|startoftext|>", "<|endoftext|>"


def train_clip_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """
    A tokenizer of CLIP's kind (lower case, byte-pair encoding with end-of-word marks) fitted to captions.

    Args:
        captions: Texts to fit it to.
        vocab_size (`int`):
            At most so many tokens; at least the 256 single bytes, two marks and the ends of the captions' words.
        max_length (`int`): Tokens of a prompt, the two marks included.
    """
    blank = CLIPTokenizer(vocab={_START: 0, _END: 1}, merges=[])
    trained = blank.train_new_from_iterator(captions, vocab_size)
    trained.model_max_length = max_length
    return trained


def create_stable_diffusion(
    vae: nn.Module, tokenizer: CLIPTokenizer, unet_config: dict, text_encoder_config: dict, prediction_type: str
) -> StableDiffusionPipeline:
    """
    A Stable Diffusion pipeline with fresh weights around a trained autoencoder.

    Args:
        vae: An `AutoencoderKL` or [`PQModel`].
        tokenizer (`CLIPTokenizer`)
        unet_config, text_encoder_config (`dict`): Of `UNet2DConditionModel` and `CLIPTextConfig`; channels, prompt
            embedding and vocabulary are filled in.
        prediction_type (`str`): `"epsilon"` or `"v_prediction"`.
    """
    text_config = CLIPTextConfig(
        **text_encoder_config,
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    channels = vae.config.latent_channels
    unet = UNet2DConditionModel(
        **unet_config, in_channels=channels, out_channels=channels, cross_attention_dim=text_config.hidden_size
    )
    # Stable Diffusion's schedule.
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDPMScheduler(**betas, clip_sample=False, steps_offset=1, prediction_type=prediction_type)
    if isinstance(vae, PQModel):
        from ..pipelines.pipeline_stable_diffusion_pq import StableDiffusionPQPipeline as pipeline_class
    else:
        pipeline_class = StableDiffusionPipeline
    text_encoder = CLIPTextModel(text_config)
    return pipeline_class(vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)


def adapt_stable_diffusion(args: argparse.Namespace):
    """
    Train, validate, keep checkpoints and write the pipeline; or do a dry run. To be called by all processes.

    Args:
        args (`argparse.Namespace`): What [`parse_args`] returns.

    Raises:
        ValueError: if the flags contradict each other, the models or the data.
    """
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
    train_denoiser(args, accelerator, run, _build_task(args, _build_pipeline(args, run)))


def parse_args(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """The flags of `train_pqsd.py`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
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
    data = add_data_arguments(parser)
    data.add_argument("--caption_column", default="text")
    data.add_argument(
        "--proportion_empty_prompts", type=float, default=0.1, help="captions left out, for classifier-free guidance"
    )
    optim = add_optimisation_arguments(parser)
    optim.add_argument(
        "--stages",
        default="384:20000:8e-5:conv 768:800000:8e-5:all 768:200000:2e-5:all",
        help="RESOLUTION:STEPS:LEARNING_RATE:conv (first and last convolution only) or ...:all, one after the other",
    )
    optim.add_argument("--max_train_steps", type=int, help="default: all steps of the stages")
    run = add_run_arguments(parser, output_dir="pqsd", steps=5000)
    run.add_argument("--validation_prompts", nargs="*", default=[], help="pictures of them go to the log")
    run.add_argument(
        "--guidance_scale",
        type=float,
        help="default of the PQ pipeline that is trained; default: the source's, or 7.5",
    )
    add_denoising_arguments(data, optim, run)
    args = parse_args_with_recipe(parser, argv)
    try:
        args.stages = [Stage.parse(text) for text in args.stages.split()]
    except ValueError as error:
        parser.error(f"--stages: {error}")
    if args.lora_rank and (args.train_text_encoder or args.unet_init == "random"):
        parser.error("--lora_rank keeps neither a --train_text_encoder nor a UNet of --unet_init random: leave it out")
    if args.lora_rank and args.guidance_scale is not None:
        parser.error("--guidance_scale cannot be saved with the adapter of --lora_rank: leave it out")
    if args.max_train_steps is None:
        args.max_train_steps = sum(stage.steps for stage in args.stages)
    return args


def _build_pipeline(args, run):
    """The pipeline that is trained; a resumed run takes the autoencoder that holds the latents' statistics."""
    source = args.pretrained_model_name_or_path
    is_pq = DiffusionPipeline.load_config(source)["vae"][-1] == "PQModel"
    source_class = StableDiffusionPQPipeline if is_pq else StableDiffusionPipeline
    pipeline = source_class.from_pretrained(source, safety_checker=None)
    if run.checkpoint is not None:
        vae = load_autoencoder(str(saved_autoencoder(args, run)))
    else:
        vae = load_autoencoder(args.vae_name_or_path) if args.vae_name_or_path else pipeline.vae
    components = {name: getattr(pipeline, name) for name in pipeline.components} | {"vae": vae.requires_grad_(False)}
    components["unet"] = _build_unet(args, pipeline.unet, vae.config.latent_channels)
    pipeline_class = StableDiffusionPQPipeline if isinstance(vae, PQModel) else StableDiffusionPipeline
    factor = downsampling_factor(vae)
    for stage in args.stages:
        check_resolution("--stages", stage.resolution, factor)
    side = args.stages[-1].resolution // factor
    components["scheduler"] = _build_scheduler(args, pipeline, vae.config.latent_channels, side)
    components["unet"].register_to_config(sample_size=side)
    built = pipeline_class(**components, requires_safety_checker=False)
    for guidance_scale in (pipeline.config.get("guidance_scale"), args.guidance_scale):
        if isinstance(built, StableDiffusionPQPipeline) and guidance_scale is not None:
            built.register_to_config(guidance_scale=guidance_scale)
    return built


def _build_scheduler(args, pipeline, latent_channels, side):
    """The pipeline's noise schedule; `--noise_shift auto` is by how much larger the new latents are than its own."""
    config = pipeline.unet.config
    base = config.in_channels * config.sample_size**2
    shift = latent_shift(latent_channels, side, side, base) if args.noise_shift == "auto" else args.noise_shift
    return adapt_schedule(pipeline.scheduler, shift, args.rescale_betas_zero_snr)


def _build_unet(args, unet, latent_channels):
    if args.unet_init == "random":
        channels = {"in_channels": latent_channels, "out_channels": latent_channels}
        unet = type(unet).from_config(unet.config, **channels)
    elif unet.config.in_channels != latent_channels:
        unet = widen_unet(unet, latent_channels, args.unet_init)
    if args.lora_rank:
        # alpha = rank: the scale is then 1 whatever the rank.
        rank = {"r": args.lora_rank, "lora_alpha": args.lora_rank}
        unet.add_adapter(LoraConfig(**rank, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    return prepare_model(args, unet)


def _build_task(args, pipeline):
    paint = partial(paint_each, args, pipeline.unet, pipeline, args.validation_prompts)
    return DenoiserTask(
        denoiser=ConditionalDenoiser(pipeline.unet, pipeline.text_encoder, args.train_text_encoder),
        vae=pipeline.vae,
        scheduler=pipeline.scheduler,
        stages=args.stages,
        condition_column=args.caption_column,
        condition=Prompts(args.caption_column, pipeline.tokenizer, args.proportion_empty_prompts),
        validation_condition=Prompts(args.caption_column, pipeline.tokenizer),
        save=partial(_save_pipeline, args, pipeline),
        paint=paint if args.validation_prompts else None,
        start_stage=lambda denoiser, stage: denoiser.train_only(stage.trained),
        parts={"unet": pipeline.unet, "text_encoder": pipeline.text_encoder, "vae": pipeline.vae},
    )


def _save_pipeline(args, pipeline, trainer, folder):
    """The whole pipeline, or with `--lora_rank` what has been trained of it, autoencoder and noise schedule."""
    unet = whole_module(trainer.accelerator, trainer.denoiser, "unet")
    text_encoder = whole_module(trainer.accelerator, trainer.denoiser, "text_encoder")
    if not trainer.accelerator.is_main_process:
        return
    if args.lora_rank:
        save_lora(unet, type(pipeline), folder)
        pipeline.vae.save_pretrained(Path(folder, "vae"))
        pipeline.scheduler.save_pretrained(Path(folder, "scheduler"))
    else:
        parts = pipeline.components | {"unet": unet, "text_encoder": text_encoder}
        type(pipeline)(**parts, **pipeline.parameters).save_pretrained(folder)
