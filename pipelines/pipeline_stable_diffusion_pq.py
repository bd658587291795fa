"""Text-to-image generation with Stable Diffusion on product-quantised latents (PQSD, section 4.5)."""

from functools import partial

import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

from diffusers_pq.models.autoencoder_pq import PQModel
from diffusers_pq.models.widening import widen_unet
from diffusers_pq.pipelines.pq_mixin import ACCEPTED_SIZE, PQLatentsMixin, in_dtype, in_one_dtype


class StableDiffusionPQPipeline(PQLatentsMixin, StableDiffusionPipeline):
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
            ValueError: see [`widen_unet`].
        """
        source = StableDiffusionPipeline.from_pretrained(pretrained_model_name_or_path, **in_one_dtype(kwargs))
        components = {name: getattr(source, name) for name in source.components}
        components["unet"] = widen_unet(source.unet, vae.config.latent_channels, init)
        components["vae"] = in_dtype(vae, source.unet.dtype)
        return cls(**components, requires_safety_checker=source.config.requires_safety_checker)

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
