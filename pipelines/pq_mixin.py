"""What pipelines of diffusers on product-quantised latents share: encoding, decoding, checks, saving."""

import copy
import functools
import inspect
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput

import diffusers_pq
from diffusers_pq.images import to_rgb
from diffusers_pq.models.autoencoder_pq import PQModel
from diffusers_pq.models.widening import ENDS, widen_denoiser


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
        with `trust_remote_code=True`. It only imports it; `diffusers_pq` must be installed.
        diffusers prefers it to a `custom_pipeline`: load sibling pipelines by their own classes.
        """
        path = Path(json_file_path)
        config = json.loads(self.to_json_string()) | {"_class_name": ["pipeline", type(self).__name__]}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        path.with_name("pipeline.py").write_text(_PIPELINE_CODE.format(name=type(self).__name__), encoding="utf-8")

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        # This class is already imported: no code that came with the files is run.
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


class PQImageProcessor(VaeImageProcessor):
    """
    [`VaeImageProcessor`] that tells pictures from latents: only tensors whose channels are `vae_latent_channels` are
    latents, and pass through. `vae_latent_channels` is `None` where pictures have as many channels.
    """

    def preprocess(self, image, *args, **kwargs) -> torch.Tensor:
        """
        As the parent's; PIL pictures may be of any mode, and transparent parts come on white.

        Raises:
            ValueError: if a picture that is not a tensor has as many channels as latents.
        """
        first = image[0] if isinstance(image, list) else image
        if isinstance(first, PIL.Image.Image):
            image = [to_rgb(picture, upright=False) for picture in (image if isinstance(image, list) else [image])]
        processed = super().preprocess(image, *args, **kwargs)
        if not isinstance(first, torch.Tensor) and processed.shape[1] == self.config.vae_latent_channels:
            raise ValueError(
                f"`image` must hold RGB pictures, but has {processed.shape[1]} channels: only tensors may be latents."
            )
        return processed


class PQLatentsMixin(ImportedByCodeMixin):
    """
    Put before an image pipeline of diffusers, makes it work on the normalised latents of a [`PQModel`]. All that
    depends on the family of pipelines stands in its attributes.

    A pipeline takes what its parent takes, and a `guidance_scale`: the default of `__call__`, else the parent's, saved
    with the pipeline. A model that was adapted to few pictures wants less than its source.

    Raises:
        TypeError: if the `vae` is no `PQModel`.
        ValueError: if the denoiser's channels are not the autoencoder's latent channels; the message names both.
    """

    # The component that denoises, and where its first and last layer are.
    _denoiser_name = "unet"
    _ends = ENDS["UNet2DConditionModel"]
    # Stable Diffusion XL's UNets also take sizes.
    _takes_sizes = False
    # What makes a starting point of a plain pipeline.
    _starting_point = "StableDiffusionPQPipeline.from_stable_diffusion"
    # Without these there are no prompts but embedded ones.
    _prompt_components = ("tokenizer", "text_encoder")

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if issubclass(cls, DiffusionPipeline) and "__init__" not in vars(cls):
            cls.__init__ = _take_guidance_scale(super())
        if issubclass(cls, DiffusionPipeline) and "__call__" in vars(cls):
            cls.__call__ = _with_arguments_of(super().__call__, cls.__call__)

    def register_modules(self, **modules):
        # Every pipeline hands its components to this method when it is built.
        self._check_components(modules.get("vae"), modules.get(self._denoiser_name))
        super().register_modules(**modules)

    def _check_components(self, vae, denoiser):
        # A component may be None (loaded later), or a list of class names while `from_pretrained` is at work.
        if isinstance(vae, torch.nn.Module) and not isinstance(_original(vae), PQModel):
            raise TypeError(
                f"`vae` must be a PQModel, but is of class {type(vae).__name__}. A plain pipeline becomes a starting "
                f"point by `{self._starting_point}(..., vae=pq_model)`."
            )
        if not isinstance(vae, torch.nn.Module) or not isinstance(denoiser, torch.nn.Module):
            return
        name, channels = self._denoiser_name, vae.config.latent_channels
        if (denoiser.config.get("addition_embed_type") == "text_time") != self._takes_sizes:
            raise ValueError(
                f"The `{name}` {'is not a' if self._takes_sizes else 'is a'} UNet of Stable Diffusion XL: "
                f"{type(self).__name__} takes {'only such' if self._takes_sizes else 'no such'} UNets."
            )
        if denoiser.config.in_channels != channels:
            raise ValueError(
                f"The `{name}` takes {denoiser.config.in_channels} latent channels, but the `vae` has {channels}. "
                f"Widen it first: `diffusers_pq.widen_denoiser({name}, latent_channels={channels})`, then adapt it."
            )

    @classmethod
    def _start_from(cls, source_class: type, path: str | os.PathLike, vae: PQModel, init: str, **kwargs):
        """The pipeline at `path`, of diffusers' `source_class`, with a widened denoiser and another autoencoder."""
        options = {name: value for name, value in kwargs.items() if name in _DOWNLOADING}
        config = source_class.load_config(path, **options)
        expected = {name for name in source_class._get_signature_keys(source_class)[0] if _is_text_encoder(name)}
        if {name for name in config if _is_text_encoder(name)} != expected or config.get("requires_aesthetics_score"):
            raise ValueError(
                f"`{cls._starting_point}` starts from a {source_class.__name__} (and from no refiner), but {path} "
                f"holds a {config['_class_name']}."
            )
        source = source_class.from_pretrained(path, **in_one_dtype(kwargs))
        components = dict(source.components)
        denoiser = components[cls._denoiser_name]
        components[cls._denoiser_name] = widen_denoiser(denoiser, vae.config.latent_channels, init)
        components["vae"] = in_dtype(vae, denoiser.dtype)
        return cls(**components, **source.parameters)

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

    def enable_vae_slicing(self):
        """As `vae.enable_slicing()`."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self):
        """As `vae.disable_slicing()`."""
        self.vae.disable_slicing()

    def encode_prompt(self, prompt=None, *args, **kwargs):
        """
        As the parent's.

        Raises:
            ValueError: if there is a prompt to encode, but not all that it takes.
        """
        missing = [f"`{name}`" for name in self._prompt_components if getattr(self, name) is None]
        if prompt is not None and missing:
            raise ValueError(
                f"A `prompt` needs {' and '.join(missing)}, which the pipeline lacks: load it with them, or pass "
                "embedded prompts (`prompt_embeds`)."
            )
        return super().encode_prompt(prompt, *args, **kwargs)

    def maybe_convert_prompt(self, prompt: str | list[str], tokenizer):
        """
        As the parent's, which every prompt and negative prompt passes through.

        Raises:
            ValueError: if the tokenizer or the text encoder has no token for a part of a prompt.
        """
        prompt = super().maybe_convert_prompt(prompt, tokenizer)
        is_first = tokenizer is self.tokenizer
        for text in [prompt] if isinstance(prompt, str) else prompt:
            check_tokens(text, tokenizer, self.text_encoder if is_first else self.text_encoder_2)
        return prompt

    @classmethod
    def _is_outer_layer(cls, name: str) -> bool:
        """Whether a weight of an adapter file is not of an adapter, but of the denoiser's first or last layer."""
        outer = tuple(f"{cls._denoiser_name}.{layer}." for layer in (cls._ends.first, cls._ends.last))
        return name.startswith(outer) and "lora" not in name

    @classmethod
    def lora_state_dict(cls, *args, **kwargs):
        loaded = super().lora_state_dict(*args, **kwargs)
        state_dict, *others = loaded if isinstance(loaded, tuple) else (loaded,)
        layers = {name: value for name, value in state_dict.items() if not cls._is_outer_layer(name)}
        return (layers, *others) if isinstance(loaded, tuple) else layers

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict, adapter_name: str | None = None, **kwargs):
        """
        As the parent's; an adapter trained by `train_pqsd.py --lora_rank` also holds the widened first and last layer,
        which replace those of the denoiser, and stay when the adapter is unloaded.

        Raises:
            ValueError: if these layers are for another number of latent channels, or cannot be reached because each
                layer of the denoiser is offloaded by itself.
        """
        source = pretrained_model_name_or_path_or_dict
        loading = {name: value for name, value in kwargs.items() if name not in ("hotswap", "low_cpu_mem_usage")}
        # The parent takes out of a dict what it reads.
        loaded = super().lora_state_dict(dict(source) if isinstance(source, dict) else source, **loading)
        outer = self._outer_layers(loaded[0] if isinstance(loaded, tuple) else loaded)
        self._check_outer_layers(outer)
        super().load_lora_weights(source, adapter_name, **kwargs)
        for layer, weights in outer.items():
            self._plain_layer(layer).load_state_dict(weights)

    def _outer_layers(self, state_dict: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """The weights of the denoiser's first and last layer, where an adapter file has them."""
        outer = {}
        for layer in (self._ends.first, self._ends.last):
            prefix = f"{self._denoiser_name}.{layer}."
            names = [name for name in state_dict if name.startswith(prefix) and self._is_outer_layer(name)]
            if names:
                outer[layer] = {name.removeprefix(prefix): state_dict[name] for name in names}
        return outer

    def _check_outer_layers(self, outer: dict[str, dict[str, torch.Tensor]]):
        channels = getattr(self, self._denoiser_name).config.in_channels
        first = outer.get(self._ends.first)
        if first and first["weight"].shape[1] != channels:
            raise ValueError(
                f"The adapter is for {first['weight'].shape[1]} latent channels, but the `{self._denoiser_name}` has "
                f"{channels}: load the pipeline with the `vae` in the adapter's folder."
            )
        if any(self._plain_layer(layer).weight.is_meta for layer in outer):
            raise ValueError("The adapter holds whole layers: load it before `enable_sequential_cpu_offload`.")

    def _plain_layer(self, name: str) -> torch.nn.Module:
        """A layer of the denoiser, whether that is compiled or adapters wrap the layer."""
        layer = _original(getattr(self, self._denoiser_name)).get_submodule(name)
        return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer

    def _encode_vae_image(self, image: torch.Tensor, generator=None) -> torch.Tensor:
        """
        The latents a denoiser sees: quantised, then normalised. Deterministic, so the generator is not used.

        Args:
            image (`torch.Tensor`):
                Pictures `(B, 3, H, W)` in [-1, 1], or latents `(B, d, h, w)`, kept as they are; if d = 3, pictures.
        """
        if image.shape[1] == self.image_processor.config.vae_latent_channels:
            return image
        with _upcast(self.vae):
            latents = self.vae.encode(image.to(self.vae.dtype)).latents
            return self.vae.scale_latents(self.vae.quantize(latents).latents).to(image.dtype)

    def _decode_latents(self, latents: torch.Tensor, quantize_latents: bool) -> torch.Tensor:
        """Pictures `(B, 3, H, W)` in [-1, 1] of what [`~PQLatentsMixin._denoise`] gives."""
        with _upcast(self.vae):
            latents = self.vae.unscale_latents(latents.to(self.vae.dtype))
            return self.vae.decode(latents, quantize=quantize_latents, return_dict=False)[0]

    def _denoise(self, parent_call: Callable, guidance_scale: float) -> BaseOutput:
        # The parent would divide by `scaling_factor` only and could not switch the snapping off: it makes latents.
        return parent_call(guidance_scale=guidance_scale, output_type="latent", return_dict=True)

    def _postprocess(self, images: torch.Tensor, output_type: str) -> dict:
        """The fields of the parent's output, of decoded pictures."""
        return {"images": self.image_processor.postprocess(images, output_type)}

    def _generate(
        self,
        parent_call: Callable,
        guidance_scale: float | None,
        quantize_latents: bool,
        output_type: str,
        return_dict: bool,
    ) -> BaseOutput | tuple:
        if guidance_scale is None:
            guidance_scale = self.config.guidance_scale
        output = self._denoise(parent_call, guidance_scale)
        if output_type != "latent":
            images = self._decode_latents(output.images, quantize_latents)
            output = type(output)(**self._postprocess(images, output_type))
        self.maybe_free_model_hooks()
        return output if return_dict else tuple(vars(output).values())


# Options of `from_pretrained` that say where files come from.
_DOWNLOADING = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


def _is_text_encoder(name: str) -> bool:
    return name.startswith("text_encoder")


def _take_guidance_scale(parent: type) -> Callable:
    """
    An `__init__` with the parent's signature, from which diffusers reads what components and settings a pipeline has,
    but with a [`PQModel`] as its `vae` and a default `guidance_scale`.
    """
    parameters = dict(inspect.signature(parent.__init__).parameters)
    default = inspect.signature(parent.__call__).parameters["guidance_scale"].default
    scale = inspect.Parameter("guidance_scale", inspect.Parameter.KEYWORD_ONLY, default=default, annotation=float)
    parameters |= {"vae": parameters["vae"].replace(annotation=PQModel), "guidance_scale": scale}

    def __init__(self, *args, guidance_scale: float = default, **kwargs):
        given = inspect.signature(parent.__init__).bind(self, *args, **kwargs).arguments
        with _unchanged_config(given.get(self._denoiser_name)):
            parent.__init__(self, *args, **kwargs)
        self.register_to_config(guidance_scale=guidance_scale)
        if self.vae is not None:
            config = self.vae.config
            is_ambiguous = config.latent_channels == config.in_channels
            self.image_processor = PQImageProcessor.from_config(
                self.image_processor.config, vae_latent_channels=None if is_ambiguous else config.latent_channels
            )

    __init__.__signature__ = inspect.Signature(list(parameters.values()))
    annotations = {name: value.annotation for name, value in parameters.items()}
    __init__.__annotations__ = {name: value for name, value in annotations.items() if value is not inspect._empty}
    return __init__


def _with_arguments_of(parent_call: Callable, call: Callable) -> Callable:
    """A `__call__` that takes, and shows, all arguments of the parent's in their order, and by keyword its own."""
    own, parents = (dict(inspect.signature(function).parameters) for function in (call, parent_call))
    parameters = [own[name].replace(kind=value.kind) if name in own else value for name, value in parents.items()]
    rest = [parameters.pop()] if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    added = [value for name, value in own.items() if name not in parents and value.kind not in variable]
    added = [value.replace(kind=inspect.Parameter.KEYWORD_ONLY) for value in added]
    names = [value.name for value in parameters[1:]]

    @functools.wraps(call)
    def __call__(self, *args, **kwargs):
        if len(args) > len(names):
            raise TypeError(f"{type(self).__name__} takes {len(names)} positional arguments, but got {len(args)}.")
        return call(self, **dict(zip(names, args)), **kwargs)

    __call__.__signature__ = inspect.Signature([*parameters, *added, *rest])
    return __call__


@contextmanager
def _unchanged_config(denoiser: torch.nn.Module | None) -> Iterator[None]:
    """Parents give UNets that were saved by an old diffusers the `sample_size` of Stable Diffusion, 64, at least."""
    if not isinstance(denoiser, torch.nn.Module):
        yield
        return
    config = denoiser.config
    yield
    _original(denoiser)._internal_dict = config


@contextmanager
def _upcast(vae: PQModel) -> Iterator[None]:
    """An autoencoder that overflows in float16 (`force_upcast`) is in float32 for as long."""
    needs_upcasting = vae.dtype == torch.float16 and vae.config.force_upcast
    if needs_upcasting:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if needs_upcasting:
            vae.to(torch.float16)


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


def _original(module: torch.nn.Module) -> torch.nn.Module:
    return getattr(module, "_orig_mod", module)  # what `torch.compile` wraps
