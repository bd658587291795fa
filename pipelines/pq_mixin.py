"""What the Stable Diffusion pipelines on product-quantised latents share: encoding, decoding, checks, saving."""

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput, StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

import diffusers_pq
from diffusers_pq.models.autoencoder_pq import PQModel


_PIPELINE_CODE = """try:
    from diffusers_pq import {name}  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "diffusers_pq":
        raise
    raise ImportError(
        "{name} needs the Python package `diffusers_pq`, which is not installed: install it."
    ) from error
"""
# Of no pixels, a multiple of whatever the parents ask for: 8 in one, F in another. `_check_size` checks the real one.
ACCEPTED_SIZE = (0, 0)
_COMPONENT_CODE = "from diffusers_pq import {name}  # noqa: F401\n"


# In place of the dtype into which diffusers' `from_pipe` casts.
_AS_IT_IS = object()


class ImportedByCodeMixin:
    """
    Put before a pipeline of diffusers, lets diffusers itself load what it saves: by code beside it that imports the
    classes from `diffusers_pq`.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """
        As the parent's, but all parts are in float32 unless a `dtype` is given: models of transformers, too, which
        would load in the dtype that they are stored in.
        """
        return super().from_pretrained(pretrained_model_name_or_path, **in_one_dtype(kwargs))

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """
        As the parent's, but both pipelines share the parts as they are; a part that is not in the `dtype` given, if
        one is given, is copied into it.
        """
        torch_dtype = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", None) or torch_dtype
        made = super().from_pipe(pipeline, dtype=_AS_IT_IS, **kwargs)
        if dtype is not None:
            made.register_modules(**{name: in_dtype(part, dtype) for name, part in made.components.items()})
        return made

    def to(self, *args, **kwargs):
        return self if kwargs.get("dtype") is _AS_IT_IS else super().to(*args, **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike):
        """
        Write `model_index.json` and, beside it, the code by which `DiffusionPipeline.from_pretrained` finds this class
        and the `PQModel` with `trust_remote_code=True`. It only imports them; `diffusers_pq` must be installed.
        diffusers prefers it to a `custom_pipeline`: load sibling pipelines by their own classes.
        """
        path = Path(json_file_path)
        config = json.loads(self.to_json_string()) | {"_class_name": ["pipeline", type(self).__name__]}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        path.with_name("pipeline.py").write_text(_PIPELINE_CODE.format(name=type(self).__name__), encoding="utf-8")
        for component, name in _own_components(config).items():
            code_path = path.with_name(component) / "diffusers_pq.py"
            code_path.parent.mkdir(exist_ok=True)
            code_path.write_text(_COMPONENT_CODE.format(name=name), encoding="utf-8")

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        # This class is at hand already: no code that came with the files is run.
        config = super()._dict_from_json_file(json_file) | {"_class_name": cls.__name__}
        for component, name in _own_components(config).items():
            config[component] = [getattr(diffusers_pq, name).__module__, name]
        return config


def in_dtype(component, dtype: torch.dtype):
    """The component of a pipeline itself, or a copy if it is a model of another dtype: models may be shared."""
    if not isinstance(component, torch.nn.Module) or component.dtype == dtype:
        return component
    return copy.deepcopy(component).to(dtype)


def in_one_dtype(loading: dict) -> dict:
    """Arguments of a pipeline's `from_pretrained`, with float32 as the dtype of all parts where none is given."""
    if any(loading.get(name) is not None for name in ("dtype", "torch_dtype", "quantization_config")):
        return loading
    return loading | {"dtype": torch.float32}


def _own_components(config: dict) -> dict[str, str]:
    """The classes of this package among the components in a `model_index.json`, by the components' names."""
    components = {name: value for name, value in config.items() if isinstance(value, (list, tuple)) and value}
    return {name: value[1] for name, value in components.items() if value[0] == "diffusers_pq"}


class PQLatentsMixin(ImportedByCodeMixin):
    """
    Put before a Stable Diffusion pipeline of diffusers, makes it work on the normalised latents of a [`PQModel`].

    Args:
        vae ([`PQModel`]): And the other components, see [`StableDiffusionPipeline`].
        guidance_scale (`float`, *optional*, defaults to 7.5):
            Default of `__call__`, saved with the pipeline: a model that was adapted to few pictures wants less than
            Stable Diffusion.

    Raises:
        TypeError: if the `vae` is no `PQModel`.
        ValueError: if the UNet's channels are not the autoencoder's latent channels; the message names both.
    """

    def __init__(
        self,
        vae: PQModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker,
        feature_extractor: CLIPImageProcessor,
        image_encoder: CLIPVisionModelWithProjection = None,
        requires_safety_checker: bool = True,
        guidance_scale: float = 7.5,
    ):
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
        )
        self.register_to_config(guidance_scale=guidance_scale)
        if vae is not None:
            # By this number the processor tells latents, which pass through, from pictures.
            self.image_processor.register_to_config(vae_latent_channels=vae.config.latent_channels)

    def register_modules(self, **modules):
        # Every pipeline hands its components to this method when it is built.
        _check_components(modules.get("vae"), modules.get("unet"))
        super().register_modules(**modules)

    def _check_size(self, height: int, width: int):
        factor = self.vae_scale_factor
        if height % factor or width % factor:
            raise ValueError(
                f"`height` and `width` must be multiples of the downsampling factor F = {factor}, but are {height} "
                f"and {width}."
            )

    def enable_vae_tiling(self):
        """As `vae.enable_tiling()`; diffusers' own pipelines have lost this method in version 0.40 or before."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self):
        """As `vae.disable_tiling()`."""
        self.vae.disable_tiling()

    def maybe_convert_prompt(self, prompt: str | list[str], tokenizer):
        """
        As the parent's, which every prompt and negative prompt passes through.

        Raises:
            ValueError: if the tokenizer or the text encoder has no token for a part of a prompt.
        """
        prompt = super().maybe_convert_prompt(prompt, tokenizer)
        for text in [prompt] if isinstance(prompt, str) else prompt:
            check_tokens(text, tokenizer, self.text_encoder)
        return prompt

    @classmethod
    def lora_state_dict(cls, *args, **kwargs):
        state_dict, *others = super().lora_state_dict(*args, **kwargs)
        return ({name: value for name, value in state_dict.items() if not _is_convolution(name)}, *others)

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict, adapter_name: str | None = None, **kwargs):
        """
        As the parent's; an adapter trained by `train_pqsd.py --lora_rank` also holds the widened first and last
        convolution, which replace those of the UNet, and stay when the adapter is unloaded.

        Raises:
            ValueError: if these convolutions are for another number of latent channels.
        """
        loading = {name: value for name, value in kwargs.items() if name not in ("hotswap", "low_cpu_mem_usage")}
        state_dict = super().lora_state_dict(pretrained_model_name_or_path_or_dict, **loading)[0]
        convolutions = {name.removeprefix("unet."): v for name, v in state_dict.items() if _is_convolution(name)}
        channels = self.unet.config.in_channels
        if convolutions and convolutions["conv_in.weight"].shape[1] != channels:
            raise ValueError(
                f"The adapter is for {convolutions['conv_in.weight'].shape[1]} latent channels, but the UNet has "
                f"{channels}: load the pipeline with the `vae` that lies beside the adapter."
            )
        super().load_lora_weights(pretrained_model_name_or_path_or_dict, adapter_name, **kwargs)
        self.unet.load_state_dict(convolutions, strict=False)

    def _encode_vae_image(self, image: torch.Tensor, generator=None) -> torch.Tensor:
        """
        The latents a denoiser sees: quantised, then normalised. Deterministic, so the generator is not used.

        Args:
            image (`torch.Tensor`): Pictures `(B, 3, H, W)` in [-1, 1], or latents `(B, d, h, w)`, kept as they are.
        """
        if image.shape[1] == self.vae.config.latent_channels:
            return image
        latents = self.vae.encode(image).latents
        return self.vae.scale_latents(self.vae.quantize(latents).latents)

    def _decode_latents(self, latents: torch.Tensor, quantize_latents: bool, output_type: str):
        latents = self.vae.unscale_latents(latents)
        images = self.vae.decode(latents, quantize=quantize_latents, return_dict=False)[0]
        images, nsfw = self.run_safety_checker(images, self._execution_device, images.dtype)
        denormalize = [True] * len(images) if nsfw is None else [not flagged for flagged in nsfw]
        return self.image_processor.postprocess(images, output_type, do_denormalize=denormalize), nsfw

    def _generate(
        self,
        parent_call: Callable,
        guidance_scale: float | None,
        quantize_latents: bool,
        output_type: str,
        return_dict: bool,
    ) -> StableDiffusionPipelineOutput | tuple:
        if guidance_scale is None:
            guidance_scale = self.config.guidance_scale
        # The parent would divide by `scaling_factor` only and could not switch the snapping off: it makes latents.
        images, nsfw = parent_call(guidance_scale=guidance_scale, output_type="latent", return_dict=False)
        if output_type != "latent":
            images, nsfw = self._decode_latents(images, quantize_latents, output_type)
            self.maybe_free_model_hooks()
        if not return_dict:
            return (images, nsfw)
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=nsfw)


def _is_convolution(name: str) -> bool:
    return name.startswith(("unet.conv_in.", "unet.conv_out.")) and "lora" not in name


def check_tokens(prompt: str, tokenizer, text_encoder):
    tokens = tokenizer(prompt, add_special_tokens=False).input_ids
    # CLIP's unknown token is its end mark too: the text encoder would not see what comes after it.
    if tokenizer.unk_token_id in tokens and tokenizer.unk_token not in prompt:
        raise ValueError(
            f"The tokenizer has no tokens for a part of `prompt` {prompt!r} (it reads {tokenizer.decode(tokens)!r}): "
            f"leave that out, or load a tokenizer that has them."
        )
    known = text_encoder.get_input_embeddings().num_embeddings if text_encoder is not None else math.inf
    missing = [token for token in tokens if token >= known]
    if missing:
        raise ValueError(
            f"The text encoder has {known} tokens and none for {tokenizer.convert_ids_to_tokens(missing)} of `prompt` "
            f"{prompt!r}: load the tokenizer that belongs to it, or "
            f"`text_encoder.resize_token_embeddings(len(tokenizer))`."
        )


def _check_components(vae, unet):
    # A component may be None (loaded later), or a list of class names while `from_pretrained` is at work.
    if isinstance(vae, torch.nn.Module) and not isinstance(_original(vae), PQModel):
        raise TypeError(
            f"`vae` must be a PQModel, but is a {type(vae).__name__}. A plain Stable Diffusion becomes a starting "
            "point by `StableDiffusionPQPipeline.from_stable_diffusion(..., vae=pq_model)`."
        )
    if not isinstance(vae, torch.nn.Module) or not isinstance(unet, torch.nn.Module):
        return
    if unet.config.in_channels != vae.config.latent_channels:
        raise ValueError(
            f"The `unet` takes {unet.config.in_channels} latent channels, but the `vae` has "
            f"{vae.config.latent_channels}. Widen the UNet first: `diffusers_pq.widen_unet(unet, "
            f"latent_channels={vae.config.latent_channels})`, then adapt it."
        )


def _original(module: torch.nn.Module) -> torch.nn.Module:
    return getattr(module, "_orig_mod", module)  # what `torch.compile` wraps
