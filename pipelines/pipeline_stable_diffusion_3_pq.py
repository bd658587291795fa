"""Text-to-image generation with Stable Diffusion 3 on product-quantised latents."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, wraps

import torch
from diffusers import SchedulerMixin, StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3 import StableDiffusion3PipelineOutput

from diffusers_pq.models.autoencoder_pq import PQModel
from diffusers_pq.models.class_conditioning import predicts_sample, scheduler_input
from diffusers_pq.models.widening import ENDS
from diffusers_pq.pipelines.pq_mixin import PQLatentsMixin, check_tokens


class StableDiffusion3PQMixin(PQLatentsMixin):
    """[`PQLatentsMixin`] of a pipeline of Stable Diffusion 3 or 3.5."""

    _denoiser_name = "transformer"
    _ends = ENDS["SD3Transformer2DModel"]
    _starting_point = "StableDiffusion3PQPipeline.from_stable_diffusion_3"
    # The third, T5, may be left out as in the parent.
    _prompt_components = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")

    def _get_clip_prompt_embeds(self, prompt: str | list[str], *args, clip_model_index: int = 0, **kwargs):
        tokenizer = (self.tokenizer, self.tokenizer_2)[clip_model_index]
        text_encoder = (self.text_encoder, self.text_encoder_2)[clip_model_index]
        for text in [prompt] if isinstance(prompt, str) else prompt:
            check_tokens(text, tokenizer, text_encoder)
        return super()._get_clip_prompt_embeds(prompt, *args, clip_model_index=clip_model_index, **kwargs)

    def _denoise(self, parent_call, guidance_scale):
        with _taking_latents(self.scheduler):
            return super()._denoise(parent_call, guidance_scale)


@contextmanager
def _taking_latents(scheduler: SchedulerMixin) -> Iterator[None]:
    """
    Where the transformer predicts latents, which the parents know nothing of, steps of the scheduler take these.
    Guidance comes before, which is the same: it adds predictions, with weights that sum to 1.
    """
    if not predicts_sample(scheduler):
        yield
        return
    step = scheduler.step

    @wraps(step)
    def take_latents(model_output, timestep, sample, **kwargs):
        return step(scheduler_input(scheduler, model_output, sample, timestep), timestep, sample, **kwargs)

    scheduler.step = take_latents
    try:
        yield
    finally:
        del scheduler.step


class StableDiffusion3PQPipeline(StableDiffusion3PQMixin, StableDiffusion3Pipeline):
    r"""
    [`StableDiffusion3Pipeline`] whose `vae` is a [`PQModel`]: the transformer denoises d-channel latents that are
    normalised per channel, and the result is snapped to the codebooks before it is decoded.

    Everything else (the three prompts, LoRA, IP-Adapter, callbacks, offloading) is the parent's.

    Raises:
        TypeError: if the `vae` is no `PQModel`.
        ValueError: if the transformer's channels are not the autoencoder's latent channels; the message names both.
    """

    @classmethod
    def from_stable_diffusion_3(
        cls, pretrained_model_name_or_path: str, vae: PQModel, init: str = "copy", **kwargs
    ) -> "StableDiffusion3PQPipeline":
        r"""
        An unadapted starting point: a Stable Diffusion 3 or 3.5 pipeline with a widened transformer.

        Args:
            pretrained_model_name_or_path (`str`): A Stable Diffusion 3 pipeline on the Hub or on disk.
            vae ([`PQModel`]): Replaces the pipeline's autoencoder; a copy of it, if its dtype is another.
            init (`str`, *optional*, defaults to `"copy"`): See [`widen_denoiser`].
            kwargs: For `StableDiffusion3Pipeline.from_pretrained`, such as `text_encoder_3=None`.

        Returns:
            [`StableDiffusion3PQPipeline`]: All parts in `dtype`, by default in float32. Adapt it before use.

        Raises:
            ValueError: if it is no Stable Diffusion 3; see also [`widen_denoiser`].
        """
        return cls._start_from(StableDiffusion3Pipeline, pretrained_model_name_or_path, vae, init, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        prompt_3: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        *,
        guidance_scale: float | None = None,
        quantize_latents: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        **kwargs,
    ) -> StableDiffusion3PipelineOutput | tuple:
        r"""
        Generate pictures.

        Args:
            prompt, prompt_2, prompt_3 (`str` or `list[str]`, *optional*):
                Of each text encoder; the latter two default to `prompt`.
            height, width (`int`, *optional*):
                Pixels, multiples of F times the transformer's patch size; default: its sample size times F.
            guidance_scale (`float`, *optional*): Default: that of the pipeline's configuration.
            quantize_latents (`bool`, *optional*, defaults to `True`):
                Whether to snap the denoised latents to the codebooks before decoding.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`; the latter are neither unscaled nor snapped.
            return_dict (`bool`, *optional*, defaults to `True`): Output class or plain tuple.
            kwargs: All other arguments of [`StableDiffusion3Pipeline.__call__`].

        Returns:
            [`~pipelines.stable_diffusion_3.StableDiffusion3PipelineOutput`] or a tuple of its one field.
        """
        parent_call = partial(super().__call__, prompt, prompt_2, prompt_3, height, width, **kwargs)
        return self._generate(parent_call, guidance_scale, quantize_latents, output_type, return_dict)
