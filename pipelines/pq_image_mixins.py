"""What image-to-image and inpainting pipelines on product-quantised latents share, whatever their family."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import PIL.Image
import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from diffusers_pq.images import to_rgb
from diffusers_pq.pipelines.pq_mixin import PQLatentsMixin


class PQImg2ImgMixin(PQLatentsMixin):
    """[`PQLatentsMixin`] of an image-to-image pipeline."""

    def get_timesteps(self, num_inference_steps: int, strength: float, *args, **kwargs) -> tuple[torch.Tensor, int]:
        timesteps, steps = super().get_timesteps(num_inference_steps, strength, *args, **kwargs)
        if steps < 1:
            raise ValueError(
                f"`strength` {strength} leaves none of {num_inference_steps} `num_inference_steps`: raise either, to "
                f"`strength` {1 / num_inference_steps:.2g} at least."
            )
        return timesteps, steps

    def prepare_latents(
        self, image, timestep, batch_size, num_images_per_prompt, dtype, device, generator=None, add_noise=True
    ) -> torch.Tensor:
        count = batch_size * num_images_per_prompt
        latents = self._encode_vae_image(image.to(device=device, dtype=dtype))
        latents = spread_over_prompts("image", latents, count, num_images_per_prompt)
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"`generator` has {len(generator)} entries for {count} pictures to generate.")
        if not add_noise:
            return latents
        noise = randn_tensor(latents.shape, generator=generator, device=device, dtype=dtype)
        if hasattr(self.scheduler, "scale_noise"):  # of flow matching
            return self.scheduler.scale_noise(latents, timestep, noise)
        return self.scheduler.add_noise(latents, noise, timestep)


class PQInpaintMixin(PQLatentsMixin):
    """
    [`PQLatentsMixin`] of an inpainting pipeline.

    It works with the text-to-image UNet (d input channels), as the parent does with one of 4: what the mask keeps is
    put back after each denoising step. UNets that also take the mask as input (9 channels in Stable Diffusion) are
    refused.
    """

    def _inpaint(
        self,
        parent_call: Callable,
        image,
        mask_image,
        height: int | None,
        width: int | None,
        padding_mask_crop: int | None,
        guidance_scale: float | None,
        quantize_latents: bool,
        output_type: str,
        return_dict: bool,
    ) -> BaseOutput | tuple:
        """As `_generate`, but `parent_call` also takes the pictures and the size."""
        height = height or self.unet.config.sample_size * self.vae_scale_factor
        width = width or self.unet.config.sample_size * self.vae_scale_factor
        self._check_not_latents(image)
        self._num_images_per_prompt = parent_call.keywords.get("num_images_per_prompt") or 1
        crop, inputs = None, {"image": image, "mask_image": mask_image}
        if padding_mask_crop is not None:
            # Cropped here and not by the parent, which would paste latents into the picture.
            _check_crop_inputs(image, mask_image, output_type)
            image, mask_image = to_rgb(image, upright=False), mask_image.convert("L")
            crop = self.mask_processor.get_crop_region(mask_image, width, height, pad=padding_mask_crop)
            resize = partial(self.image_processor.resize, height=height, width=width, resize_mode="fill")
            inputs = {"image": resize(image.crop(crop)), "mask_image": resize(mask_image.crop(crop))}

        def call(**kwargs):
            return parent_call(**inputs, height=height, width=width, **kwargs)

        with _as_text_to_image_unet(self.unet):
            output = self._generate(call, guidance_scale, quantize_latents, output_type, return_dict=True)
        if crop is not None:
            paste = self.image_processor.apply_overlay
            output.images = [paste(mask_image, image, painted, crop) for painted in output.images]
        return output if return_dict else tuple(vars(output).values())

    def prepare_latents(self, batch_size: int, *args, image: torch.Tensor | None = None, **kwargs):
        return super().prepare_latents(batch_size, *args, image=self._spread("image", image, batch_size), **kwargs)

    def prepare_mask_latents(
        self, mask: torch.Tensor, masked_image: torch.Tensor | None, batch_size: int, *args, **kwargs
    ):
        mask = self._spread("mask_image", mask, batch_size)
        masked_image = self._spread("image", masked_image, batch_size)
        return super().prepare_mask_latents(mask, masked_image, batch_size, *args, **kwargs)

    def _spread(self, name: str, given: torch.Tensor | None, count: int) -> torch.Tensor | None:
        """Several pictures or masks in the order of the prompts; the parent repeats a single one."""
        if given is None or len(given) == 1:
            return given
        return spread_over_prompts(name, given, count, self._num_images_per_prompt)

    def _check_not_latents(self, image):
        first = image[0] if isinstance(image, list) else image
        channels = self.image_processor.config.vae_latent_channels
        # Those of 4 channels are all that parents know as latents.
        if isinstance(first, torch.Tensor) and channels != 4 and first.ndim > 2 and first.shape[-3] == channels:
            raise ValueError(f"`image` holds latents ({channels} channels), but inpainting needs pictures.")


def spread_over_prompts(name: str, given: torch.Tensor, count: int, num_images_per_prompt: int) -> torch.Tensor:
    """
    Given pictures, masks or latents `[N, ...]`, repeated for all `count` pictures to generate. The pictures of one
    prompt follow each other, so what is given goes with those of its own prompt.

    Raises:
        ValueError: if N does not divide `count`; the message calls the argument by its `name`.
    """
    if count % len(given):
        raise ValueError(f"Cannot spread {len(given)} images (`{name}`) over {count} pictures to generate.")
    each = num_images_per_prompt if count // num_images_per_prompt % len(given) == 0 else 1
    return given.repeat(count // each // len(given), 1, 1, 1).repeat_interleave(each, dim=0)


def _check_crop_inputs(image, mask_image, output_type: str):
    for name, value in (("image", image), ("mask_image", mask_image)):
        if not isinstance(value, PIL.Image.Image):
            raise ValueError(
                f"`padding_mask_crop` needs a PIL picture as `{name}`, but it is a {type(value).__name__}."
            )
    if output_type != "pil":
        raise ValueError(f"`padding_mask_crop` needs `output_type='pil'`, but it is {output_type!r}.")
    if image.size != mask_image.size:
        raise ValueError(f"`image` and `mask_image` must have one size, but are {image.size} and {mask_image.size}.")
    if mask_image.convert("L").getbbox() is None:
        raise ValueError("`mask_image` is all black: there is nothing to crop and repaint.")


@contextmanager
def _as_text_to_image_unet(unet) -> Iterator[None]:
    # The parent tells text-to-image UNets from inpainting ones by 4 and 9 input channels, and knows no others. A new
    # configuration would lack the attributes that an IP-Adapter has set in this one.
    config, channels = unet.config, unet.config.in_channels
    config.in_channels = 4
    try:
        yield
    finally:
        config.in_channels = channels
