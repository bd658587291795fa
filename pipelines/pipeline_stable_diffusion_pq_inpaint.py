"""Inpainting with Stable Diffusion on product-quantised latents."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import PIL.Image
import torch
from diffusers import StableDiffusionInpaintPipeline
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

from diffusers_pq.pipelines.pq_mixin import ACCEPTED_SIZE, PQLatentsMixin


class StableDiffusionPQInpaintPipeline(PQLatentsMixin, StableDiffusionInpaintPipeline):
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
        height = height or self.unet.config.sample_size * self.vae_scale_factor
        width = width or self.unet.config.sample_size * self.vae_scale_factor
        crop, picture, mask = None, image, mask_image
        if padding_mask_crop is not None:
            # Cropped here and not by the parent, which would paste latents into the picture.
            _check_crop_inputs(image, mask_image, output_type)
            crop = self.mask_processor.get_crop_region(mask_image, width, height, pad=padding_mask_crop)
            picture, mask = image.crop(crop), mask_image.crop(crop)
        parent_call = partial(super().__call__, prompt, picture, mask, height=height, width=width, **kwargs)
        with _as_text_to_image_unet(self.unet):
            images, nsfw = self._generate(parent_call, guidance_scale, quantize_latents, output_type, False)
        if crop is not None:
            images = [self.image_processor.apply_overlay(mask_image, image, painted, crop) for painted in images]
        if not return_dict:
            return (images, nsfw)
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=nsfw)


def _check_crop_inputs(image, mask_image, output_type: str):
    for name, value in (("image", image), ("mask_image", mask_image)):
        if not isinstance(value, PIL.Image.Image):
            raise ValueError(
                f"`padding_mask_crop` needs a PIL picture as `{name}`, but it is a {type(value).__name__}."
            )
    if output_type != "pil":
        raise ValueError(f"`padding_mask_crop` needs `output_type='pil'`, but it is {output_type!r}.")


@contextmanager
def _as_text_to_image_unet(unet) -> Iterator[None]:
    # The parent tells text-to-image UNets from inpainting ones by 4 and 9 input channels, and knows no others.
    channels = unet.config.in_channels
    unet.register_to_config(in_channels=4)
    try:
        yield
    finally:
        unet.register_to_config(in_channels=channels)
