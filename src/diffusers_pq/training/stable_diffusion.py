"""Stable Diffusion on the latents of any autoencoder: its adaptation (section 4.5), and untrained pipelines."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import ClassVar

import diffusers
import torch
import torch.nn as nn
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, send_to_device
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import offload_models, parse_buckets_string
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..autoencoders import check_resolution, downsampling_factor, load_autoencoder
from ..data.conditions import Prompts, caption_texts
from ..data.latent_cache import load_cached_codes
from ..data.pictures import aspect_ratio_buckets
from ..files import folder_or_hub
from ..flags import REQUIRED, Options, flag, with_default
from ..models.autoencoder_pq import PQModel
from ..models.class_conditioning import predicts_sample
from ..models.widening import outer_layers, widen_denoiser
from .denoiser import (
    ConditionalDenoiser,
    DenoiserOptions,
    DenoiserTask,
    DenoisingObjective,
    Stage,
    measure_statistics,
    paint_each,
    parse_stages,
    save_lora,
    saved_autoencoder,
    train_denoiser,
)
from .families import EncodedCaptions, find_family
from .noise import adapt_schedule, latent_shift
from .options import DenoiserDataOptions, DenoiserOptimisationOptions, DenoiserRunOptions, NoiseOptions
from .run import (
    TrainingRun,
    create_accelerator,
    load_train_split,
    load_validation_split,
    prepare_model,
    whole_module,
)
from .uploads import BestModel


logger = logging.getLogger(__name__)

_PREVIEWS = 4  # captions whose pictures are logged
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
        prediction_type (`str`): `"epsilon"`, `"v_prediction"` or `"sample"`.
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


@dataclass(kw_only=True)
class AdaptationModelOptions(Options):
    """Which pipeline to adapt to which autoencoder, and what of it is trained."""

    title: ClassVar[str] = "model"

    pretrained_model_name_or_path: str = flag(
        REQUIRED, "pipeline to adapt, of Stable Diffusion 1.x, 2.x, XL, 3 or 3.5"
    )
    revision: str | None = flag(None, "branch, tag or commit of that pipeline on the Hub; default: main", fixed=True)
    variant: str | None = flag(None, 'of that pipeline\'s files, such as "fp16"', fixed=True)
    vae_name_or_path: str | None = flag(None, "PQModel or AutoencoderKL; default: the pipeline's own", fixed=True)
    unet_init: str = flag(
        "copy",
        "weights of the new channels, see widen_denoiser; random: no weight of the denoiser is kept",
        choices=("copy", "copy_scaled", "zero", "random"),
        fixed=True,
    )
    train_text_encoder: bool = flag(False, "also train the text encoder, where it is untrained", fixed=True)
    lora_rank: int | None = flag(
        None,
        "train LoRA layers of this rank on attention, and the widened first and last layer in full",
        minimum=1,
        fixed=True,
    )

    lora_alpha: float | None = flag(
        None, "the layers are scaled by it / --lora_rank; default: the rank", above=0, fixed=True
    )
    lora_target_modules: list[str] = flag(
        [], "ends of the names of the layers that get LoRA; default: the projections of attention", fixed=True
    )

    def check(self):
        for name in ("lora_alpha", "lora_target_modules"):
            if getattr(self, name) and not self.lora_rank:
                raise ValueError(f"--{name} needs --lora_rank")
        if self.lora_rank and (self.train_text_encoder or self.unet_init == "random"):
            raise ValueError(
                "--lora_rank keeps neither a --train_text_encoder nor a UNet of --unet_init random: leave it out"
            )


@dataclass(kw_only=True)
class CaptionedDataOptions(DenoiserDataOptions):
    """What captioned pictures to train on."""

    caption_column: str = flag("text", "column of the captions: texts, or lists of which one is drawn")
    proportion_empty_prompts: float = flag(
        0.1, "captions left out, for classifier-free guidance", minimum=0, maximum=1
    )
    aspect_ratio_buckets: str | None = flag(
        None,
        'train on pictures of many proportions, cut little: "auto", from 1:2 to 2:1, or those of "HEIGHT,WIDTH;..."; '
        "each batch is of one, with about as many pixels as the stage's square",
    )
    cache_text_states: bool = flag(
        False,
        "encode each caption once, before the training, and keep the states in the CPU's memory",
        differs="between machines",
    )

    def check(self):
        super().check()
        if self.cache_text_states and self.streaming:
            raise ValueError("--cache_text_states needs to know all captions: leave out --streaming")
        if self.aspect_ratio_buckets and (self.streaming or self.latents_dir):
            other = "--streaming" if self.streaming else "--latents_dir"
            raise ValueError(f"--aspect_ratio_buckets needs to know the size of each picture: leave out {other}")
        if self.aspect_ratio_buckets and self.resize_mode != "short_side":
            raise ValueError(
                f"--aspect_ratio_buckets resizes in its own way: leave out --resize_mode {self.resize_mode}"
            )
        self.buckets(64, 1)  # wrong ones show now

    def buckets(self, resolution: int, multiple: int) -> list[tuple[int, int]] | None:
        """
        Of `--aspect_ratio_buckets`, see [`~diffusers_pq.data.pictures.aspect_ratio_buckets`].

        Raises:
            ValueError: if they cannot be read; the message shows what is expected.
        """
        if self.aspect_ratio_buckets is None:
            return None
        given = None
        if self.aspect_ratio_buckets != "auto":
            try:
                given = parse_buckets_string(self.aspect_ratio_buckets)
            except ValueError as error:
                raise ValueError(f'--aspect_ratio_buckets: must be "auto" or "HEIGHT,WIDTH;...": {error}') from None
        return aspect_ratio_buckets(resolution, multiple, given)


@dataclass(kw_only=True)
class StagedOptimisationOptions(DenoiserOptimisationOptions):
    """Optimiser, precision and accumulation, in stages (Table 4)."""

    stages: tuple[Stage, ...] = flag(
        parse_stages("384:20000:8e-5:conv 768:800000:8e-5:all 768:200000:2e-5:all"),
        "RESOLUTION:STEPS:LEARNING_RATE:conv (first and last layer only) or ...:all, one after the other; in a "
        "recipe also a list of mappings: {resolution: 384, steps: 20000, learning_rate: 8e-5, trained: conv}",
        parse=parse_stages,
        structured=True,
    )
    max_train_steps: int | None = flag(
        None, "optimisation steps of the whole run; default: all of the stages", minimum=1
    )

    def check(self):
        super().check()
        if self.max_train_steps is None:
            self.max_train_steps = sum(stage.steps for stage in self.stages)


@dataclass(kw_only=True)
class AdaptationNoiseOptions(NoiseOptions):
    """How latents are mixed with noise, what is predicted, and how errors weigh."""

    prediction_type: str | None = flag(
        None,
        "what the denoiser predicts; in flow matching only sample, the latents, in place of the velocity; default: "
        "unchanged",
        choices=("epsilon", "v_prediction", "sample"),
        fixed=True,
    )
    weighting_scheme: str | None = flag(
        None,
        "how the timesteps of flow matching are drawn; default: logit_normal, as Stable Diffusion 3",
        choices=("none", "logit_normal"),
    )


@dataclass(kw_only=True)
class AdaptationRunOptions(DenoiserRunOptions):
    """Output, logs, checkpoints and the Hub."""

    output_dir: str = with_default(DenoiserRunOptions, "output_dir", "pqsd")
    validation_prompts: list[str] | None = flag(
        None,
        "pictures of them go to the log; default: four captions of the validation pictures, none with FSDP",
        differs="always",
    )
    guidance_scale: float | None = flag(
        None,
        "default of the PQ pipeline that is trained; default: the source's, or diffusers' own",
        minimum=0,
        differs="always",
    )


@dataclass(kw_only=True)
class AdaptationOptions(DenoiserOptions):
    """All of an adaptation of Stable Diffusion."""

    model: AdaptationModelOptions
    data: CaptionedDataOptions
    optim: StagedOptimisationOptions
    noise: AdaptationNoiseOptions
    run: AdaptationRunOptions

    def check(self):
        if self.data.cache_text_states and self.model.train_text_encoder:
            raise ValueError("--cache_text_states is for text encoders that stay as they are: no --train_text_encoder")
        if self.model.lora_rank and self.run.guidance_scale is not None:
            raise ValueError("--guidance_scale cannot be saved with the adapter of --lora_rank: leave it out")


def adapt_stable_diffusion(options: AdaptationOptions):
    """
    Train, validate, keep checkpoints and write the pipeline; or do a dry run. To be called by all processes.

    Args:
        options ([`AdaptationOptions`])

    Raises:
        ValueError: if the options contradict the models or the data.
    """
    handlers = []
    if options.model.train_text_encoder or any(stage.trained == "conv" for stage in options.optim.stages):
        # Frozen parameters get no gradient in a stage that trains the first and last layer only, nor do the ends of
        # text encoders whose inner states are used.
        handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    needs_whole = bool(options.model.lora_rank or options.run.validation_prompts)
    accelerator = create_accelerator(options.optim, options.run, handlers)
    if accelerator.distributed_type == DistributedType.FSDP and needs_whole:
        raise ValueError(
            "--lora_rank and --validation_prompts need a whole denoiser in each process: launch without FSDP."
        )
    run = TrainingRun(options, accelerator, BestModel(options.run.output_dir, "loss", lower_is_better=True))
    family, pipeline = _build_pipeline(options, run)
    task = _build_task(options, accelerator, family, pipeline)
    measure_statistics(options.data, options.optim, accelerator, run, task)
    train_denoiser(options, accelerator, run, task)


def _build_pipeline(options, run):
    """
    The pipeline that is trained, and its family; a resumed run takes the autoencoder that holds the latents'
    statistics.
    """
    model = options.model
    source, files = model.pretrained_model_name_or_path, {"revision": model.revision}
    with folder_or_hub(source):
        index = DiffusionPipeline.load_config(source, **files)
    kind = find_family(index)
    _check_noise(options.noise, kind)
    source_class = kind.pq_pipeline_class if index["vae"][-1] == "PQModel" else kind.pipeline_class
    # In float32 whatever it is stored in: mixed precision is the accelerator's.
    files |= {"variant": model.variant, "dtype": torch.float32}
    pipeline = source_class.from_pretrained(source, **kind.left_out, **files)
    if run.checkpoint is not None:
        vae = load_autoencoder(str(saved_autoencoder(run)))
    else:
        vae = load_autoencoder(model.vae_name_or_path) if model.vae_name_or_path else pipeline.vae
    parts, parameters = pipeline.components, pipeline.parameters | kind.settings
    denoiser = parts[kind.denoiser_name]
    side = _check_stages(options, vae, denoiser)
    parts["scheduler"] = _build_scheduler(options.noise, pipeline.scheduler, denoiser, vae, side)
    parts[kind.denoiser_name] = _build_denoiser(options, kind, denoiser, vae.config.latent_channels)
    # With the version, or diffusers would set the size of a UNet that comes from an old one to Stable Diffusion's.
    parts[kind.denoiser_name].register_to_config(sample_size=side, _diffusers_version=diffusers.__version__)
    parts["vae"] = vae.requires_grad_(False)
    guidance_scale = parameters.pop("guidance_scale", None)
    if options.run.guidance_scale is not None:
        guidance_scale = options.run.guidance_scale
    if not isinstance(vae, PQModel):
        if kind.is_flow_matching and predicts_sample(parts["scheduler"]):
            raise ValueError("--prediction_type sample needs a PQModel here: diffusers' pipelines take velocities.")
        return kind(pipeline), kind.pipeline_class(**parts, **parameters)
    guidance = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    return kind(pipeline), kind.pq_pipeline_class(**parts, **parameters, **guidance)


def _check_noise(noise, kind):
    if not kind.is_flow_matching and noise.weighting_scheme is not None:
        raise ValueError("--weighting_scheme is of flow matching: leave it out.")
    of_diffusion = {"snr_gamma": noise.snr_gamma, "rescale_betas_zero_snr": noise.rescale_betas_zero_snr}
    if noise.prediction_type != "sample":
        of_diffusion["prediction_type"] = noise.prediction_type
    for name, value in of_diffusion.items():
        if kind.is_flow_matching and value:
            raise ValueError(f"--{name} is of diffusion, but the pipeline is of flow matching: leave it out.")


def _check_stages(options, vae, denoiser) -> int:
    """The side of the last stage's latents; a `ValueError` if pictures of a stage do not fit the models."""
    factor, patch_size = downsampling_factor(vae), denoiser.config.get("patch_size") or 1
    largest, stages = denoiser.config.get("pos_embed_max_size"), options.optim.stages
    for stage in stages:
        check_resolution("--stages", stage.resolution, factor, patch_size)
        buckets = options.data.buckets(stage.resolution, _bucket_multiple(vae, denoiser)) or ()
        side = max([stage.resolution, *chain(*buckets)])
        if largest is not None and side > largest * factor * patch_size:
            raise ValueError(
                f"--stages: {side} px are {side // (factor * patch_size)} patches a side, but the transformer has "
                f"positions for {largest}: at most {largest * factor * patch_size} px."
            )
    return stages[-1].resolution // factor


def _bucket_multiple(vae, denoiser) -> int:
    """Of which the sides of buckets are multiples, in pixels: a UNet's latents are halved from level to level."""
    levels = denoiser.config.get("block_out_channels") or [None]
    return downsampling_factor(vae) * (denoiser.config.get("patch_size") or 1) * 2 ** (len(levels) - 1)


def _build_scheduler(noise, scheduler, denoiser, vae, side):
    """The pipeline's noise schedule; `--noise_shift auto` is by how much larger the new latents are than its own."""
    base = denoiser.config.in_channels * denoiser.config.sample_size**2
    shift = noise.noise_shift
    if shift == "auto":
        shift = latent_shift(vae.config.latent_channels, side, side, base)
    return adapt_schedule(scheduler, shift, noise.rescale_betas_zero_snr, noise.prediction_type)


def _build_denoiser(options, kind, denoiser, latent_channels):
    model = options.model
    if model.unet_init == "random":
        channels = {"in_channels": latent_channels, "out_channels": latent_channels}
        denoiser = type(denoiser).from_config(denoiser.config, **channels)
    elif denoiser.config.in_channels != latent_channels:
        denoiser = widen_denoiser(denoiser, latent_channels, model.unet_init)
    if model.lora_rank:
        # alpha = rank: the scale is then 1 whatever the rank.
        rank = {"r": model.lora_rank, "lora_alpha": model.lora_alpha or model.lora_rank}
        targets = model.lora_target_modules or list(kind.lora_target_modules)
        _check_targets(denoiser, targets)
        denoiser.add_adapter(LoraConfig(**rank, target_modules=targets))
    return prepare_model(options.optim, denoiser)


def _check_targets(denoiser, targets):
    names, outer = [name for name, _ in denoiser.named_modules()], {*outer_layers(denoiser)}
    for target in targets:
        found = [name for name in names if name == target or name.endswith(f".{target}")]
        if not found:
            raise ValueError(f"--lora_target_modules: no layer of the denoiser is called {target!r}.")
        if outer.intersection(found):
            raise ValueError(f"--lora_target_modules: {target!r} is among the layers that are trained in full.")


def _build_task(options, accelerator, family, pipeline):
    data, optim, prompts = options.data, options.optim, _validation_prompts(options, accelerator)
    denoiser = getattr(pipeline, family.denoiser_name)
    text_encoders = {name: getattr(pipeline, name) for name in family.tokenizers}
    trains_text = options.model.train_text_encoder
    conditional = ConditionalDenoiser(family, denoiser, text_encoders, trains_text, optim.offload)
    frozen, condition = tuple(conditional.frozen_text_encoders.values()), family.condition
    if data.cache_text_states:
        conditional.captions = _encode_captions(options, accelerator, family, conditional, pipeline.vae)
        condition = conditional.captions.condition
    waits = optim.offload or data.cache_text_states
    for encoder in () if waits else frozen:
        encoder.to(accelerator.device)
    return DenoiserTask(
        denoiser=conditional,
        vae=pipeline.vae,
        objective=DenoisingObjective.of(
            options.noise, pipeline.vae, pipeline.scheduler, options.noise.weighting_scheme or family.weighting_scheme
        ),
        stages=optim.stages,
        condition_column=data.caption_column,
        condition=Prompts(data.caption_column, condition, data.proportion_empty_prompts),
        validation_condition=Prompts(data.caption_column, condition),
        save=partial(_save_pipeline, pipeline, bool(options.model.lora_rank)),
        paint=partial(paint_each, denoiser, pipeline, "prompt", prompts, optim.seed) if prompts else None,
        start_stage=lambda denoiser, stage: denoiser.train_only(stage.trained),
        with_sizes=family.takes_sizes,
        parts={family.denoiser_name: denoiser, **text_encoders, "vae": pipeline.vae},
        offloaded=frozen if waits else (),
        buckets=partial(data.buckets, multiple=_bucket_multiple(pipeline.vae, denoiser)),
    )


def _encode_captions(options, accelerator, family, conditional, vae) -> EncodedCaptions:
    """All captions of the data, and the empty one."""
    data, device = options.data, accelerator.device
    column = data.caption_column
    if data.latents_dir:
        rows, _ = load_cached_codes(data.latents_dir, options.optim.stages[0].resolution, vae, None, data.cache_dir)
    else:
        rows = load_train_split(data, column)
    values = chain(rows[column], (row[column] for row in load_validation_split(data, column) or ()))
    captions = [text for value in values for text in caption_texts(value, column)]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)

    @torch.no_grad()
    def encode(tokens):
        with accelerator.autocast():
            return family.encode(conditional.frozen_text_encoders, send_to_device(tokens, device))

    with offload_models(*conditional.frozen_text_encoders.values(), device=device):
        encoded = EncodedCaptions([*captions, ""], encode, family, dtype)
    logger.info("%d captions are encoded: %.2f GiB", len(encoded.numbers), encoded.nbytes / 2**30)
    return encoded


def _validation_prompts(options, accelerator) -> list[str]:
    """Those that were given, or captions of the data where pictures would be logged."""
    run, column = options.run, options.data.caption_column
    if run.validation_prompts is not None:
        return run.validation_prompts
    if run.dry_run or run.report_to == "none" or accelerator.distributed_type == DistributedType.FSDP:
        return []
    rows = load_validation_split(options.data, column)
    captions = (text for row in islice(rows or (), 100) for text in caption_texts(row[column], column)[:1])
    return list(dict.fromkeys(captions))[:_PREVIEWS]


def _save_pipeline(pipeline, is_adapter, trainer, folder):
    """The whole pipeline, or with `--lora_rank` what has been trained of it, autoencoder and noise schedule."""
    conditional = trainer.accelerator.unwrap_model(trainer.denoiser)
    name = conditional.family.denoiser_name
    trained = {
        part: whole_module(trainer.accelerator, trainer.denoiser, part)
        for part in (name, *conditional.trained_text_encoders)
    }
    if not trainer.accelerator.is_main_process:
        return
    if is_adapter:
        save_lora(trained[name], type(pipeline), folder, name)
        pipeline.vae.save_pretrained(Path(folder, "vae"))
        pipeline.scheduler.save_pretrained(Path(folder, "scheduler"))
    else:
        type(pipeline)(**pipeline.components | trained, **pipeline.parameters).save_pretrained(folder)
