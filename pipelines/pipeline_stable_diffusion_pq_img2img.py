"""Image-to-image generation with Stable Diffusion on product-quantised latents."""

from functools import partial

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

from diffusers_pq.pipelines.pipeline_stable_diffusion_pq import StableDiffusionPQMixin
from diffusers_pq.pipelines.pq_image_mixins import PQImg2ImgMixin


class StableDiffusionPQImg2ImgPipeline(StableDiffusionPQMixin, PQImg2ImgMixin, StableDiffusionImg2ImgPipeline):
    r"""
    [`StableDiffusionImg2ImgPipeline`] whose `vae` is a [`PQModel`]; see [`StableDiffusionPQPipeline`].

    Raises:
        TypeError: if the `vae` is no `PQModel`.
        ValueError: if the UNet's channels are not the autoencoder's latent channels; the message names both.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.8,
        *,
        guidance_scale: float | None = None,
        quantize_latents: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        **kwargs,
    ) -> StableDiffusionPipelineOutput | tuple:
        r"""
        Generate pictures that start from given ones.

        Args:
            prompt (`str` or `list[str]`, *optional*): The prompt or prompts.
            image: Pictures as the parent takes them, or normalised latents `(B, d, h, w)`.
            strength (`float`, *optional*, defaults to 0.8): How much to change, in [0, 1].
            guidance_scale (`float`, *optional*): Default: that of the pipeline's configuration.
            quantize_latents (`bool`, *optional*, defaults to `True`):
                Whether to snap the denoised latents to the codebooks before decoding.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`; the latter are neither unscaled nor snapped.
            return_dict (`bool`, *optional*, defaults to `True`): Output class or plain tuple.
            kwargs: All other arguments of [`StableDiffusionImg2ImgPipeline.__call__`].

        Returns:
            [`~pipelines.stable_diffusion.StableDiffusionPipelineOutput`] or a tuple of its two fields.
        """
        parent_call = partial(super().__call__, prompt, image, strength, **kwargs)
        return self._generate(parent_call, guidance_scale, quantize_latents, output_type, return_dict)
