"""Image-to-image generation with Stable Diffusion XL on product-quantised latents."""

from functools import partial

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput

from diffusers_pq.pipelines.pipeline_stable_diffusion_xl_pq import StableDiffusionXLPQMixin
from diffusers_pq.pipelines.pq_image_mixins import PQImg2ImgMixin


class StableDiffusionXLPQImg2ImgPipeline(StableDiffusionXLPQMixin, PQImg2ImgMixin, StableDiffusionXLImg2ImgPipeline):
    r"""
    [`StableDiffusionXLImg2ImgPipeline`] whose `vae` is a [`PQModel`]; see [`StableDiffusionXLPQPipeline`].

    Raises:
        TypeError: if the `vae` is no `PQModel`.
        ValueError: if the UNet's channels are not the autoencoder's latent channels, or it is not one of Stable
            Diffusion XL.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.3,
        *,
        guidance_scale: float | None = None,
        quantize_latents: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        **kwargs,
    ) -> StableDiffusionXLPipelineOutput | tuple:
        r"""
        Generate pictures that start from given ones.

        Args:
            prompt, prompt_2 (`str` or `list[str]`, *optional*): Of each text encoder; `prompt_2` defaults to `prompt`.
            image: Pictures as the parent takes them, or normalised latents `(B, d, h, w)`.
            strength (`float`, *optional*, defaults to 0.3): How much to change, in [0, 1].
            guidance_scale (`float`, *optional*): Default: that of the pipeline's configuration.
            quantize_latents (`bool`, *optional*, defaults to `True`):
                Whether to snap the denoised latents to the codebooks before decoding.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`; the latter are neither unscaled nor snapped.
            return_dict (`bool`, *optional*, defaults to `True`): Output class or plain tuple.
            kwargs: All other arguments of [`StableDiffusionXLImg2ImgPipeline.__call__`].

        Returns:
            [`~pipelines.stable_diffusion_xl.StableDiffusionXLPipelineOutput`] or a tuple of its one field.

        Raises:
            ValueError: if the latents are to be handed over to a refiner or from one.
        """
        self._refuse_refiner(kwargs)
        parent_call = partial(super().__call__, prompt, prompt_2, image, strength, **kwargs)
        return self._generate(parent_call, guidance_scale, quantize_latents, output_type, return_dict)
