"""
Blocks for the modular pipelines of diffusers whose `vae` is a `PQModel`.

This file needs diffusers alone: it is also the code that lies beside a `modular_model_index.json`, see
`diffusers_pq.hub.modular`.
"""

import inspect
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
from diffusers.modular_pipelines.stable_diffusion_3.denoise import StableDiffusion3LoopAfterDenoiser
from diffusers.modular_pipelines.stable_diffusion_xl.decoders import StableDiffusionXLInpaintOverlayMaskStep
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLInpaintLoopAfterDenoiser
from diffusers.modular_pipelines.stable_diffusion_xl.encoders import StableDiffusionXLInpaintVaeEncoderStep
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
            given = self.spread("image", block_state.image_latents, block_state)
            noise = randn_tensor(given.shape, block_state.generator, given.device, given.dtype)
            block_state.latents = components.scheduler.add_noise(given, noise, block_state.latent_timestep)
        self.set_block_state(state, block_state)
        return components, state

    @staticmethod
    def spread(name: str, given: torch.Tensor, block_state) -> torch.Tensor:
        """What belongs to given pictures, repeated for all that are generated."""
        count = block_state.batch_size * block_state.num_images_per_prompt
        if count % len(given):
            raise ValueError(f"Cannot spread {len(given)} pictures (`{name}`) over {count} to generate.")
        return given.repeat_interleave(count // len(given), dim=0).to(dtype=block_state.dtype)


class PQInpaintEncodeStep(CodeBesideMixin, StableDiffusionXLInpaintVaeEncoderStep):
    """Encodes pictures as [`PQEncodeStep`] does, and makes masks of their latents, for Stable Diffusion XL."""

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("vae"), *(spec for spec in super().expected_components if spec.name != "vae")]

    def _encode_vae_image(self, components, image: torch.Tensor, generator) -> torch.Tensor:
        vae = _pq_model(components)
        latents = vae.quantize(vae.encode(image.to(vae.dtype)).latents).latents
        return vae.scale_latents(latents).to(image.dtype)

    def prepare_mask_latents(self, components, mask, masked_image, *sizes) -> tuple:
        # The latents of a picture without what the mask hides are for UNets that take them as an input.
        return super().prepare_mask_latents(components, mask, None, *sizes)


class PQAutoInpaintEncodeStep(CodeBesideMixin, AutoPipelineBlocks):
    """[`PQInpaintEncodeStep`] if there is a `mask_image`, [`PQEncodeStep`] if there is an `image` only."""

    block_classes = [PQInpaintEncodeStep, PQEncodeStep]
    block_names = ["inpaint", "img2img"]
    block_trigger_inputs = ["mask_image", "image"]

    @property
    def description(self) -> str:
        return "Encodes pictures with the `PQModel`, with or without a mask, if there are any"


class PQInpaintPrepareLatentsStep(PQPrepareLatentsStep):
    """[`PQPrepareLatentsStep`] for inpainting, which needs the noise and the mask again after each step."""

    @property
    def description(self) -> str:
        return "Adds noise to the latents of the given pictures and spreads their masks"

    @property
    def inputs(self) -> list[InputParam]:
        return [
            *super().inputs,
            InputParam("strength", default=0.9999, description="1 begins with noise alone"),
            InputParam("mask", required=True, type_hint=torch.Tensor),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        names = ("latents", "noise", "image_latents", "mask")
        return [OutputParam(name, type_hint=torch.Tensor) for name in names]

    @torch.no_grad()
    def __call__(self, components, state: PipelineState) -> tuple:
        block_state, scheduler = self.get_block_state(state), components.scheduler
        given = self.spread("image", block_state.image_latents, block_state)
        block_state.mask = self.spread("mask_image", block_state.mask, block_state)
        noise = block_state.latents
        if noise is None:
            noise = randn_tensor(given.shape, block_state.generator, given.device, given.dtype)
        if block_state.latents is not None or block_state.strength == 1:
            block_state.latents = noise * scheduler.init_noise_sigma
        else:
            block_state.latents = scheduler.add_noise(given, noise, block_state.latent_timestep)
        block_state.noise, block_state.image_latents = noise, given
        self.set_block_state(state, block_state)
        return components, state


class PQInpaintAfterDenoiserStep(CodeBesideMixin, StableDiffusionXLInpaintLoopAfterDenoiser):
    """A step of the scheduler after which what the mask keeps is put back, with UNets of any number of channels."""

    @torch.no_grad()
    def __call__(self, components, block_state, i: int, t: torch.Tensor) -> tuple:
        components, block_state = super().__call__(components, block_state, i, t)
        if components.num_channels_unet != 4:  # those of 4 the parent knows
            kept, later = block_state.image_latents, block_state.timesteps[i + 1 : i + 2]
            if len(later):
                kept = components.scheduler.add_noise(kept, block_state.noise, later)
            block_state.latents = torch.lerp(kept, block_state.latents, block_state.mask)
        return components, block_state


class PQAfterDenoiserStep(CodeBesideMixin, StableDiffusion3LoopAfterDenoiser):
    """A step of Stable Diffusion 3's scheduler, also where the transformer predicts latents in place of velocities."""

    @torch.no_grad()
    def __call__(self, components, block_state, i: int, t: torch.Tensor) -> tuple:
        scheduler = components.scheduler
        knows_types = "prediction_type" in inspect.signature(type(scheduler).__init__).parameters
        if scheduler.config.get("prediction_type") == "sample" and not knows_types:
            sigma = t / scheduler.config.num_train_timesteps
            block_state.noise_pred = (block_state.latents - block_state.noise_pred) / sigma
        return super().__call__(components, block_state, i, t)


class PQBlocksMixin(CodeBesideMixin):
    """Put before all blocks of a family of diffusers, replaces those that encode and decode pictures."""

    def __init__(self):
        super().__init__()
        self.sub_blocks["vae_encoder"] = PQAutoEncodeStep()
        self.sub_blocks["decode"] = PQDecodeStep()


# With `SequentialPipelineBlocks` among their bases, by which `diffusers-cli custom_blocks` recognises them.
class StableDiffusionXLPQBlocks(PQBlocksMixin, StableDiffusionXLAutoBlocks, SequentialPipelineBlocks):
    """Stable Diffusion XL: text-to-image, image-to-image and inpainting."""

    def __init__(self):
        super().__init__()
        self.sub_blocks["vae_encoder"] = PQAutoInpaintEncodeStep()
        self.sub_blocks["mask_overlay"] = StableDiffusionXLInpaintOverlayMaskStep()
        steps = self.sub_blocks["denoise"].sub_blocks
        before, loops = steps["before_denoise"].sub_blocks, steps["denoise"].sub_blocks
        before["img2img"].sub_blocks["prepare_latents"] = PQPrepareLatentsStep()
        before["inpaint"].sub_blocks["prepare_latents"] = PQInpaintPrepareLatentsStep()
        with_control = loops["controlnet_denoise"].sub_blocks["inpaint_controlnet_denoise"]
        for loop in (loops["inpaint_denoise"], with_control):
            loop.sub_blocks["after_denoiser"] = PQInpaintAfterDenoiserStep()


class StableDiffusion3PQBlocks(PQBlocksMixin, StableDiffusion3AutoBlocks, SequentialPipelineBlocks):
    """Stable Diffusion 3 and 3.5: text-to-image and image-to-image."""

    def __init__(self):
        super().__init__()
        for workflow in self.sub_blocks["denoise"].sub_blocks.values():
            workflow.sub_blocks["denoise"].sub_blocks["after_denoiser"] = PQAfterDenoiserStep()


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
