"""Class-conditional generation with latent diffusion on product-quantised latents (Table 5)."""

import inspect
from collections.abc import Callable, Sequence

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from diffusers_pq.autoencoders import decode_latents, downsampling_factor
from diffusers_pq.models.autoencoder_pq import PQModel
from diffusers_pq.models.class_conditioning import num_classes, predict, scheduler_input
from diffusers_pq.pipelines.class_labels import ClassLabelsMixin
from diffusers_pq.pipelines.pq_mixin import ImportedByCodeMixin


class LatentDiffusionPQPipeline(ClassLabelsMixin, ImportedByCodeMixin, DiffusionPipeline):
    r"""
    Pictures of classes, by latent diffusion that `train_ldm.py` has trained from scratch on the latents of a
    [`PQModel`] or, for comparison, of another autoencoder of diffusers.

    Args:
        vae ([`PQModel`] or [`AutoencoderKL`], ...): Its config holds the statistics of the latents.
        scheduler ([`DDIMScheduler`] or [`FlowMatchEulerDiscreteScheduler`]):
            What the denoiser was trained with, or another one that diffusers makes of its config.
        unet ([`UNet2DConditionModel`], *optional*): A denoiser made by [`create_class_conditional_denoiser`] ...
        transformer ([`DiTTransformer2DModel`], *optional*): ... of one class or the other: exactly one is given.
        id2label (`dict[int, str]`, *optional*):
            The classes' names. Names with commas, as ImageNet's, are lists of synonyms.

    Raises:
        ValueError: if there is not one denoiser, or its channels or classes are not those of the autoencoder or of
            the names.
    """

    model_cpu_offload_seq = "unet->transformer->vae"
    _optional_components = ["unet", "transformer"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vae: PQModel | AutoencoderKL,
        scheduler: DDIMScheduler | FlowMatchEulerDiscreteScheduler,
        unet: UNet2DConditionModel | None = None,
        transformer: DiTTransformer2DModel | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ):
        super().__init__()
        if (unet is None) == (transformer is None):
            raise ValueError("Give exactly one of `unet` and `transformer`.")
        self.register_modules(vae=vae, scheduler=scheduler, unet=unet, transformer=transformer)
        self._check_channels()
        self._register_labels(id2label)
        self.image_processor = VaeImageProcessor(vae_scale_factor=downsampling_factor(vae))

    @property
    def denoiser(self) -> UNet2DConditionModel | DiTTransformer2DModel:
        return self.transformer if self.unet is None else self.unet

    @property
    def num_classes(self) -> int:
        return num_classes(self.denoiser)

    def _check_channels(self):
        channels, expected = self.denoiser.config.in_channels, self.vae.config.latent_channels
        if channels != expected:
            raise ValueError(f"The denoiser takes {channels} latent channels, but the `vae` has {expected}.")

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        guidance_scale: float = 4.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        quantize_latents: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate pictures.

        Args:
            class_labels (`int`, `str` or a list of them): Number or name of the class of each picture.
            guidance_scale (`float`, *optional*, defaults to 4.0):
                Of classifier-free guidance (Ho & Salimans, 2021), which 1 and less switches off.
            num_inference_steps (`int`, *optional*, defaults to 50): Denoising steps.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): One, or one for each picture.
            latents (`torch.Tensor` of shape `(B, d, h, w)`, *optional*): The noise to begin with; drawn by default.
            quantize_latents (`bool`, *optional*, defaults to `True`):
                Whether to snap the denoised latents to the codebooks of a [`PQModel`] before decoding.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`; the latter are neither unscaled nor snapped.
            return_dict (`bool`, *optional*, defaults to `True`): Output class or plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step with the pipeline, the step, its timestep and a dict of tensors, which it
                returns, changed or not.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): Of the tensors, `"latents"`.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or a tuple of its field.
        """
        if unknown := set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise ValueError(f'`callback_on_step_end_tensor_inputs` may hold "latents" only, but has {unknown}.')
        labels = torch.tensor(self.get_label_ids(class_labels), device=self._execution_device)
        latents = self._prepare_latents(len(labels), generator, latents)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        # For schedulers that draw further noise at each step.
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        noise = {"generator": generator} if takes_generator else {}
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            prediction = self._guided_prediction(latents, timestep, labels, guidance_scale)
            prediction = scheduler_input(self.scheduler, prediction, latents, timestep)
            latents = self.scheduler.step(prediction, timestep, latents, **noise).prev_sample.to(latents.dtype)
            if callback_on_step_end is not None:
                tensors = {name: {"latents": latents}[name] for name in callback_on_step_end_tensor_inputs}
                latents = callback_on_step_end(self, step, timestep, tensors).get("latents", latents)
        images = latents
        if output_type != "latent":
            decoded = decode_latents(self.vae, latents, quantize_latents)
            images = self.image_processor.postprocess(decoded, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

    def _prepare_latents(self, count: int, generator, latents: torch.Tensor | None) -> torch.Tensor:
        config = self.denoiser.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"`generator` has {len(generator)} entries for {count} pictures to generate.")
        device, dtype = self._execution_device, self.denoiser.dtype
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif latents.shape != shape:
            raise ValueError(f"`latents` must have the shape {list(shape)}, but have {list(latents.shape)}.")
        # Some schedulers, Euler's for one, begin with noise of another variance; flow matching knows only 1.
        return latents.to(device, dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _guided_prediction(self, latents, timestep, labels, guidance_scale: float) -> torch.Tensor:
        inputs = latents
        if hasattr(self.scheduler, "scale_model_input"):
            inputs = self.scheduler.scale_model_input(latents, timestep)
        if guidance_scale <= 1:
            return predict(self.denoiser, inputs, timestep.expand(len(labels)), labels)
        labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])
        prediction = predict(self.denoiser, torch.cat([inputs, inputs]), timestep.expand(len(labels)), labels)
        conditional, unconditional = prediction.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)
