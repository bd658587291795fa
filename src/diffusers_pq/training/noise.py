"""Noise in latents: schedules for latents of any size, what a denoiser is to predict, and its loss."""

import math

import torch
import torch.nn as nn
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr

from ..models.class_conditioning import predicts_sample


# Values in the latents that the unshifted schedules suit: 32 x 32 x 4, those of a 256 px picture in LDM.
BASE_DIMENSION = 32 * 32 * 4
# Below it, errors of predicted latents weigh no more (Li & He, 2025, "Back to Basics").
_MIN_SIGMA = 0.05
# LDM's: linear in the square root of beta.
_LDM_BETAS = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}


def latent_shift(latent_channels: int, height: int, width: int, base_dimension: int = BASE_DIMENSION) -> float:
    """
    The shift for latents of n = d h w values: sqrt(n / n_0), where n_0 is the `base_dimension` of latents that the
    unshifted schedule suits.

    The more values show the same picture, the more noise it takes to hide it. Hoogeboom et al. (2023, "simple
    diffusion") divide the signal-to-noise ratio by the ratio of the numbers of pixels; Esser et al. (2024, Stable
    Diffusion 3, Eq. 23) shift timesteps by its square root, which is the same; Zheng et al. (2025, "Diffusion
    Transformers with Representation Autoencoders") count the channels as well, since with many the same holds.
    """
    return math.sqrt(latent_channels * height * width / base_dimension)


def shifted_betas(betas: torch.Tensor, shift: float) -> torch.Tensor:
    """
    Betas `[T]` of a schedule whose signal-to-noise ratio at each timestep is 1 / shift^2 of that of the given ones;
    float64.
    """
    alphas_cumprod = (1 - betas.double()).cumprod(0)
    shifted = alphas_cumprod / (alphas_cumprod + shift**2 * (1 - alphas_cumprod))
    previous = torch.cat([shifted.new_ones(1), shifted[:-1]])
    return 1 - shifted / previous


def adapt_schedule(
    scheduler: SchedulerMixin,
    shift: float = 1.0,
    rescale_betas_zero_snr: bool = False,
    prediction_type: str | None = None,
) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """
    The scheduler to adapt a diffusion model with: that of the model, with more noise for larger latents.

    Args:
        scheduler (`SchedulerMixin`): The model's: of flow matching, whose own shift is multiplied; or with betas, any
            that its config can make a DDIMScheduler of.
        shift (`float`): See [`latent_shift`]; 1 shifts nothing.
        rescale_betas_zero_snr (`bool`): End in pure noise (Lin et al., 2024).
        prediction_type (`str`, *optional*): `"epsilon"`, `"v_prediction"` or `"sample"`; of flow matching `"sample"`.
            Default: the model's.

    Raises:
        ValueError: if epsilon is to be predicted where there is nothing but noise.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        static = {"shift": scheduler.config.shift * shift, "use_dynamic_shifting": False}
        adapted = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **static)
        if prediction_type is not None:  # which the scheduler itself does not know, but keeps
            adapted.register_to_config(prediction_type=prediction_type)
        return adapted
    # Latents have no bounds to be clipped to; DDIM's default is that of pixels.
    adapted = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    prediction_type = prediction_type or adapted.config.prediction_type
    changes = {"prediction_type": prediction_type}
    if shift != 1:
        # To the end: after a shift, even the first timestep has noise to be seen.
        changes |= {"trained_betas": shifted_betas(adapted.betas, shift).tolist(), "set_alpha_to_one": True}
    if rescale_betas_zero_snr:
        _check_prediction_type(prediction_type)
        # From the last timestep, as Lin et al. ask.
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return DDIMScheduler.from_config(adapted.config, **changes)


def _check_prediction_type(prediction_type: str):
    if prediction_type == "epsilon":
        raise ValueError(
            "`rescale_betas_zero_snr` needs `prediction_type` v_prediction or sample: from epsilon, no picture can be "
            "told at the last timestep."
        )


def create_scheduler(
    objective: str, prediction_type: str = "epsilon", shift: float = 1.0, rescale_betas_zero_snr: bool = False
) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """
    The scheduler to train and to sample with; its config holds all that is set here.

    Args:
        objective (`str`): `"diffusion"`, with LDM's schedule, or `"flow_matching"`.
        prediction_type (`str`): What the denoiser is to predict: of diffusion `"epsilon"`, `"v_prediction"` or
            `"sample"`, the latents without noise; of flow matching the velocity, or `"sample"`.
        shift (`float`): See [`latent_shift`]; 1 shifts nothing.
        rescale_betas_zero_snr (`bool`): End diffusion in pure noise (Lin et al., 2024).

    Raises:
        ValueError: if epsilon is to be predicted where there is nothing but noise.
    """
    if objective == "flow_matching":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        if prediction_type == "sample":  # which the scheduler itself does not know, but keeps
            scheduler.register_to_config(prediction_type="sample")
        return scheduler
    if rescale_betas_zero_snr:
        _check_prediction_type(prediction_type)
    schedule = _LDM_BETAS
    if shift != 1:
        schedule = {"trained_betas": shifted_betas(DDIMScheduler(**_LDM_BETAS).betas, shift).tolist()}
    return DDIMScheduler(
        **schedule,
        clip_sample=False,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=rescale_betas_zero_snr,
        timestep_spacing="trailing",  # begins at the last timestep, as Lin et al. (2024) ask
    )


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
    Noisy latents and what a denoiser is to predict from them: epsilon, v, the flow's velocity, or the latents.

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
        noisy = (1 - sigmas) * latents + sigmas * noise
        return noisy, latents if predicts_sample(scheduler) else noise - latents
    noisy = scheduler.add_noise(latents, noise, timesteps)
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noisy, noise
    if prediction_type == "v_prediction":
        return noisy, scheduler.get_velocity(latents, noise, timesteps)
    if prediction_type == "sample":
        return noisy, latents
    raise ValueError(f'`prediction_type` must be "epsilon", "v_prediction" or "sample", but is {prediction_type!r}.')


def predicted_latents(
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler,
    prediction: torch.Tensor,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """The latents without noise that follow from a prediction, the inverse of [`add_noise`]; same shapes as there."""
    if predicts_sample(scheduler):
        return prediction
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return noisy - _sigmas(scheduler, timesteps) * prediction
    if scheduler.config.prediction_type == "v_prediction":
        # x_0 = sqrt(alpha) x_t - sqrt(1 - alpha) v: a rotation, as v is of x_0 and the noise.
        return scheduler.get_velocity(prediction, noisy, timesteps)
    alphas = scheduler.alphas_cumprod.to(noisy.device)[timesteps].view(-1, 1, 1, 1)
    return (noisy - (1 - alphas).sqrt() * prediction) / alphas.sqrt()


def _sigmas(scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler, timesteps: torch.Tensor) -> torch.Tensor:
    """How much noise there is at timesteps `[B]`: `[B, 1, 1, 1]`."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return (timesteps / scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)
    return (1 - scheduler.alphas_cumprod.to(timesteps.device)[timesteps]).sqrt().view(-1, 1, 1, 1)


def denoising_loss(
    denoiser: nn.Module,
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler,
    latents: torch.Tensor,
    condition: torch.Tensor,
    snr_gamma: float | None = None,
    channel_weights: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    weighting_scheme: str = "none",
    noise_offset: float = 0.0,
    input_perturbation: float = 0.0,
) -> torch.Tensor:
    """
    Mean squared error of the prediction at random timesteps; of predicted latents (`prediction_type` sample) the error
    of the v or the velocity that follows from them, (x_predicted - x) / sigma (Li & He, 2025, "Back to Basics": data
    lie near a manifold and noise does not, so a narrow denoiser can predict the former).

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
        noise_offset (`float`): Times this, noise that is the same all over a channel is added to the noise
            (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
        input_perturbation (`float`): Times this, noise is added to the noisy latents that the prediction is not to
            know of (Ning et al., 2023, "Input Perturbation Reduces Exposure Bias in Diffusion Models").

    Returns:
        `torch.Tensor` of shape `(B,)`, float32.

    Raises:
        ValueError: if the scheduler predicts something else than epsilon, v or latents.
    """
    device = latents.device if generator is None else "cpu"

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(latents.device)

    noise = normal(*latents.shape)
    timesteps = draw_timesteps(scheduler, len(latents), weighting_scheme, generator, device).to(latents.device)
    if noise_offset:
        noise = noise + noise_offset * normal(*latents.shape[:2], 1, 1)
    noisy, target = add_noise(scheduler, latents, noise, timesteps)
    if input_perturbation:
        perturbed = noise + input_perturbation * normal(*latents.shape)
        noisy, _ = add_noise(scheduler, latents, perturbed, timesteps)
    prediction = denoiser(noisy, timesteps, condition).float()
    error = prediction - target
    if predicts_sample(scheduler):
        error = error / _sigmas(scheduler, timesteps).clamp(min=_MIN_SIGMA)
    loss = error.square().mean((2, 3))
    loss = loss.mean(1) if channel_weights is None else (loss * channel_weights.to(loss)).mean(1)
    if snr_gamma is None:
        return loss
    snr = compute_snr(scheduler, timesteps)
    offset = 0 if scheduler.config.prediction_type == "epsilon" else 1
    return loss * snr.clamp(max=snr_gamma) / (snr + offset).clamp(min=1e-8)
