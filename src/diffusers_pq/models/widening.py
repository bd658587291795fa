"""Denoisers with more latent channels: the surgery that puts Stable Diffusion on PQ latents (section 4.5)."""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from diffusers import ModelMixin, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel


WideningInit = Literal["copy", "copy_scaled", "zero"]


@dataclass(frozen=True)
class _Ends:
    """Where a denoiser class keeps its first and last layer."""

    first: str  # a convolution over the latents
    last: str  # a convolution, or a linear layer whose output holds the channels of each patch pixel by pixel


_KNOWN = {
    UNet2DConditionModel: _Ends("conv_in", "conv_out"),
    PixArtTransformer2DModel: _Ends("pos_embed.proj", "proj_out"),
    SD3Transformer2DModel: _Ends("pos_embed.proj", "proj_out"),
}


def widen_unet(unet: UNet2DConditionModel, latent_channels: int, init: WideningInit = "copy") -> UNet2DConditionModel:
    r"""
    A copy of a UNet that takes and predicts latents of `latent_channels` channels (section 4.5).

    Only the first and the last convolution change; all other weights are bit-identical, and `unet` stays as it is.

    Args:
        unet (`UNet2DConditionModel`): Of Stable Diffusion 1.x, 2.x, XL or alike, or one that was widened before.
        latent_channels (`int`): d of the [`PQModel`] the UNet shall work on.
        init (`str`, *optional*, defaults to `"copy"`): The weights of the new channels.

            - `"copy"`: channel c takes those of channel c mod 4 (the paper).
            - `"copy_scaled"`: the same, the first convolution scaled so that its output keeps the variance it had on
              latents of as many independent channels as before.
            - `"zero"`: zeros; the UNet ignores the new channels and predicts zero for them.

    Returns:
        `UNet2DConditionModel`: With `in_channels` and `out_channels` of its config set, in the dtype and on the device
        of `unet`.

    Raises:
        TypeError: if `unet` is no `UNet2DConditionModel`.
        ValueError: if `latent_channels` is not positive, `init` is unknown, or the UNet takes more than latents as its
            input (inpainting UNets do).
    """
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(
            f"`unet` must be a UNet2DConditionModel, but is a {type(unet).__name__}: see `widen_denoiser`."
        )
    return widen_denoiser(unet, latent_channels, init)


def widen_denoiser(denoiser: ModelMixin, latent_channels: int, init: WideningInit = "copy") -> ModelMixin:
    """
    [`widen_unet`] for every denoiser with one input and one output layer over the latents' channels.

    A transformer that also predicts variances (PixArt) has them widened like its prediction.

    Args:
        denoiser: A `UNet2DConditionModel`, `PixArtTransformer2DModel` or `SD3Transformer2DModel`.
        latent_channels (`int`): Channels of the latents to work on.
        init (`str`, *optional*, defaults to `"copy"`): See [`widen_unet`].

    Raises:
        TypeError: if the class is not known; the message lists those that are.
        ValueError: see [`widen_unet`].
    """
    ends = next((ends for known, ends in _KNOWN.items() if isinstance(denoiser, known)), None)
    if ends is None:
        names = ", ".join(known.__name__ for known in _KNOWN)
        raise TypeError(f"`widen_denoiser` knows {names}, but was given a {type(denoiser).__name__}.")
    if latent_channels < 1:
        raise ValueError(f"`latent_channels` must be at least 1, but is {latent_channels}.")
    if init not in ("copy", "copy_scaled", "zero"):
        raise ValueError(f'`init` must be "copy", "copy_scaled" or "zero", but is {init!r}.')
    old = denoiser.config.in_channels
    predicted = denoiser.config.out_channels or old
    if predicted % old:
        raise ValueError(
            f"The denoiser takes {old} channels and predicts {predicted}: it is made for more than latents as its "
            "input (inpainting, say) and cannot be widened."
        )
    # Prediction, and variance where the denoiser has one: each is widened by itself.
    parts = predicted // old

    widened = copy.deepcopy(denoiser)
    first = _widen_first(denoiser.get_submodule(ends.first), latent_channels, init)
    last = _widen_last(denoiser.get_submodule(ends.last), old, parts, latent_channels, init)
    widened.set_submodule(ends.first, first)
    widened.set_submodule(ends.last, last)
    widened.register_to_config(in_channels=latent_channels, out_channels=parts * latent_channels)
    if "out_channels" in vars(widened):  # transformers use the attribute in their forward
        widened.out_channels = parts * latent_channels
    return widened


def _cyclic(channels: int, old: int) -> torch.Tensor:
    return torch.arange(channels) % old


def _widen_first(layer: nn.Conv2d, channels: int, init: WideningInit) -> nn.Conv2d:
    old = layer.in_channels
    weight = layer.weight.detach()[:, _cyclic(channels, old)]
    if init == "copy_scaled":
        # Var[sum_c w_c x_c] = sum_c |w_c|^2 for independent x_c of unit variance.
        weight = weight * math.sqrt(
            float(layer.weight.detach().float().square().sum() / weight.float().square().sum())
        )
    if init == "zero":
        weight[:, old:] = 0
    return _like(layer, weight, layer.bias, in_channels=channels)


def _widen_last(layer: nn.Conv2d | nn.Linear, old: int, parts: int, channels: int, init: WideningInit) -> nn.Module:
    # The output is, from the slowest index to the fastest: pixels of a patch, parts, channels.
    def widen(values: torch.Tensor) -> torch.Tensor:
        values = values.detach().unflatten(0, (-1, parts, old))[:, :, _cyclic(channels, old)]
        if init == "zero":
            values[:, :, old:] = 0
        return values.flatten(0, 2)

    weight = widen(layer.weight)
    size = {"out_channels": len(weight)} if isinstance(layer, nn.Conv2d) else {"out_features": len(weight)}
    return _like(layer, weight, layer.bias if layer.bias is None else widen(layer.bias), **size)


def _like(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None, **sizes: int) -> nn.Module:
    """The layer with other sizes and parameters; stride, padding, hooks and training mode are kept."""
    new = copy.deepcopy(layer)
    for name, value in sizes.items():
        setattr(new, name, value)
    new.weight = nn.Parameter(weight.clone(), layer.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), layer.bias.requires_grad)
    return new
