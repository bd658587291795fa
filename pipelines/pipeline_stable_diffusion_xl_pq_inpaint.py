"""Inpainting with Stable Diffusion XL on product-quantised latents."""

from functools import partial

import torch
from diffusers import StableDiffusionXLInpaintPipeline
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput

from diffusers_pq.pipelines.pipeline_stable_diffusion_xl_pq import StableDiffusionXLPQMixin
from diffusers_pq.pipelines.pq_image_mixins import PQInpaintMixin
from diffusers_pq.pipelines.pq_mixin import ACCEPTED_SIZE


class StableDiffusionXLPQInpaintPipeline(StableDiffusionXLPQMixin, PQInpaintMixin, StableDiffusionXLInpaintPipeline):
    r"""
    [`StableDiffusionXLInpaintPipeline`] whose `vae` is a [`PQModel`]; see [`StableDiffusionXLPQPipeline`]. It works
    with the text-to-image UNet, as [`StableDiffusionPQInpaintPipeline`] does.

    Raises:
        TypeError: if the `vae` is no `PQModel`.
        ValueError: if the UNet's channels are not the autoencoder's latent channels, or it is not one of Stable
            Diffusion XL.
    """

    def check_inputs(self, prompt, prompt_2, image, mask_image, height, width, *args, **kwargs):
        self._check_size(height, width)
        super().check_inputs(prompt, prompt_2, image, mask_image, *ACCEPTED_SIZE, *args, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
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
    ) -> StableDiffusionXLPipelineOutput | tuple:
        r"""
        Repaint what a mask marks.

        Args:
            prompt, prompt_2 (`str` or `list[str]`, *optional*): Of each text encoder; `prompt_2` defaults to `prompt`.
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
            kwargs: All other arguments of [`StableDiffusionXLInpaintPipeline.__call__`].

        Returns:
            [`~pipelines.stable_diffusion_xl.StableDiffusionXLPipelineOutput`] or a tuple of its one field.

        Raises:
            ValueError: if the latents are to be handed over to a refiner or from one.
        """
        self._refuse_refiner(kwargs)
        parent_call = partial(super().__call__, prompt, prompt_2, **kwargs)
        inputs = image, mask_image, height, width, padding_mask_crop
        return self._inpaint(parent_call, *inputs, guidance_scale, quantize_latents, output_type, return_dict)
