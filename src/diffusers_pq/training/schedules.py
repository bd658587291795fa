"""Noise schedules for latents of any size and number of channels."""

import math

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin


# Values in the latents that the unshifted schedules suit: 32 x 32 x 4, those of a 256 px picture in LDM.
BASE_DIMENSION = 32 * 32 * 4
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
    scheduler: SchedulerMixin, shift: float = 1.0, rescale_betas_zero_snr: bool = False
) -> DDIMScheduler:
    """
    The scheduler to adapt a diffusion model with: that of the model, with more noise for larger latents.

    Args:
        scheduler (`SchedulerMixin`): The model's, with betas; any that its config can make a DDIMScheduler of.
        shift (`float`): See [`latent_shift`]; 1 shifts nothing.
        rescale_betas_zero_snr (`bool`): End in pure noise (Lin et al., 2024).

    Raises:
        ValueError: if epsilon is to be predicted where there is nothing but noise.
    """
    # Latents have no bounds to be clipped to; DDIM's default is that of pixels.
    adapted = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    changes = {}
    if shift != 1:
        # To the end: after a shift, even the first timestep has noise to be seen.
        changes |= {"trained_betas": shifted_betas(adapted.betas, shift).tolist(), "set_alpha_to_one": True}
    if rescale_betas_zero_snr:
        _check_prediction_type(adapted.config.prediction_type)
        # From the last timestep, as Lin et al. ask.
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return DDIMScheduler.from_config(adapted.config, **changes)


def _check_prediction_type(prediction_type: str):
    if prediction_type == "epsilon":
        raise ValueError(
            "`rescale_betas_zero_snr` needs `prediction_type` v_prediction: from epsilon, no picture can be told at "
            "the last timestep."
        )


def create_scheduler(
    objective: str, prediction_type: str = "epsilon", shift: float = 1.0, rescale_betas_zero_snr: bool = False
) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """
    The scheduler to train and to sample with; its config holds all that is set here.

    Args:
        objective (`str`): `"diffusion"`, with LDM's schedule, or `"flow_matching"`.
        prediction_type (`str`): `"epsilon"` or `"v_prediction"`, of diffusion.
        shift (`float`): See [`latent_shift`]; 1 shifts nothing.
        rescale_betas_zero_snr (`bool`): End diffusion in pure noise (Lin et al., 2024).

    Raises:
        ValueError: if epsilon is to be predicted where there is nothing but noise.
    """
    if objective == "flow_matching":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
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
