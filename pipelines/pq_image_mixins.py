"""What image-to-image and inpainting pipelines on product-quantised latents share, whatever their family."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import PIL.Image
import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

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
        if count % len(latents):
            raise ValueError(f"Cannot spread {len(latents)} images (`image`) over {count} pictures to generate.")
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"`generator` has {len(generator)} entries for {count} pictures to generate.")
        # The pictures of one prompt follow each other, so each given picture goes with those of its own prompt.
        spread = num_images_per_prompt if batch_size % len(latents) == 0 else 1
        latents = latents.repeat(count // spread // len(latents), 1, 1, 1).repeat_interleave(spread, dim=0)
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
        crop, inputs = None, {"image": image, "mask_image": mask_image}
        if padding_mask_crop is not None:
            # Cropped here and not by the parent, which would paste latents into the picture.
            _check_crop_inputs(image, mask_image, output_type)
            crop = self.mask_processor.get_crop_region(mask_image, width, height, pad=padding_mask_crop)
            inputs = {name: picture.crop(crop) for name, picture in inputs.items()}

        def call(**kwargs):
            return parent_call(**inputs, height=height, width=width, **kwargs)

        with _as_text_to_image_unet(self.unet):
            output = self._generate(call, guidance_scale, quantize_latents, output_type, return_dict=True)
        if crop is not None:
            paste = self.image_processor.apply_overlay
            output.images = [paste(mask_image, image, painted, crop) for painted in output.images]
        return output if return_dict else tuple(vars(output).values())


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
