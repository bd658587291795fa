"""Text-to-image generation with Stable Diffusion on product-quantised latents (PQSD, section 4.5)."""

from functools import partial

import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

from diffusers_pq.models.autoencoder_pq import PQModel
from diffusers_pq.pipelines.pq_mixin import ACCEPTED_SIZE, PQLatentsMixin


class StableDiffusionPQMixin(PQLatentsMixin):
    """[`PQLatentsMixin`] of a pipeline of Stable Diffusion 1.x or 2.x."""

    def _postprocess(self, images: torch.Tensor, output_type: str) -> dict:
        images, nsfw = self.run_safety_checker(images, self._execution_device, images.dtype)
        denormalize = [True] * len(images) if nsfw is None else [not flagged for flagged in nsfw]
        images = self.image_processor.postprocess(images, output_type, do_denormalize=denormalize)
        return {"images": images, "nsfw_content_detected": nsfw}


class StableDiffusionPQPipeline(StableDiffusionPQMixin, StableDiffusionPipeline):
    r"""
    [`StableDiffusionPipeline`] whose `vae` is a [`PQModel`]: the UNet denoises d-channel latents that are normalised
    per channel, and the result is snapped to the codebooks before it is decoded.

    Everything else (prompts, schedulers, LoRA, textual inversion, IP-Adapter, callbacks, offloading) is the parent's.

    Raises:
        TypeError: if the `vae` is no `PQModel`.
        ValueError: if the UNet's channels are not the autoencoder's latent channels; the message names both.
    """

    @classmethod
    def from_stable_diffusion(
        cls, pretrained_model_name_or_path: str, vae: PQModel, init: str = "copy", **kwargs
    ) -> "StableDiffusionPQPipeline":
        r"""
        The unadapted starting point of the paper's section 4.5: a Stable Diffusion pipeline with a widened UNet.

        Args:
            pretrained_model_name_or_path (`str`): A Stable Diffusion pipeline on the Hub or on disk.
            vae ([`PQModel`]): Replaces the pipeline's autoencoder; a copy of it, if its dtype is another.
            init (`str`, *optional*, defaults to `"copy"`): See [`widen_unet`].
            kwargs: For `StableDiffusionPipeline.from_pretrained`.

        Returns:
            [`StableDiffusionPQPipeline`]: All parts in `dtype`, by default in float32. Adapt it before use.

        Raises:
            ValueError: if it is no Stable Diffusion 1.x or 2.x; see also [`widen_unet`].
        """
        return cls._start_from(StableDiffusionPipeline, pretrained_model_name_or_path, vae, init, **kwargs)

    def check_inputs(self, prompt, height, width, *args, **kwargs):
        self._check_size(height, width)
        super().check_inputs(prompt, *ACCEPTED_SIZE, *args, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        *,
        guidance_scale: float | None = None,
        quantize_latents: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        **kwargs,
    ) -> StableDiffusionPipelineOutput | tuple:
        r"""
        Generate pictures.

        Args:
            prompt (`str` or `list[str]`, *optional*): The prompt or prompts.
            height, width (`int`, *optional*): Pixels, multiples of F; default: the UNet's sample size times F.
            guidance_scale (`float`, *optional*): Default: that of the pipeline's configuration.
            quantize_latents (`bool`, *optional*, defaults to `True`):
                Whether to snap the denoised latents to the codebooks before decoding.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`; the latter are neither unscaled nor snapped.
            return_dict (`bool`, *optional*, defaults to `True`): Output class or plain tuple.
            kwargs: All other arguments of [`StableDiffusionPipeline.__call__`].

        Returns:
            [`~pipelines.stable_diffusion.StableDiffusionPipelineOutput`] or a tuple of its two fields.
        """
        parent_call = partial(super().__call__, prompt, height, width, **kwargs)
        return self._generate(parent_call, guidance_scale, quantize_latents, output_type, return_dict)
