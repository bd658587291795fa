"""Text-to-image generation with Stable Diffusion on product-quantised latents (PQSD, section 4.5)."""

import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput


class StableDiffusionPQPipeline(StableDiffusionPipeline):
    r"""
    [`StableDiffusionPipeline`] whose `vae` is a [`PQModel`]: the UNet denoises d-channel latents that are normalised
    per channel, and the result is snapped to the codebooks before it is decoded.

    Everything else (prompts, schedulers, LoRA, textual inversion, IP-Adapter, callbacks, offloading) is the parent's.

    Raises:
        ValueError: if the UNet's channels are not the autoencoder's latent channels; the message names both.
    """

    def __init__(
        self,
        vae,
        text_encoder,
        tokenizer,
        unet,
        scheduler,
        safety_checker,
        feature_extractor,
        image_encoder=None,
        requires_safety_checker: bool = True,
    ):
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        if unet is not None and vae is not None and unet.config.in_channels != vae.config.latent_channels:
            raise ValueError(
                f"The `unet` takes {unet.config.in_channels} latent channels, but the `vae` has "
                f"{vae.config.latent_channels}. The UNet's first and last convolution must be widened to "
                f"{vae.config.latent_channels} channels and adapted first."
            )

    def check_inputs(self, prompt, height, width, *args, **kwargs):
        factor = self.vae_scale_factor
        if height % factor or width % factor:
            raise ValueError(
                f"`height` and `width` must be multiples of the downsampling factor F = {factor}, but are {height} "
                f"and {width}."
            )
        super().check_inputs(prompt, height, width, *args, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        *,
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
            quantize_latents (`bool`, *optional*, defaults to `True`):
                Whether to snap the denoised latents to the codebooks before decoding.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`; the latter are neither unscaled nor snapped.
            return_dict (`bool`, *optional*, defaults to `True`): Output class or plain tuple.
            kwargs: All other arguments of [`StableDiffusionPipeline.__call__`].

        Returns:
            [`~pipelines.stable_diffusion.StableDiffusionPipelineOutput`] or a tuple of its two fields.
        """
        latents, nsfw = super().__call__(prompt, height, width, output_type="latent", return_dict=False, **kwargs)
        images = latents
        if output_type != "latent":
            images, nsfw = self._decode_latents(latents, quantize_latents, output_type)
            self.maybe_free_model_hooks()
        if not return_dict:
            return (images, nsfw)
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=nsfw)

    def _decode_latents(self, latents: torch.Tensor, quantize_latents: bool, output_type: str):
        latents = self.vae.unscale_latents(latents)
        images = self.vae.decode(latents, quantize=quantize_latents, return_dict=False)[0]
        images, nsfw = self.run_safety_checker(images, self._execution_device, images.dtype)
        denormalize = [True] * len(images) if nsfw is None else [not flagged for flagged in nsfw]
        return self.image_processor.postprocess(images, output_type, do_denormalize=denormalize), nsfw
