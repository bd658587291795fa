"""Denoisers with more latent channels: the surgery that puts Stable Diffusion on PQ latents (section 4.5)."""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from diffusers import ModelMixin, UNet2DConditionModel


WideningInit = Literal["copy", "copy_scaled", "zero"]
FeatureOrder = Literal["pixels_first", "channels_first"]


@dataclass(frozen=True)
class DenoiserEnds:
    """
    Where a denoiser keeps the two layers that depend on the number of latent channels.

    Args:
        first (`str`): Path of the layer that takes latents: a convolution, or a linear layer that takes patches. A
            `*` stands for all children of a module.
        last (`str`): Path of the layer that predicts; as `first`.
        first_order (`str`, *optional*, defaults to `"pixels_first"`): How a linear `first` numbers the values of a
            patch: `"pixels_first"` is (pixel, channel), channels running fastest, `"channels_first"` (channel, pixel).
        last_order (`str`, *optional*, defaults to `"pixels_first"`): The same of `last`.
        packed_pixels (`int`, *optional*, defaults to 1): Latent pixels that the pipeline packs into one token before
            the denoiser sees them: its `in_channels` counts so many values for each latent channel.
    """

    first: str
    last: str
    first_order: FeatureOrder = "pixels_first"
    last_order: FeatureOrder = "pixels_first"
    packed_pixels: int = 1


_CONVOLUTION_IN = DenoiserEnds("pos_embed.proj", "proj_out")
_PACKED_2X2 = DenoiserEnds("x_embedder", "proj_out", "channels_first", "channels_first", packed_pixels=4)

# By name, so that no transformer is imported that is not used. A subclass has the ends of its parent.
ENDS = {
    "UNet2DConditionModel": DenoiserEnds("conv_in", "conv_out"),
    "DiTTransformer2DModel": DenoiserEnds("pos_embed.proj", "proj_out_2"),
    "PixArtTransformer2DModel": _CONVOLUTION_IN,
    "HunyuanDiT2DModel": _CONVOLUTION_IN,
    "SD3Transformer2DModel": _CONVOLUTION_IN,
    "SanaTransformer2DModel": DenoiserEnds("patch_embed.proj", "proj_out"),
    "AuraFlowTransformer2DModel": DenoiserEnds("pos_embed.proj", "proj_out", first_order="channels_first"),
    "FluxTransformer2DModel": _PACKED_2X2,
    "Flux2Transformer2DModel": _PACKED_2X2,
    "ChromaTransformer2DModel": _PACKED_2X2,
    "QwenImageTransformer2DModel": DenoiserEnds("img_in", "proj_out", "channels_first", "channels_first", 4),
    "Lumina2Transformer2DModel": DenoiserEnds("x_embedder", "norm_out.linear_2"),
    "ZImageTransformer2DModel": DenoiserEnds("all_x_embedder.*", "all_final_layer.*.linear"),
}


def widen_unet(unet: UNet2DConditionModel, latent_channels: int, init: WideningInit = "copy") -> UNet2DConditionModel:
    r"""
    A copy of a UNet that takes and predicts latents of `latent_channels` channels (section 4.5).

    Only the first and the last convolution change; all other weights are bit-identical, and `unet` stays as it is.

    Args:
        unet (`UNet2DConditionModel`):
            Of Stable Diffusion 1.x, 2.x or XL, or of a similar model, or one that was widened before.
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


def widen_denoiser(
    denoiser: ModelMixin, latent_channels: int, init: WideningInit = "copy", ends: DenoiserEnds | None = None
) -> ModelMixin:
    """
    [`widen_unet`] for the UNets and image transformers of diffusers, see `ENDS`.

    Only the layers that take latents and that predict change; modulated norms before the latter work on the hidden
    width and stay. A denoiser that also predicts variances (PixArt, DiT, HunyuanDiT) has them widened like its
    prediction.

    Args:
        denoiser (`ModelMixin`): Of a class in `ENDS`, or of any other with `ends`.
        latent_channels (`int`): Channels of the autoencoder's latents, before a pipeline packs them into patches: 16
            for the transformer of Flux as published, whose `in_channels` is 64.
        init (`str`, *optional*, defaults to `"copy"`): See [`widen_unet`].
        ends ([`DenoiserEnds`], *optional*): Where the two layers are. Default: what `ENDS` says about the class.

    Returns:
        `ModelMixin`: A denoiser of the same class, dtype and device; `denoiser` stays as it is.

    Raises:
        TypeError: if the class is not known and `ends` are not given, or a layer is neither a convolution nor linear.
        ValueError: see [`widen_unet`].
    """
    ends = find_ends(denoiser) if ends is None else ends
    if latent_channels < 1:
        raise ValueError(f"`latent_channels` must be at least 1, but is {latent_channels}.")
    if init not in ("copy", "copy_scaled", "zero"):
        raise ValueError(f'`init` must be "copy", "copy_scaled" or "zero", but is {init!r}.')
    old = denoiser.config.in_channels // ends.packed_pixels

    widened = copy.deepcopy(denoiser)
    for first_path, last_path in zip(_paths(denoiser, ends.first), _paths(denoiser, ends.last), strict=True):
        first, last = _layer(denoiser, first_path), _layer(denoiser, last_path)
        pixels = _patch_pixels(first, old)
        parts = _parts(last, old, pixels)
        # A convolution has the pixels of a patch in its kernel.
        inputs = 1 if isinstance(first, nn.Conv2d) else pixels
        source = _sources(old, latent_channels, inputs, 1, ends.first_order)
        widened.set_submodule(first_path, _widen_first(first, source, init))
        source = _sources(old, latent_channels, pixels, parts, ends.last_order)
        widened.set_submodule(last_path, _widen_last(last, source, init))
    for name in ("in_channels", "out_channels"):
        if widened.config.get(name) is not None:
            widened.register_to_config(**{name: widened.config[name] // old * latent_channels})
        if name in vars(widened):  # transformers use the attribute in their forward
            setattr(widened, name, vars(widened)[name] // old * latent_channels)
    return widened


def find_ends(denoiser: nn.Module) -> DenoiserEnds:
    """
    The entry of `ENDS` for a denoiser's class or one of its parents.

    Raises:
        TypeError: if there is none; the message lists the classes and says what an unknown one needs.
    """
    for parent in type(denoiser).__mro__:
        if parent.__name__ in ENDS:
            return ENDS[parent.__name__]
    raise TypeError(
        f"`widen_denoiser` knows {', '.join(ENDS)}, but was given a {type(denoiser).__name__}. Of another class it "
        "needs to know the first and the last layer and the order of their features: pass "
        '`ends=DenoiserEnds(first="...", last="...")`.'
    )


def outer_layers(denoiser: nn.Module, ends: DenoiserEnds | None = None) -> list[str]:
    """Paths of the layers that [`widen_denoiser`] replaces: those that an adaptation trains first."""
    ends = find_ends(denoiser) if ends is None else ends
    return [*_paths(denoiser, ends.first), *_paths(denoiser, ends.last)]


def _paths(denoiser: nn.Module, pattern: str) -> list[str]:
    if "*" not in pattern:
        return [pattern]
    parent, _, rest = pattern.partition(".*")
    return [f"{parent}.{child}{rest}" for child, _ in denoiser.get_submodule(parent).named_children()]


def _layer(denoiser: nn.Module, path: str) -> nn.Conv2d | nn.Linear:
    layer = denoiser.get_submodule(path)
    # Exactly these: a subclass has been quantised, say, and its weight is not what it seems.
    if type(layer) not in (nn.Conv2d, nn.Linear):
        raise TypeError(
            f"`{path}` must be a convolution or a linear layer, but is a {type(layer).__name__}: widen the denoiser "
            "before it gets adapters or is quantised."
        )
    return layer


def _patch_pixels(first: nn.Conv2d | nn.Linear, channels: int) -> int:
    return math.prod(first.stride) if isinstance(first, nn.Conv2d) else first.in_features // channels


def _parts(last: nn.Conv2d | nn.Linear, channels: int, pixels: int) -> int:
    """How many values are predicted of each input: 1, or 2 with a variance. Each part is widened by itself."""
    if len(last.weight) % (channels * pixels):
        raise ValueError(
            f"The denoiser takes {channels} channels and predicts {len(last.weight) // pixels}: it is made for more "
            "than latents as its input (inpainting, say) and cannot be widened."
        )
    return len(last.weight) // (channels * pixels)


def _sources(
    old: int, new: int, pixels: int, parts: int, order: FeatureOrder
) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """The old feature that each feature of a widened layer copies, and whether it is one of a new channel."""
    features = torch.arange(pixels * parts * old)
    features = features.view(-1, old, 1) if order == "pixels_first" else features.view(parts, old, pixels)
    channels = torch.arange(new)
    features = features[:, channels % old]
    return features.flatten(), (channels >= old)[:, None].expand_as(features).flatten()


def _widen_first(layer: nn.Conv2d | nn.Linear, source: tuple, init: WideningInit) -> nn.Module:
    index, is_new = source
    weight = layer.weight.detach()[:, index]
    if init == "copy_scaled":
        # Var[sum_c w_c x_c] = sum_c |w_c|^2 for independent x_c of unit variance.
        weight = weight * math.sqrt(
            float(layer.weight.detach().float().square().sum() / weight.float().square().sum())
        )
    if init == "zero":
        weight[:, is_new] = 0
    size = {"in_channels" if isinstance(layer, nn.Conv2d) else "in_features": weight.shape[1]}
    return _like(layer, weight, layer.bias, **size)


def _widen_last(layer: nn.Conv2d | nn.Linear, source: tuple, init: WideningInit) -> nn.Module:
    index, is_new = source

    def widen(values: torch.Tensor) -> torch.Tensor:
        values = values.detach()[index]
        if init == "zero":
            values[is_new] = 0
        return values

    weight = widen(layer.weight)
    size = {"out_channels" if isinstance(layer, nn.Conv2d) else "out_features": len(weight)}
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
