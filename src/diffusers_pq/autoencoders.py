"""One view on any image autoencoder of diffusers: loading it, and pictures as a denoiser sees them."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping

import diffusers
import torch
import torch.nn as nn
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderRAE
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import BaseOutput

from .files import folder_or_hub, naming, read_json
from .models.autoencoder_pq import PQModel
from .models.product_quantization import QuantizedAutoencoder


AUTOENCODERS = {
    "PQModel": PQModel,
    "AutoencoderKL": AutoencoderKL,
    "QuantizedAutoencoder": QuantizedAutoencoder,
}


def autoencoder_class(path_or_repo: str, **hub_kwargs) -> type:
    """
    The class named in a model's `config.json`.

    Raises:
        OSError: if there is no such file; of a pipeline's folder, names the model in it.
        ValueError: if it is not one of `AUTOENCODERS`.
    """
    if os.path.isfile(os.path.join(path_or_repo, "model_index.json")) and not hub_kwargs.get("subfolder"):
        raise OSError(
            f"{path_or_repo} holds a pipeline: name the autoencoder in it, {os.path.join(path_or_repo, 'vae')}."
        )
    with folder_or_hub(path_or_repo):
        config = PQModel.load_config(path_or_repo, **hub_kwargs)
    name = config.get("_class_name")
    if name not in AUTOENCODERS:
        raise ValueError(f"{path_or_repo} holds {name!r} in its config.json; known are {', '.join(AUTOENCODERS)}.")
    return AUTOENCODERS[name]


def load_autoencoder(path_or_repo: str, **hub_kwargs) -> nn.Module:
    """
    Load a trained autoencoder from a folder or the Hub, in eval mode.

    Raises:
        OSError: if there is no such model, or its weights file is damaged or no safetensors file.
        ValueError: if the class is unknown or the weights do not fit the config.
    """
    return load_whole_model(autoencoder_class(path_or_repo, **hub_kwargs), path_or_repo, **hub_kwargs).eval()


def load_pretrained(pretrained_model_name_or_path: str, **hub_kwargs) -> nn.Module:
    """
    Load an image autoencoder of any class of diffusers, or one of `AUTOENCODERS`, in eval mode.

    Args:
        pretrained_model_name_or_path (`str`): Folder or Hub repository.
        hub_kwargs: `subfolder`, `revision`, `variant` and others of `from_pretrained`.

    Raises:
        OSError: if there is no such model.
        ValueError: if it is not an autoencoder, or the weights do not fit its config.
    """
    with folder_or_hub(pretrained_model_name_or_path):
        class_name = PQModel.load_config(pretrained_model_name_or_path, **hub_kwargs).get("_class_name")
    if class_name in AUTOENCODERS:
        return load_autoencoder(pretrained_model_name_or_path, **hub_kwargs)
    model_class = getattr(diffusers, str(class_name), None)
    if not (hasattr(model_class, "encode") and hasattr(model_class, "decode")):
        raise ValueError(
            f"{pretrained_model_name_or_path} holds {class_name}, which is not an autoencoder of diffusers."
        )
    model, info = model_class.from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **hub_kwargs)
    if info["missing_keys"]:
        raise ValueError(f"The weights of {pretrained_model_name_or_path} lack {info['missing_keys']}.")
    return model.eval()


def load_whole_model(model_class: type, path_or_repo: str | os.PathLike, **hub_kwargs) -> nn.Module:
    """
    `from_pretrained` of a diffusers model that refuses what diffusers lets pass: pickles, which could run code, and
    weights that are missing or left over, with a `ValueError`.
    """
    model, info = model_class.from_pretrained(
        path_or_repo, use_safetensors=True, output_loading_info=True, **hub_kwargs
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(
            f"The weights of {path_or_repo} do not fit its config.json: missing {info['missing_keys']}, "
            f"unexpected {info['unexpected_keys']}."
        )
    return model


def weights_digest(model: nn.Module) -> str:
    """
    SHA-256 of a model's weights, and of the normalisation of pictures that belongs to them where there is one: says
    whether two models are the same wherever they came from.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    if isinstance(model, PQModel) and model.config.image_mean is not None:
        digest.update(json.dumps([model.config.image_mean, model.config.image_std]).encode())
    return digest.hexdigest()


def load_pq_model(path_or_repo: str, **hub_kwargs) -> PQModel:
    """[`load_autoencoder`] for a model that must have codes; a `ValueError` names another class."""
    model = load_autoencoder(path_or_repo, **hub_kwargs)
    if not isinstance(model, PQModel):
        raise ValueError(f"{path_or_repo} holds {type(model).__name__}, which has no codes. Give a PQModel.")
    return model


def create_autoencoder(config_name_or_path: str, **overrides) -> nn.Module:
    """A fresh autoencoder from a `config.json`, a folder or a Hub repository that holds one; overrides win over it."""
    if config_name_or_path.endswith(".json"):
        config = read_json(config_name_or_path, dict)
        if config.get("_class_name") not in AUTOENCODERS:
            raise ValueError(f"{config_name_or_path} must name a `_class_name` out of {', '.join(AUTOENCODERS)}.")
        model_class = AUTOENCODERS[config["_class_name"]]
    else:
        model_class = autoencoder_class(config_name_or_path)
        config = model_class.load_config(config_name_or_path)
    with naming(config_name_or_path):
        return model_class.from_config(config, **overrides)


def downsampling_factor(model: nn.Module) -> int:
    """F: the ratio of image side to latent side, of any image autoencoder of diffusers with levels."""
    if isinstance(model, PQModel):
        return model.downsampling_factor
    if isinstance(model, AutoencoderRAE):
        return model.config.patch_size
    names = ("block_out_channels", "encoder_block_out_channels", "dim_mult")
    levels = next(model.config[name] for name in names if model.config.get(name))
    return 2 ** (len(levels) - 1)


def check_resolution(name: str, resolution: int, factor: int, patch_size: int = 1):
    """Raise a `ValueError` if pictures of this side have no whole latents or patches; `name` is that of the flag."""
    if resolution % (factor * patch_size):
        patches = f" times the patch size {patch_size}" if patch_size > 1 else ""
        raise ValueError(f"{name}: {resolution} must be a multiple of the downsampling factor F = {factor}{patches}.")


def encode_pictures(model: nn.Module, images: torch.Tensor) -> BaseOutput:
    """`model.encode` of pictures `[B, 3, H, W]` in [-1, 1], also where it takes videos or another range."""
    if isinstance(model, AutoencoderKLQwenImage):
        return model.encode(images.unsqueeze(2))
    return model.encode(images / 2 + 0.5 if isinstance(model, AutoencoderRAE) else images)


def decode_pictures(model: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Pictures `[B, 3, H, W]`, about [-1, 1], of the latents that [`encode_pictures`] gives."""
    pictures = model.decode(latents).sample
    if isinstance(model, AutoencoderKLQwenImage):
        return pictures.squeeze(2)
    return pictures * 2 - 1 if isinstance(model, AutoencoderRAE) else pictures


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
    return reused_latents(vae, encode_reusably(vae, images), vae.device)


@torch.no_grad()
def encode_reusably(vae: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    What [`encode_latents`] needs the encoder for, so that [`reused_latents`] makes latents of it as often as wanted.

    Args:
        vae, images: See [`encode_latents`].

    Returns:
        `dict[str, torch.Tensor]`: One entry of batch size B: `codes` of a `PQModel`, `moments` of an autoencoder whose
        latents are distributions, `latents` of others.
    """
    images = images.to(vae.device, vae.dtype)
    if isinstance(vae, PQModel):
        return {"codes": vae.encode_codes(images).int()}  # half the memory
    encoded = vae.encode(images)
    if "latent_dist" in encoded:
        return {"moments": encoded.latent_dist.parameters}
    return {"latents": (encoded.latents if "latents" in encoded else encoded.latent).float()}


@torch.no_grad()
def reused_latents(vae: nn.Module, encoded: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor | None:
    """
    What [`encode_latents`] would return, on a device, of what [`encode_reusably`] returned; `None` if there is nothing
    of it in the mapping.
    """
    if "codes" in encoded:
        # Not `lookup`, which would look at the codes and so wait for a GPU.
        return vae.quantizer(codes=encoded["codes"].to(vae.device).long()).float().to(device)
    if "moments" in encoded:
        return DiagonalGaussianDistribution(encoded["moments"].to(device)).sample().float()
    return encoded["latents"].to(device) if "latents" in encoded else None


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
        # Not None, which the pipelines of Stable Diffusion 3 could not add.
        shift = {"shift_factor": 0.0} if "shift_factor" in vae.config else {}
        vae.register_to_config(**shift, scaling_factor=float(variance.rsqrt()))
