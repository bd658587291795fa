"""Pictures as a denoiser sees them: quantised, normalised latents."""

from collections.abc import Iterable

import torch
import torch.nn as nn

from ..models.autoencoder_pq import PQModel


@torch.no_grad()
def encode_latents(vae: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """
    Encode pictures.

    Args:
        vae: A [`PQModel`] or another image autoencoder of diffusers; a distribution of latents is sampled.
        images (`torch.Tensor` of shape `(B, 3, H, W)`): In [-1, 1], any float dtype.

    Returns:
        `torch.Tensor` of shape `(B, d, H/F, W/F)`, float32: of a `PQModel` the quantised latents.
    """
    images = images.to(vae.device, vae.dtype)
    if isinstance(vae, PQModel):
        return vae.quantize(vae.encode(images).latents).latents.float()
    encoded = vae.encode(images)
    if "latent_dist" in encoded:
        return encoded.latent_dist.sample().float()
    return (encoded.latents if "latents" in encoded else encoded.latent).float()


def scale_latents(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """What [`encode_latents`] returns as a denoiser sees it: normalised by the statistics in the config."""
    if isinstance(vae, PQModel):
        return vae.scale_latents(latents)
    return (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


def decode_latents(vae: nn.Module, latents: torch.Tensor, quantize: bool = True) -> torch.Tensor:
    """
    Pictures of what a denoiser makes, the inverse of [`encode_latents`] and [`scale_latents`].

    Args:
        vae: See [`encode_latents`].
        latents (`torch.Tensor` of shape `(B, d, h, w)`): Normalised.
        quantize (`bool`): Whether a [`PQModel`] snaps them to its codebooks first.

    Returns:
        `torch.Tensor` of shape `(B, 3, F*h, F*w)`, about [-1, 1].
    """
    latents = latents.to(vae.dtype)
    if isinstance(vae, PQModel):
        return vae.decode(vae.unscale_latents(latents), quantize=quantize).sample
    return vae.decode(latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)).sample


def channel_weights(vae: nn.Module, power: float) -> torch.Tensor | None:
    """
    Weights of the channels in a denoising loss, by how much the picture depends on them.

    Normalisation brings all channels of a [`PQModel`] to variance 1, those that hardly change the picture too, and a
    plain loss then spends a small denoiser on these. A channel's weight here is its standard deviation before
    normalisation to the given power: 2 measures errors as unnormalised latents do.

    Args:
        vae: With the statistics of [`set_latent_statistics`].
        power (`float`): 0 is the plain loss.

    Returns:
        `torch.Tensor` of shape `(d,)` and mean 1; `None` for equal weights, which an `AutoencoderKL` always has.
    """
    if power == 0 or not isinstance(vae, PQModel) or vae.config.latents_std is None:
        return None
    weights = torch.tensor(vae.config.latents_std) ** power
    return weights / weights.mean()


@torch.no_grad()
def set_latent_statistics(vae: nn.Module, batches: Iterable[torch.Tensor]):
    """
    Set an autoencoder's config so that a denoiser sees latents of variance 1: mean and standard deviation of each
    channel of a [`PQModel`] (its latents have many channels of unlike scale), `scaling_factor` of others.

    Args:
        vae: Changed in place.
        batches (iterable of `torch.Tensor` of shape `(B, d, h, w)`): What [`encode_latents`] returns.
    """
    count, total, squares = 0, 0.0, 0.0
    for latents in batches:
        latents = latents.double()
        count += latents[:, 0].numel()
        total = total + latents.sum((0, 2, 3))
        squares = squares + latents.square().sum((0, 2, 3))
    mean = total / count
    if isinstance(vae, PQModel):
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        std = torch.where(std > 1e-6, std, 1.0)  # a channel that never changes keeps its scale
        vae.register_to_config(scaling_factor=1.0, latents_mean=mean.tolist(), latents_std=std.tolist())
    else:
        variance = squares.sum() / (count * len(mean)) - mean.mean().square()
        shift = {"shift_factor": None} if "shift_factor" in vae.config else {}
        vae.register_to_config(**shift, scaling_factor=float(variance.rsqrt()))
