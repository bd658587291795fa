"""Optimisation steps of a denoiser on latents: epsilon or v prediction or flow matching, as its scheduler says."""

import os
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import LabelEmbedding
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling, compute_snr
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict

from ..models.class_conditioning import predict
from .trainer import FiniteSteps


@dataclass
class Stage:
    """
    A part of a run with settings of its own (a row of Table 4).

    Args:
        resolution (`int`): Side of the square pictures, in pixels.
        steps (`int`): Optimisation steps.
        learning_rate (`float`)
        trained (`str`): `"conv"`, only the first and last convolution, or `"all"`.
    """

    resolution: int
    steps: int
    learning_rate: float
    trained: str

    @classmethod
    def parse(cls, text: str) -> "Stage":
        """
        A stage as a recipe writes it, such as `384:20000:8e-5:conv`.

        Raises:
            ValueError: if there are not four parts, or a part is not what it should be.
        """
        parts = text.split(":")
        if len(parts) != 4 or parts[3] not in ("conv", "all"):
            raise ValueError(f"a stage is RESOLUTION:STEPS:LEARNING_RATE:conv or ...:all, but one is {text!r}")
        return cls(int(parts[0]), int(parts[1]), float(parts[2]), parts[3])

    def __str__(self) -> str:
        return f"{self.resolution}:{self.steps}:{self.learning_rate}:{self.trained}"


def find_stage(stages: list[Stage], step: int) -> Stage:
    """The stage that goes on after `step` steps of the run; beyond the last one, the last."""
    for stage, end in zip(stages, accumulate(stage.steps for stage in stages)):
        if step < end:
            return stage
    return stages[-1]


class ConditionalDenoiser(nn.Module):
    """
    A text-conditioned UNet and its text encoder, so that one forward gives all that a training step needs.

    Args:
        unet (`UNet2DConditionModel`)
        text_encoder (`CLIPTextModel`)
        train_text_encoder (`bool`)
    """

    def __init__(self, unet: nn.Module, text_encoder: nn.Module, train_text_encoder: bool = False):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder.requires_grad_(train_text_encoder)
        self.train_text_encoder = train_text_encoder

    def forward(self, noisy: torch.Tensor, timesteps: torch.LongTensor, input_ids: torch.LongTensor) -> torch.Tensor:
        """The prediction for noisy latents, both `[B, d, h, w]`, at timesteps `[B]`, given token ids `[B, L]`."""
        return self.unet(noisy, timesteps, self.text_encoder(input_ids)[0]).sample

    def train_only(self, trained: str):
        """Let gradients reach the first and last convolution only (`"conv"`), or all that is learned (`"all"`)."""
        self.unet.requires_grad_(False)
        for name, parameter in self._learned_in_unet():
            parameter.requires_grad_(trained == "all" or _is_outer_convolution(name))

    def learned_parameters(self) -> list[nn.Parameter]:
        """Those that some stage trains."""
        learned = [parameter for _, parameter in self._learned_in_unet()]
        return learned + (list(self.text_encoder.parameters()) if self.train_text_encoder else [])

    def _learned_in_unet(self) -> list[tuple[str, nn.Parameter]]:
        """All of the UNet; with LoRA layers in it, these and the first and last convolution."""
        named = list(self.unet.named_parameters())
        if not any("lora_" in name for name, _ in named):
            return named
        return [(name, parameter) for name, parameter in named if "lora_" in name or _is_outer_convolution(name)]


def _is_outer_convolution(name: str) -> bool:
    return name.startswith(("conv_in.", "conv_out."))


class ClassConditionalDenoiser(nn.Module):
    """
    A denoiser that is given class labels.

    Args:
        denoiser (`UNet2DConditionModel` or `DiTTransformer2DModel`): See [`create_class_conditional_denoiser`].
    """

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser = denoiser
        for module in denoiser.modules():
            if isinstance(module, LabelEmbedding):
                # Each block of DiT would drop labels for itself, so that hardly a sample were without one in all.
                module.dropout_prob = 0.0

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
        """The prediction for noisy latents, both `[B, d, h, w]`, at timesteps `[B]`, given labels `[B]`."""
        return predict(self.denoiser, noisy, timesteps, labels)

    def learned_parameters(self) -> list[nn.Parameter]:
        return list(self.denoiser.parameters())


def save_lora(unet: nn.Module, pipeline_class: type, folder: str | os.PathLike):
    """
    Write a UNet's LoRA layers, with its first and last convolution in full, for `load_lora_weights` of our pipelines.

    Args:
        unet (`UNet2DConditionModel`): With an adapter of peft.
        pipeline_class: The pipeline that the adapter is for.
        folder: Gets a `pytorch_lora_weights.safetensors`.
    """
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    convolutions = {name: value for name, value in unet.state_dict().items() if _is_outer_convolution(name)}
    pipeline_class.save_lora_weights(folder, unet_lora_layers=layers | convolutions)


def draw_timesteps(
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler,
    count: int,
    weighting_scheme: str = "none",
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """
    Random timesteps `[count]`: uniform whole numbers of a diffusion scheduler; of a flow matching one real numbers,
    drawn by `weighting_scheme` (`"none"`: uniform, `"logit_normal"`: Stable Diffusion 3's), then shifted.
    """
    high = scheduler.config.num_train_timesteps
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return torch.randint(high, (count,), generator=generator, device=device)
    scheme = {"weighting_scheme": weighting_scheme, "logit_mean": 0.0, "logit_std": 1.0}
    sigmas = compute_density_for_timestep_sampling(**scheme, batch_size=count, device=device, generator=generator)
    # Not the scheduler's own sigmas, which sampling sets anew.
    shift = scheduler.config.shift
    return high * shift * sigmas / (1 + (shift - 1) * sigmas)


def add_noise(
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Noisy latents and what a denoiser is to predict from them: epsilon, v, or the flow's velocity.

    Args:
        scheduler: Gives the noise schedule and the `prediction_type`.
        latents (`torch.Tensor` of shape `(B, d, h, w)`): Without noise.
        noise (`torch.Tensor` of shape `(B, d, h, w)`): From N(0, 1).
        timesteps (`torch.Tensor` of shape `(B,)`): See [`draw_timesteps`].

    Raises:
        ValueError: if the scheduler predicts something else.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigmas = _sigmas(scheduler, timesteps)
        return (1 - sigmas) * latents + sigmas * noise, noise - latents
    noisy = scheduler.add_noise(latents, noise, timesteps)
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noisy, noise
    if prediction_type == "v_prediction":
        return noisy, scheduler.get_velocity(latents, noise, timesteps)
    raise ValueError(f'`prediction_type` must be "epsilon" or "v_prediction", but is {prediction_type!r}.')


def predicted_latents(
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler,
    prediction: torch.Tensor,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """The latents without noise that follow from a prediction, the inverse of [`add_noise`]; same shapes as there."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return noisy - _sigmas(scheduler, timesteps) * prediction
    if scheduler.config.prediction_type == "v_prediction":
        # x_0 = sqrt(alpha) x_t - sqrt(1 - alpha) v: a rotation, as v is of x_0 and the noise.
        return scheduler.get_velocity(prediction, noisy, timesteps)
    alphas = scheduler.alphas_cumprod.to(noisy.device)[timesteps].view(-1, 1, 1, 1)
    return (noisy - (1 - alphas).sqrt() * prediction) / alphas.sqrt()


def _sigmas(scheduler: FlowMatchEulerDiscreteScheduler, timesteps: torch.Tensor) -> torch.Tensor:
    return (timesteps / scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)


def denoising_loss(
    denoiser: nn.Module,
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler,
    latents: torch.Tensor,
    condition: torch.Tensor,
    snr_gamma: float | None = None,
    channel_weights: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    weighting_scheme: str = "none",
) -> torch.Tensor:
    """
    Mean squared error of the prediction at random timesteps.

    Args:
        denoiser: Maps noisy latents, timesteps and condition to a prediction.
        scheduler: See [`add_noise`].
        latents (`torch.Tensor` of shape `(B, d, h, w)`): See [`encode_latents`].
        condition (`torch.Tensor`): Token ids or class labels.
        snr_gamma (`float`, *optional*): Min-SNR weighting (Hang et al., 2023), of a diffusion scheduler.
        channel_weights (`torch.Tensor` of shape `(d,)`, *optional*):
            Such as `latents.channel_weights` gives. Default: all alike.
        generator (`torch.Generator`, *optional*): Of noise and timesteps, on the CPU. Default: the global one of the
            latents' device.
        weighting_scheme (`str`): See [`draw_timesteps`].

    Returns:
        `torch.Tensor` of shape `(B,)`, float32.

    Raises:
        ValueError: if the scheduler predicts something else than epsilon or v.
    """
    device = latents.device if generator is None else "cpu"
    noise = torch.randn(latents.shape, generator=generator, device=device).to(latents.device)
    timesteps = draw_timesteps(scheduler, len(latents), weighting_scheme, generator, device).to(latents.device)
    noisy, target = add_noise(scheduler, latents, noise, timesteps)
    prediction = denoiser(noisy, timesteps, condition).float()
    loss = F.mse_loss(prediction, target, reduction="none").mean((2, 3))
    loss = loss.mean(1) if channel_weights is None else (loss * channel_weights.to(loss)).mean(1)
    if snr_gamma is None:
        return loss
    snr = compute_snr(scheduler, timesteps)
    offset = 1 if scheduler.config.prediction_type == "v_prediction" else 0
    return loss * snr.clamp(max=snr_gamma) / (snr + offset).clamp(min=1e-8)


class DenoiserTrainer:
    """
    A denoiser and what a step does with it.

    Args:
        accelerator (`Accelerator`)
        denoiser, optimizer, lr_scheduler: Prepared by the accelerator.
        scheduler: See [`denoising_loss`].
        snr_gamma (`float`, *optional*): See [`denoising_loss`].
        max_grad_norm (`float`, *optional*): See [`FiniteSteps`].
        max_skipped_steps (`int`): See [`FiniteSteps`].
        ema (`EMAModel`, *optional*): Of the denoiser's `learned_parameters`.
        channel_weights (`torch.Tensor`, *optional*): See [`denoising_loss`].
        weighting_scheme (`str`): See [`draw_timesteps`].
    """

    def __init__(
        self,
        accelerator: Accelerator,
        denoiser: nn.Module,
        optimizer,
        lr_scheduler,
        scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler,
        snr_gamma: float | None = None,
        max_grad_norm: float | None = None,
        max_skipped_steps: int = 10,
        ema: EMAModel | None = None,
        channel_weights: torch.Tensor | None = None,
        weighting_scheme: str = "none",
    ):
        self.accelerator = accelerator
        self.denoiser, self.optimizer, self.lr_scheduler = denoiser, optimizer, lr_scheduler
        self.scheduler = scheduler
        self.weighting = {"snr_gamma": snr_gamma, "channel_weights": channel_weights}
        self.weighting |= {"weighting_scheme": weighting_scheme}
        self.steps = FiniteSteps(accelerator, max_grad_norm, max_skipped_steps)
        self.ema = ema

    def step(self, latents: torch.Tensor, condition: torch.Tensor) -> dict[str, torch.Tensor] | None:
        """Learn from one batch of latents; returns what to log, `None` while gradients are being accumulated."""
        with self.accelerator.accumulate(self.denoiser):
            loss = denoising_loss(self.denoiser, self.scheduler, latents, condition, **self.weighting).mean()
            self.accelerator.backward(loss)
            self.steps.step(self.optimizer, self.denoiser.parameters())
            self.lr_scheduler.step()
        if not self.accelerator.sync_gradients:
            return None
        if self.ema is not None:
            self.ema.step(self.accelerator.unwrap_model(self.denoiser).learned_parameters())
        return {"loss": loss.detach()}
