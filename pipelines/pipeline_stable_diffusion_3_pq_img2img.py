"""Image-to-image generation with Stable Diffusion 3 on product-quantised latents."""

from functools import partial

import torch
from diffusers import StableDiffusion3Img2ImgPipeline
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion_3 import StableDiffusion3PipelineOutput

from diffusers_pq.pipelines.pipeline_stable_diffusion_3_pq import StableDiffusion3PQMixin
from diffusers_pq.pipelines.pq_image_mixins import PQImg2ImgMixin


class StableDiffusion3PQImg2ImgPipeline(StableDiffusion3PQMixin, PQImg2ImgMixin, StableDiffusion3Img2ImgPipeline):
    r"""
    [`StableDiffusion3Img2ImgPipeline`] whose `vae` is a [`PQModel`]; see [`StableDiffusion3PQPipeline`].

    Raises:
        TypeError: if the `vae` is no `PQModel`.
        ValueError: if the transformer's channels are not the autoencoder's latent channels; the message names both.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        prompt_3: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.6,
        *,
        guidance_scale: float | None = None,
        quantize_latents: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        **kwargs,
    ) -> StableDiffusion3PipelineOutput | tuple:
        r"""
        Generate pictures that start from given ones.

        Args:
            prompt, prompt_2, prompt_3 (`str` or `list[str]`, *optional*):
                Of each text encoder; the latter two default to `prompt`.
            height, width (`int`, *optional*):
                Pixels, multiples of F times the transformer's patch size; default: its sample size times F.
            image: Pictures as the parent takes them, or normalised latents `(B, d, h, w)`.
            strength (`float`, *optional*, defaults to 0.6): How much to change, in [0, 1].
            guidance_scale (`float`, *optional*): Default: that of the pipeline's configuration.
            quantize_latents (`bool`, *optional*, defaults to `True`):
                Whether to snap the denoised latents to the codebooks before decoding.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`; the latter are neither unscaled nor snapped.
            return_dict (`bool`, *optional*, defaults to `True`): Output class or plain tuple.
            kwargs: All other arguments of [`StableDiffusion3Img2ImgPipeline.__call__`].

        Returns:
            [`~pipelines.stable_diffusion_3.StableDiffusion3PipelineOutput`] or a tuple of its one field.
        """
        parent_call = partial(super().__call__, prompt, prompt_2, prompt_3, height, width, image, strength, **kwargs)
        return self._generate(parent_call, guidance_scale, quantize_latents, output_type, return_dict)
