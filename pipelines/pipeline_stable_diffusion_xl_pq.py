"""Text-to-image generation with Stable Diffusion XL on product-quantised latents."""

from collections.abc import Callable
from functools import partial

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput

from diffusers_pq.models.autoencoder_pq import PQModel
from diffusers_pq.pipelines.pq_mixin import ACCEPTED_SIZE, PQLatentsMixin


class StableDiffusionXLPQMixin(PQLatentsMixin):
    """[`PQLatentsMixin`] of a pipeline of Stable Diffusion XL."""

    _takes_sizes = True
    _starting_point = "StableDiffusionXLPQPipeline.from_stable_diffusion_xl"
    _prompt_components = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")

    def _refuse_refiner(self, options: dict):
        for name in ("denoising_start", "denoising_end"):
            if options.get(name) is not None:
                raise ValueError(
                    f"`{name}` is for handing latents over between the base model and the refiner, which takes 4 "
                    f"channels and not {self.vae.config.latent_channels}: leave it out, and give the refiner pictures."
                )

    def _denoise(self, parent_call: Callable, guidance_scale: float) -> StableDiffusionXLPipelineOutput:
        # Marks are for pictures; the parents also put them into latents that are large enough.
        watermark, self.watermark = self.watermark, None
        try:
            return super()._denoise(parent_call, guidance_scale)
        finally:
            self.watermark = watermark

    def _postprocess(self, images: torch.Tensor, output_type: str) -> dict:
        if self.watermark is not None:
            images = self.watermark.apply_watermark(images)
        return super()._postprocess(images, output_type)


class StableDiffusionXLPQPipeline(StableDiffusionXLPQMixin, StableDiffusionXLPipeline):
    r"""
    [`StableDiffusionXLPipeline`] whose `vae` is a [`PQModel`]: the UNet denoises d-channel latents that are normalised
    per channel, and the result is snapped to the codebooks before it is decoded.

    Everything else (both prompts, sizes and crops, schedulers, LoRA, textual inversion, IP-Adapter, callbacks,
    offloading) is the parent's. Latents cannot be handed over to the refiner of Stable Diffusion XL, which takes 4
    channels: give it the pictures.

    Raises:
        TypeError: if the `vae` is no `PQModel`.
        ValueError: if the UNet's channels are not the autoencoder's latent channels, or it is not one of Stable
            Diffusion XL.
    """

    @classmethod
    def from_stable_diffusion_xl(
        cls, pretrained_model_name_or_path: str, vae: PQModel, init: str = "copy", **kwargs
    ) -> "StableDiffusionXLPQPipeline":
        r"""
        An unadapted starting point: a Stable Diffusion XL pipeline with a widened UNet.

        Args:
            pretrained_model_name_or_path (`str`): A base model of Stable Diffusion XL on the Hub or on disk.
            vae ([`PQModel`]): Replaces the pipeline's autoencoder; a copy of it, if its dtype is another.
            init (`str`, *optional*, defaults to `"copy"`): See [`widen_unet`].
            kwargs: For `StableDiffusionXLPipeline.from_pretrained`.

        Returns:
            [`StableDiffusionXLPQPipeline`]: All parts in `dtype`, by default in float32. Adapt it before use.

        Raises:
            ValueError: if it is not a base model of Stable Diffusion XL; see also [`widen_unet`].
        """
        return cls._start_from(StableDiffusionXLPipeline, pretrained_model_name_or_path, vae, init, **kwargs)

    def check_inputs(self, prompt, prompt_2, height, width, *args, **kwargs):
        self._check_size(height, width)
        super().check_inputs(prompt, prompt_2, *ACCEPTED_SIZE, *args, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        *,
        guidance_scale: float | None = None,
        quantize_latents: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        **kwargs,
    ) -> StableDiffusionXLPipelineOutput | tuple:
        r"""
        Generate pictures.

        Args:
            prompt, prompt_2 (`str` or `list[str]`, *optional*): Of each text encoder; `prompt_2` defaults to `prompt`.
            height, width (`int`, *optional*): Pixels, multiples of F; default: the UNet's sample size times F.
            guidance_scale (`float`, *optional*): Default: that of the pipeline's configuration.
            quantize_latents (`bool`, *optional*, defaults to `True`):
                Whether to snap the denoised latents to the codebooks before decoding.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`; the latter are neither unscaled nor snapped.
            return_dict (`bool`, *optional*, defaults to `True`): Output class or plain tuple.
            kwargs: All other arguments of [`StableDiffusionXLPipeline.__call__`].

        Returns:
            [`~pipelines.stable_diffusion_xl.StableDiffusionXLPipelineOutput`] or a tuple of its one field.

        Raises:
            ValueError: if the latents are to be handed over to a refiner or from one.
        """
        self._refuse_refiner(kwargs)
        parent_call = partial(super().__call__, prompt, prompt_2, height, width, **kwargs)
        return self._generate(parent_call, guidance_scale, quantize_latents, output_type, return_dict)
