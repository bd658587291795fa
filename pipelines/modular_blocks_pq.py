"""
Blocks for the modular pipelines of diffusers whose `vae` is a `PQModel`.

This file needs diffusers alone: it is also the code that lies beside a `modular_model_index.json`, see
`diffusers_pq.hub.modular`.
"""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    Flux2AutoBlocks,
    Flux2KleinAutoBlocks,
    Flux2KleinBaseAutoBlocks,
    FluxAutoBlocks,
    ModularPipelineBlocks,
    QwenImageAutoBlocks,
    SequentialPipelineBlocks,
    StableDiffusion3AutoBlocks,
    StableDiffusionXLAutoBlocks,
    ZImageAutoBlocks,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.image_processor import VaeImageProcessor
from diffusers.modular_pipelines import AutoPipelineBlocks, ComponentSpec, InputParam, OutputParam, PipelineState
from diffusers.utils.torch_utils import randn_tensor


class CodeBesideMixin:
    """Put before blocks of this file, writes the file beside what `save_pretrained` writes: diffusers looks for it."""

    def save_config(self, save_directory: str | os.PathLike, **kwargs):
        folder, code = Path(save_directory), Path(__file__)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / code.name).exists() or not code.samefile(folder / code.name):
            (folder / code.name).write_text(code.read_text(encoding="utf-8"), encoding="utf-8")
        super().save_config(save_directory, **kwargs)


class PQEncodeStep(CodeBesideMixin, ModularPipelineBlocks):
    """
    Encodes pictures into the latents `[B, d, H/F, W/F]` that a denoiser sees: quantised, then normalised by channel.

    Sides are rounded down to multiples of F, and of 2F for transformers, which make patches of 2 x 2 latent pixels.
    """

    @property
    def description(self) -> str:
        return "Encodes pictures into quantised latents, normalised by channel, with the `PQModel`"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        # Without a type: loaded by `AutoModel`, from the code that lies beside the weights.
        return [ComponentSpec("vae")]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("image", required=True, description="PIL pictures, arrays or tensors"),
            InputParam("height", type_hint=int, description="Pixels; default: the picture's"),
            InputParam("width", type_hint=int, description="Pixels; default: the picture's"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("image_latents", type_hint=torch.Tensor, description="Normalised latents")]

    @torch.no_grad()
    def __call__(self, components, state: PipelineState) -> tuple:
        block_state, vae = self.get_block_state(state), _pq_model(components)
        multiple = vae.downsampling_factor * (2 if hasattr(components, "transformer") else 1)
        processor = VaeImageProcessor(vae_scale_factor=multiple, do_convert_rgb=True)
        image = processor.preprocess(block_state.image, height=block_state.height, width=block_state.width)
        image = image.to(components._execution_device, vae.dtype)
        latents = vae.quantize(vae.encode(image).latents).latents
        block_state.image_latents = self.arrange(vae.scale_latents(latents).to(vae.dtype))
        self.set_block_state(state, block_state)
        return components, state

    def arrange(self, latents: torch.Tensor) -> torch.Tensor:
        """The form in which a family takes latents."""
        return latents


class PQFrameEncodeStep(PQEncodeStep):
    """[`PQEncodeStep`] for Qwen-Image, whose latents are those of a video of one frame: `[B, d, 1, H/F, W/F]`."""

    def arrange(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.unsqueeze(2)


class PQAutoEncodeStep(CodeBesideMixin, AutoPipelineBlocks):
    """[`PQEncodeStep`] if there is an `image`, else nothing."""

    block_classes = [PQEncodeStep]
    block_names = ["img2img"]
    block_trigger_inputs = ["image"]

    @property
    def description(self) -> str:
        return "Encodes pictures with the `PQModel`, if there are any"


class PQAutoFrameEncodeStep(PQAutoEncodeStep):
    """[`PQFrameEncodeStep`] if there is an `image`, else nothing."""

    block_classes = [PQFrameEncodeStep]


class PQLevelsStep(CodeBesideMixin, ModularPipelineBlocks):
    """Tells F to the pipelines of Qwen-Image, which count an attribute that only their own autoencoder has."""

    @property
    def description(self) -> str:
        return "Tells the pipeline the downsampling factor of the `PQModel`"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("vae")]

    @torch.no_grad()
    def __call__(self, components, state: PipelineState) -> tuple:
        vae = _pq_model(components)
        vae.temperal_downsample = [False] * (vae.downsampling_factor.bit_length() - 1)
        return components, state


class PQDecodeStep(CodeBesideMixin, ModularPipelineBlocks):
    """
    Decodes the latents of a denoiser: their normalisation is undone, they are snapped to the codebooks, and decoded.

    Latents are `[B, d, h, w]`; `[B, d, 1, h, w]`, as Qwen-Image has them; or as Flux 2 packs them, `[B, 4d, h/2, w/2]`
    in the order channel, row, column.
    """

    @property
    def description(self) -> str:
        return "Snaps normalised latents to the codebooks of the `PQModel` and decodes them into pictures"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        processor = {"config": FrozenDict({"vae_scale_factor": 8}), "default_creation_method": "from_config"}
        return [ComponentSpec("vae"), ComponentSpec("image_processor", VaeImageProcessor, **processor)]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("latents", required=True, type_hint=torch.Tensor, description="What the denoiser has made"),
            InputParam("output_type", default="pil", description="'pil', 'np', 'pt' or 'latent'"),
            InputParam("quantize_latents", default=True, type_hint=bool, description="Whether to snap the latents"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("images", description="Pictures in the form of `output_type`")]

    @torch.no_grad()
    def __call__(self, components, state: PipelineState) -> tuple:
        block_state = self.get_block_state(state)
        block_state.images = block_state.latents
        if block_state.output_type != "latent":
            images = self.decode(_pq_model(components), block_state.latents, block_state.quantize_latents)
            block_state.images = components.image_processor.postprocess(images, output_type=block_state.output_type)
        self.set_block_state(state, block_state)
        return components, state

    @staticmethod
    def decode(vae, latents: torch.Tensor, quantize_latents: bool) -> torch.Tensor:
        """Pictures `[B, 3, H, W]` in [-1, 1]. Models that overflow in float16 (`force_upcast`) compute in float32."""
        channels, dtype = vae.config.latent_channels, vae.dtype
        if latents.ndim == 5:
            latents = latents[:, :, 0]
        if latents.shape[1] == 4 * channels:
            latents = F.pixel_shuffle(latents, 2)
        if latents.shape[1] != channels:
            raise ValueError(
                f"The denoiser made latents of {latents.shape[1]} channels, but the `vae` has {channels}: widen the "
                f"denoiser with `diffusers_pq.widen_denoiser(..., latent_channels={channels})` and adapt it."
            )
        needs_upcasting = dtype == torch.float16 and vae.config.force_upcast
        if needs_upcasting:
            vae.to(torch.float32)
        try:
            latents = vae.unscale_latents(latents.to(vae.dtype))
            return vae.decode(latents, quantize=quantize_latents, return_dict=False)[0]
        finally:
            if needs_upcasting:
                vae.to(dtype)


class PQPrepareLatentsStep(CodeBesideMixin, ModularPipelineBlocks):
    """
    Adds noise to the latents of pictures, for image-to-image with Stable Diffusion XL; the step of diffusers takes
    latents of other than 4 channels for pictures.
    """

    model_name = "stable-diffusion-xl"

    @property
    def description(self) -> str:
        return "Adds noise to the latents of the given pictures"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("scheduler")]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("latents", description="Noisy latents to begin with, in place of those of `image`"),
            InputParam("num_images_per_prompt", default=1),
            InputParam("generator"),
            InputParam("latent_timestep", required=True, type_hint=torch.Tensor),
            InputParam("image_latents", required=True, type_hint=torch.Tensor),
            InputParam("batch_size", required=True, type_hint=int),
            InputParam("dtype", required=True, type_hint=torch.dtype),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents", type_hint=torch.Tensor, description="Noisy latents")]

    @torch.no_grad()
    def __call__(self, components, state: PipelineState) -> tuple:
        block_state = self.get_block_state(state)
        if block_state.latents is None:
            given, count = block_state.image_latents, block_state.batch_size * block_state.num_images_per_prompt
            if count % len(given):
                raise ValueError(f"Cannot spread {len(given)} pictures (`image`) over {count} to generate.")
            given = given.repeat_interleave(count // len(given), dim=0).to(dtype=block_state.dtype)
            noise = randn_tensor(given.shape, block_state.generator, given.device, given.dtype)
            block_state.latents = components.scheduler.add_noise(given, noise, block_state.latent_timestep)
        self.set_block_state(state, block_state)
        return components, state


class PQBlocksMixin(CodeBesideMixin):
    """Put before all blocks of a family of diffusers, replaces those that encode and decode pictures."""

    def __init__(self):
        super().__init__()
        self.sub_blocks["vae_encoder"] = PQAutoEncodeStep()
        self.sub_blocks["decode"] = PQDecodeStep()


# With `SequentialPipelineBlocks` among their bases, by which `diffusers-cli custom_blocks` recognises them.
class StableDiffusionXLPQBlocks(PQBlocksMixin, StableDiffusionXLAutoBlocks, SequentialPipelineBlocks):
    """Stable Diffusion XL: text-to-image and image-to-image."""

    def __init__(self):
        super().__init__()
        before_denoise = self.sub_blocks["denoise"].sub_blocks["before_denoise"]
        before_denoise.sub_blocks["img2img"].sub_blocks["prepare_latents"] = PQPrepareLatentsStep()


class StableDiffusion3PQBlocks(PQBlocksMixin, StableDiffusion3AutoBlocks, SequentialPipelineBlocks):
    """Stable Diffusion 3 and 3.5: text-to-image and image-to-image."""


class FluxPQBlocks(PQBlocksMixin, FluxAutoBlocks, SequentialPipelineBlocks):
    """Flux.1: text-to-image and image-to-image."""


class Flux2PQBlocksMixin(PQBlocksMixin):
    """Put before all blocks of a kind of Flux.2: pictures are references there, not starting points, and left out."""

    def __init__(self):
        super().__init__()
        self.sub_blocks.pop("vae_encoder")


class Flux2PQBlocks(Flux2PQBlocksMixin, Flux2AutoBlocks, SequentialPipelineBlocks):
    """Flux.2: text-to-image."""


class Flux2KleinPQBlocks(Flux2PQBlocksMixin, Flux2KleinAutoBlocks, SequentialPipelineBlocks):
    """Flux.2 Klein: text-to-image."""


class Flux2KleinBasePQBlocks(Flux2PQBlocksMixin, Flux2KleinBaseAutoBlocks, SequentialPipelineBlocks):
    """Flux.2 Klein, not distilled: text-to-image."""


class QwenImagePQBlocks(PQBlocksMixin, QwenImageAutoBlocks, SequentialPipelineBlocks):
    """Qwen-Image: text-to-image and image-to-image."""

    def __init__(self):
        super().__init__()
        self.sub_blocks["vae_encoder"] = PQAutoFrameEncodeStep()
        self.sub_blocks.pop("controlnet_vae_encoder")
        self.sub_blocks.insert("levels", PQLevelsStep(), 0)


class ZImagePQBlocks(PQBlocksMixin, ZImageAutoBlocks, SequentialPipelineBlocks):
    """Z-Image: text-to-image and image-to-image."""


def _pq_model(components):
    vae = components.vae
    if vae is None or not hasattr(vae, "unscale_latents"):
        found = "is missing" if vae is None else f"is of class {type(vae).__name__}"
        raise TypeError(
            f"`vae` must be a PQModel, but {found}: load it with `load_components(trust_remote_code=True)` or give it "
            "to `update_components(vae=...)`."
        )
    return vae
