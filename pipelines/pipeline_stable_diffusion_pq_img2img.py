"""Image-to-image generation with Stable Diffusion on product-quantised latents."""

from functools import partial

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from diffusers_pq.pipelines.pq_mixin import PQLatentsMixin


class StableDiffusionPQImg2ImgPipeline(PQLatentsMixin, StableDiffusionImg2ImgPipeline):
    r"""
    [`StableDiffusionImg2ImgPipeline`] whose `vae` is a [`PQModel`]; see [`StableDiffusionPQPipeline`].

    Raises:
        TypeError: if the `vae` is no `PQModel`.
        ValueError: if the UNet's channels are not the autoencoder's latent channels; the message names both.
    """

    def get_timesteps(self, num_inference_steps: int, strength: float, device) -> tuple[torch.Tensor, int]:
        timesteps, steps = super().get_timesteps(num_inference_steps, strength, device)
        if steps < 1:
            raise ValueError(
                f"`strength` {strength} leaves none of {num_inference_steps} `num_inference_steps`: raise either, to "
                f"`strength` {1 / num_inference_steps:.2g} at least."
            )
        return timesteps, steps

    def prepare_latents(
        self, image, timestep, batch_size, num_images_per_prompt, dtype, device, generator=None
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
        noise = randn_tensor(latents.shape, generator=generator, device=device, dtype=dtype)
        return self.scheduler.add_noise(latents, noise, timestep)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.8,
        *,
        guidance_scale: float | None = None,
        quantize_latents: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        **kwargs,
    ) -> StableDiffusionPipelineOutput | tuple:
        r"""
        Generate pictures that start from given ones.

        Args:
            prompt (`str` or `list[str]`, *optional*): The prompt or prompts.
            image: Pictures as the parent takes them, or normalised latents `(B, d, h, w)`.
            strength (`float`, *optional*, defaults to 0.8): How much to change, in [0, 1].
            guidance_scale (`float`, *optional*): Default: that of the pipeline's configuration.
            quantize_latents (`bool`, *optional*, defaults to `True`):
                Whether to snap the denoised latents to the codebooks before decoding.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`; the latter are neither unscaled nor snapped.
            return_dict (`bool`, *optional*, defaults to `True`): Output class or plain tuple.
            kwargs: All other arguments of [`StableDiffusionImg2ImgPipeline.__call__`].

        Returns:
            [`~pipelines.stable_diffusion.StableDiffusionPipelineOutput`] or a tuple of its two fields.
        """
        parent_call = partial(super().__call__, prompt, image, strength, **kwargs)
        return self._generate(parent_call, guidance_scale, quantize_latents, output_type, return_dict)
