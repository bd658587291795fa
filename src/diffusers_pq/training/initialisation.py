"""Starts for the weights of an autoencoder. The paper uses none of them; they make short runs worth while."""

import math
from collections.abc import Iterable

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D

from ..models.kmeans import balanced_order


# Patches in a least-squares fit: far more than the some hundred unknowns of each output channel.
_MAX_PATCHES = 2**16
# Relative to the inputs' mean power; keeps the fit from amplifying directions that the pictures hardly use.
_RIDGE = 1e-4
# Value of the constant channel. It should outweigh the picture in the final normalisations, so that these divide
# pictures of low and of high contrast by nearly the same number.
_CONSTANT = 8.0
# Log variance that the posterior of an AutoencoderKL starts from: little noise beside components of variance 1.
_LOG_VARIANCE = -6.0


@torch.no_grad()
def pca_init(model: nn.Module, images: torch.Tensor, num_subspaces: int = 1, rotation_seed: int | None = None):
    """
    Start an autoencoder as the best linear one that its layers can hold, fitted to pictures.

    Residual and attention blocks start from the identity, which leaves a chain of convolutions. In the encoder, each
    strided one takes the principal components of its 2 x 2 patches. In the decoder, each convolution behind an
    upsampling is fitted by least squares to what the encoder held at that resolution. The final normalisation and
    activation of both halves are passed in pairs of x and -x, of which silu(x) - silu(-x) = x; a half whose last block
    does not change the number of channels has no place for the pairs, and starts from a poorer fit.

    Args:
        model ([`PQModel`] or `AutoencoderKL`): Changed in place.
        images (`torch.Tensor` of shape `(B, 3, H, W)`): Pictures in [-1, 1].
        num_subspaces (`int`): The components are dealt out to so many subspaces, the largest with the smallest, so
            that all subspaces have about as much to tell.
        rotation_seed (`int`, *optional*): Rotate the components at random instead of dealing them out, so that all
            channels have about as much to tell, whatever the bottleneck. The rotation depends on the seed and the
            number of components alone.
    """
    _set_branches_to_zero(model)
    streams, latents = _init_encoder(model, images, num_subspaces, rotation_seed)
    _init_decoder(model, latents, streams, images)


def _set_branches_to_zero(model: nn.Module):
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.orthogonal_(module.conv1.weight)
            nn.init.zeros_(module.conv1.bias)
            last = module.conv2
        elif isinstance(module, Attention):
            last = module.to_out[0]
        else:
            continue
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


def _init_encoder(
    model: nn.Module, images: torch.Tensor, num_subspaces: int, rotation_seed: int | None
) -> tuple[list, torch.Tensor]:
    """Set the encoder; returns what it holds at each resolution, finest first, and the latents."""
    encoder = model.encoder
    _set_identity(encoder.conv_in)
    encoder.conv_in.bias[images.shape[1]] = _CONSTANT
    stream, used = encoder.conv_in(images), images.shape[1] + 1
    streams = []
    for block in encoder.down_blocks:
        stream = _pass_resnets(block.resnets, stream, used, mirror=block is encoder.down_blocks[-1])
        if block.downsamplers is None:
            continue
        streams.append(stream[:, :used])
        used = _set_principal_components(block.downsamplers[0].conv, stream, used)
        stream = block.downsamplers[0](stream)
    count = min(encoder.conv_out.out_channels, model.config.latent_channels)
    components = _principal_components(stream[:, :used], count)
    if rotation_seed is None:
        components = _dealt_out(components, num_subspaces)
    else:
        components = _rotated(components, rotation_seed)
    features = encoder.conv_act(encoder.conv_norm_out(encoder.mid_block(stream)))
    _fit_convolution(encoder.conv_out, features, components)
    if isinstance(model, AutoencoderKL):
        encoder.conv_out.bias[model.config.latent_channels :] = _LOG_VARIANCE
    for conv in (model.quant_conv, model.post_quant_conv):
        if conv is not None:
            _set_identity(conv)
    moments = encoder.conv_out(features) if model.quant_conv is None else model.quant_conv(encoder.conv_out(features))
    return streams, moments[:, : model.config.latent_channels]


def _init_decoder(model: nn.Module, latents: torch.Tensor, streams: list[torch.Tensor], images: torch.Tensor):
    decoder = model.decoder
    _set_identity(decoder.conv_in)
    stream = latents if model.post_quant_conv is None else model.post_quant_conv(latents)
    stream, used = decoder.mid_block(decoder.conv_in(stream)), latents.shape[1]
    for block in decoder.up_blocks:
        stream = _pass_resnets(block.resnets, stream, used, mirror=block is decoder.up_blocks[-1])
        if block.upsamplers is None:
            continue
        target = streams.pop()
        used = min(target.shape[1], stream.shape[1])
        conv = block.upsamplers[0].conv
        _fit_convolution(conv, F.interpolate(stream, scale_factor=2.0, mode="nearest"), target[:, :used])
        stream = block.upsamplers[0](stream)
    _fit_convolution(decoder.conv_out, decoder.conv_act(decoder.conv_norm_out(stream)), images)


def _pass_resnets(resnets: nn.ModuleList, stream: torch.Tensor, used: int, mirror: bool) -> torch.Tensor:
    for resnet in resnets:
        if resnet.conv_shortcut is not None:
            _set_identity(resnet.conv_shortcut)
            if mirror:
                _add_mirror(resnet.conv_shortcut, used)
        stream = resnet(stream, temb=None)
    return stream


def _set_identity(conv: nn.Conv2d):
    nn.init.dirac_(conv.weight)
    nn.init.zeros_(conv.bias)


def _add_mirror(shortcut: nn.Conv2d, used: int):
    """Put -x of the used channels into the upper half of the channels."""
    half = shortcut.out_channels // 2
    count = min(used, half)
    shortcut.weight[half : half + count] = -shortcut.weight[:count]
    shortcut.weight[count:half] = 0


def _set_principal_components(conv: nn.Conv2d, stream: torch.Tensor, used: int) -> int:
    """Set a strided 3 x 3 convolution to the components of 2 x 2 patches; returns how many there are."""
    patches = F.unfold(stream[:, :used], 2, stride=2).transpose(1, 2).flatten(0, 1)
    count = min(conv.out_channels, patches.shape[1])
    directions = _eigenvectors(patches)[:, :count]
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    # diffusers pads at the right and the bottom: a 3 x 3 kernel begins with its patch.
    conv.weight[:count, :used, :2, :2] = directions.T.reshape(count, used, 2, 2)
    return count


def _principal_components(stream: torch.Tensor, count: int) -> torch.Tensor:
    """Of the stream's pixels, centred: the constant channel and the pictures' mean need no place in the latents."""
    pixels = (stream - stream.mean((0, 2, 3), keepdim=True)).movedim(1, -1)
    count = min(count, pixels.shape[-1])
    return (pixels @ _eigenvectors(pixels.flatten(0, -2))[:, :count]).movedim(-1, 1)


def _dealt_out(components: torch.Tensor, num_subspaces: int) -> torch.Tensor:
    """Components `[B, d, h, w]` in [`balanced_order`], where S divides d."""
    if components.shape[1] % num_subspaces:
        return components
    return components[:, balanced_order(components.shape[1], num_subspaces)]


def _rotated(components: torch.Tensor, seed: int) -> torch.Tensor:
    """Components `[B, d, h, w]` times a random orthogonal matrix."""
    generator = torch.Generator().manual_seed(seed)
    rotation = nn.init.orthogonal_(torch.empty([components.shape[1]] * 2), generator=generator)
    return torch.einsum("ij,bjhw->bihw", rotation.to(components), components)


def _eigenvectors(rows: torch.Tensor) -> torch.Tensor:
    """Of the second moments, in columns, largest first."""
    rows = rows.double()
    return torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1).float()


def _sample_patches(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """3 x 3 patches with a 1 for the bias, and the targets' pixels in their middles, as float64 rows."""
    patches, wanted = [], []
    for one_input, one_target in zip(inputs, targets):  # one after the other: all patches of all pictures are too many
        rows = F.unfold(one_input[None], 3, padding=1)[0].T
        chosen = torch.randperm(len(rows), device=rows.device)[: math.ceil(_MAX_PATCHES / len(inputs))]
        patches.append(F.pad(rows[chosen], (0, 1), value=1.0).double())
        wanted.append(one_target.flatten(1).T[chosen].double())
    return torch.cat(patches), torch.cat(wanted)


def _fit_convolution(conv: nn.Conv2d, inputs: torch.Tensor, targets: torch.Tensor):
    """Ridge regression of a 3 x 3 convolution and its bias; output channels beyond the targets' become zero."""
    patches, wanted = _sample_patches(inputs, targets)
    gram = patches.T @ patches
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, patches.T @ wanted).T.to(conv.weight.dtype)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    conv.weight[: len(solution)] = solution[:, :-1].reshape(len(solution), *conv.weight.shape[1:])
    conv.bias[: len(solution)] = solution[:, -1]


@torch.no_grad()
def copy_matching_weights(model: nn.Module, source: nn.Module) -> list[str]:
    """
    Take over every parameter of another autoencoder that has the same name and shape.

    Backbones of one layout share all but what depends on the bottleneck, so a `PQModel` can start from the encoder and
    decoder of an `AutoencoderKL`, or the other way round.

    Args:
        model: Changed in place.
        source: A [`PQModel`] or `AutoencoderKL`.

    Returns:
        `list[str]`: The names of the parameters of `model` that keep their own values.

    Raises:
        ValueError: if no parameter fits.
    """
    ours, theirs = model.state_dict(), source.state_dict()
    fitting = {name: theirs[name] for name in ours if name in theirs and theirs[name].shape == ours[name].shape}
    if not fitting:
        raise ValueError(
            f"No parameter of the {type(source).__name__} fits the {type(model).__name__}: "
            "give a backbone with the same block types and `block_out_channels`."
        )
    model.load_state_dict(fitting, strict=False)
    return [name for name in ours if name not in fitting]


@torch.no_grad()
def collect_latents(model: nn.Module, batches: Iterable[torch.Tensor], minimum: int) -> torch.Tensor:
    """
    Encode batches until there are enough latent pixels for k-means.

    Args:
        model ([`PQModel`])
        batches (iterable of `torch.Tensor` of shape `(B, 3, H, W)`): Pictures in [-1, 1]; all are used if too few.
        minimum (`int`): Latent pixels wanted.

    Returns:
        `torch.Tensor` of shape `(1, d, N, 1)`: z_e of N latent pixels.
    """
    latents, count = [], 0
    for images in batches:
        latent = model.encode(images.to(model.device)).latents
        latents.append(latent.movedim(1, 0).flatten(1))
        count += latents[-1].shape[1]
        if count >= minimum:
            break
    return torch.cat(latents, dim=1)[None, :, :, None]
