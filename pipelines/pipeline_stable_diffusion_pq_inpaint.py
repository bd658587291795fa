"""Inpainting with Stable Diffusion on product-quantised latents."""

from functools import partial

import torch
from diffusers import StableDiffusionInpaintPipeline
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

from diffusers_pq.pipelines.pipeline_stable_diffusion_pq import StableDiffusionPQMixin
from diffusers_pq.pipelines.pq_image_mixins import PQInpaintMixin
from diffusers_pq.pipelines.pq_mixin import ACCEPTED_SIZE


class StableDiffusionPQInpaintPipeline(StableDiffusionPQMixin, PQInpaintMixin, StableDiffusionInpaintPipeline):
    r"""
    [`StableDiffusionInpaintPipeline`] whose `vae` is a [`PQModel`]; see [`StableDiffusionPQPipeline`].

    It works with the text-to-image UNet (d input channels), as the parent does with one of 4: what the mask keeps is
    put back after each denoising step. UNets that also take the mask as input (9 channels in Stable Diffusion) are
    refused.

    Raises:
        TypeError: if the `vae` is no `PQModel`.
        ValueError: if the UNet's channels are not the autoencoder's latent channels; the message names both.
    """

    def check_inputs(self, prompt, image, mask_image, height, width, *args, **kwargs):
        self._check_size(height, width)
        super().check_inputs(prompt, image, mask_image, *ACCEPTED_SIZE, *args, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        guidance_scale: float | None = None,
        quantize_latents: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        **kwargs,
    ) -> StableDiffusionPipelineOutput | tuple:
        r"""
        Repaint what a mask marks.

        Args:
            prompt (`str` or `list[str]`, *optional*): The prompt or prompts.
            image: Pictures as the parent takes them.
            mask_image: White is repainted, black is kept; as the parent takes it.
            height, width (`int`, *optional*): Pixels, multiples of F; default: the UNet's sample size times F.
            padding_mask_crop (`int`, *optional*):
                Repaint only a crop around the mask with this margin, and paste it into `image`. Needs PIL pictures.
            guidance_scale (`float`, *optional*): Default: that of the pipeline's configuration.
            quantize_latents (`bool`, *optional*, defaults to `True`):
                Whether to snap the denoised latents to the codebooks before decoding.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`; the latter are neither unscaled nor snapped.
            return_dict (`bool`, *optional*, defaults to `True`): Output class or plain tuple.
            kwargs: All other arguments of [`StableDiffusionInpaintPipeline.__call__`].

        Returns:
            [`~pipelines.stable_diffusion.StableDiffusionPipelineOutput`] or a tuple of its two fields.
        """
        parent_call = partial(super().__call__, prompt, **kwargs)
        inputs = image, mask_image, height, width, padding_mask_crop
        return self._inpaint(parent_call, *inputs, guidance_scale, quantize_latents, output_type, return_dict)
