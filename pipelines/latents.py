"""What the Stable Diffusion pipelines on product-quantised latents share: encoding, decoding and checks."""

from collections.abc import Callable

import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

from diffusers_pq.models.autoencoder_pq import PQModel


class PQLatentsMixin:
    """
    Put before a Stable Diffusion pipeline of diffusers, makes it work on the normalised latents of a [`PQModel`].

    Raises:
        TypeError: if the `vae` is no `PQModel`.
        ValueError: if the UNet's channels are not the autoencoder's latent channels; the message names both.
    """

    def register_modules(self, **modules):
        # Every pipeline hands its components to this method when it is built.
        _check_components(modules.get("vae"), modules.get("unet"))
        super().register_modules(**modules)

    def _encode_vae_image(self, image: torch.Tensor, generator=None) -> torch.Tensor:
        """
        The latents a denoiser sees: quantised, then normalised. Deterministic, so the generator is not used.

        Args:
            image (`torch.Tensor`): Pictures `(B, 3, H, W)` in [-1, 1], or latents `(B, d, h, w)`, kept as they are.
        """
        if image.shape[1] == self.vae.config.latent_channels:
            return image
        latents = self.vae.encode(image).latents
        return self.vae.scale_latents(self.vae.quantize(latents).latents)

    def _decode_latents(self, latents: torch.Tensor, quantize_latents: bool, output_type: str):
        latents = self.vae.unscale_latents(latents)
        images = self.vae.decode(latents, quantize=quantize_latents, return_dict=False)[0]
        images, nsfw = self.run_safety_checker(images, self._execution_device, images.dtype)
        denormalize = [True] * len(images) if nsfw is None else [not flagged for flagged in nsfw]
        return self.image_processor.postprocess(images, output_type, do_denormalize=denormalize), nsfw

    def _generate(
        self, parent_call: Callable, quantize_latents: bool, output_type: str, return_dict: bool
    ) -> StableDiffusionPipelineOutput | tuple:
        # The parent would divide by `scaling_factor` only and could not switch the snapping off: it makes latents.
        images, nsfw = parent_call(output_type="latent", return_dict=False)
        if output_type != "latent":
            images, nsfw = self._decode_latents(images, quantize_latents, output_type)
            self.maybe_free_model_hooks()
        if not return_dict:
            return (images, nsfw)
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=nsfw)


def _check_components(vae, unet):
    # A component may be None (loaded later), or a list of class names while `from_pretrained` is at work.
    if isinstance(vae, torch.nn.Module) and not isinstance(_original(vae), PQModel):
        raise TypeError(f"`vae` must be a PQModel, but is a {type(vae).__name__}.")
    if not isinstance(vae, torch.nn.Module) or not isinstance(unet, torch.nn.Module):
        return
    if unet.config.in_channels != vae.config.latent_channels:
        raise ValueError(
            f"The `unet` takes {unet.config.in_channels} latent channels, but the `vae` has "
            f"{vae.config.latent_channels}. Widen the UNet first: `diffusers_pq.widen_unet(unet, "
            f"latent_channels={vae.config.latent_channels})`, then adapt it."
        )


def _original(module: torch.nn.Module) -> torch.nn.Module:
    return getattr(module, "_orig_mod", module)  # what `torch.compile` wraps
