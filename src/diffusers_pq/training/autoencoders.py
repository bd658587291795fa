"""One view on the autoencoders that the trainer and the evaluation handle: `PQModel` and `AutoencoderKL`."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from diffusers import AutoencoderKL

from ..models.autoencoder_pq import PQModel
from ..models.quantizer import ProductQuantizer, nearest_codes


AUTOENCODERS = {"PQModel": PQModel, "AutoencoderKL": AutoencoderKL}


@dataclass
class Reconstruction:
    """
    Args:
        sample (`torch.Tensor` of shape `(B, 3, H, W)`): The reconstruction, about [-1, 1].
        regularisation (`torch.Tensor`, scalar): Codebook and commitment loss of Eq. 1, or the KL divergence.
        codes (`torch.LongTensor` of shape `(B, S, h, w)`, *optional*): The codes, `None` without a quantiser.
    """

    sample: torch.Tensor
    regularisation: torch.Tensor
    codes: torch.LongTensor | None


def autoencoder_class(path_or_repo: str, **hub_kwargs) -> type:
    """
    The class named in a model's `config.json`.

    Raises:
        ValueError: if it is not one of `AUTOENCODERS`.
    """
    config = PQModel.load_config(path_or_repo, **hub_kwargs)
    name = config.get("_class_name")
    if name not in AUTOENCODERS:
        raise ValueError(f"{path_or_repo} holds a {name!r} in its config.json; known are {', '.join(AUTOENCODERS)}.")
    return AUTOENCODERS[name]


def load_autoencoder(path_or_repo: str, **hub_kwargs) -> nn.Module:
    """
    Load a trained autoencoder from a folder or the Hub, in eval mode.

    Raises:
        OSError: if there is no such model, or its weights file is damaged or no safetensors file.
        ValueError: if the class is unknown or the weights do not fit the config.
    """
    model_class = autoencoder_class(path_or_repo, **hub_kwargs)
    # Only safetensors: a pickle could run code.
    model, info = model_class.from_pretrained(
        path_or_repo, use_safetensors=True, output_loading_info=True, **hub_kwargs
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(
            f"The weights of {path_or_repo} do not fit its config.json: missing {info['missing_keys']}, "
            f"unexpected {info['unexpected_keys']}."
        )
    return model.eval()


def create_autoencoder(config_name_or_path: str) -> nn.Module:
    """A freshly initialised autoencoder from a `config.json`, a folder or a Hub repository that holds one."""
    if config_name_or_path.endswith(".json"):
        config = json.loads(Path(config_name_or_path).read_text(encoding="utf-8"))
        if config.get("_class_name") not in AUTOENCODERS:
            raise ValueError(f"{config_name_or_path} must name a `_class_name` out of {', '.join(AUTOENCODERS)}.")
        return AUTOENCODERS[config["_class_name"]].from_config(config)
    model_class = autoencoder_class(config_name_or_path)
    return model_class.from_config(model_class.load_config(config_name_or_path))


def downsampling_factor(model: nn.Module) -> int:
    """F: the ratio of image side to latent side."""
    return 2 ** (len(model.config.block_out_channels) - 1)


def bits_per_pixel(model: nn.Module) -> float:
    """Bits per image pixel of the stored latents: whole bits per code, or 16 (float16) per continuous value."""
    if isinstance(model, PQModel):
        return model.bits_per_pixel
    return model.config.latent_channels * 16 / downsampling_factor(model) ** 2


class ReconstructionModel(nn.Module):
    """
    Wraps an autoencoder so that one forward gives all that a training step needs; DDP then sees a single forward.

    Args:
        autoencoder: a [`PQModel`] or [`AutoencoderKL`].
    """

    def __init__(self, autoencoder: nn.Module):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: torch.Tensor, quantize: bool = True) -> Reconstruction:
        """
        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): In [-1, 1].
            quantize (`bool`): `False` decodes z_e itself, with a codebook loss of zero.
        """
        if isinstance(self.autoencoder, AutoencoderKL):
            return self._reconstruct_kl(images)
        if not quantize:
            latents = self.autoencoder.encode(images).latents
            sample = self.autoencoder.decode(latents, quantize=False).sample
            # Zero, but touches the codebooks: every parameter of a DDP model must receive a gradient.
            return Reconstruction(sample, 0.0 * self.autoencoder.quantizer.codebooks.sum(), None)
        output = self.autoencoder(images)
        return Reconstruction(output.sample, output.loss, output.codes)

    def _reconstruct_kl(self, images: torch.Tensor) -> Reconstruction:
        posterior = self.autoencoder.encode(images).latent_dist
        latents = posterior.sample() if self.training else posterior.mode()
        return Reconstruction(self.autoencoder.decode(latents).sample, posterior.kl().mean(), None)


@torch.no_grad()
def orthogonal_init(model: nn.Module):
    """
    Start every convolution from an orthogonal weight without bias, and every residual block from the identity.

    torch's default shrinks the signal at each layer until the biases drown it, which costs short runs many steps.
    Weights are changed in place.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        nn.init.zeros_(module.bias)
        if name.endswith("conv2"):  # the last convolution of a ResnetBlock2D's residual branch
            nn.init.zeros_(module.weight)
        else:
            nn.init.orthogonal_(module.weight)


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


@torch.no_grad()
def kmeans_codebooks(quantizer: ProductQuantizer, latents: torch.Tensor, iterations: int = 10):
    """
    Set the codebooks to k-means centres of latents, in every subspace at once.

    Args:
        quantizer ([`ProductQuantizer`]): Changed in place.
        latents (`torch.Tensor` of shape `(B, d, h, w)`): At least K latent pixels.
        iterations (`int`): Lloyd iterations. An entry that loses all its vectors restarts at a random one.

    Raises:
        ValueError: if there are fewer latent pixels than codebook entries.
    """
    vectors = quantizer.split(latents.float())
    subspaces, count, dimension = vectors.shape
    size = quantizer.codebook_size
    if count < size:
        raise ValueError(f"k-means needs at least codebook_size = {size} latent pixels, but was given {count}.")

    def random_vectors():
        picked = torch.rand(subspaces, count, device=vectors.device).argsort(-1)[:, :size]
        return vectors.gather(1, picked.unsqueeze(-1).expand(-1, -1, dimension))

    centres = random_vectors()
    for _ in range(iterations):
        codes = nearest_codes(vectors, centres)
        members = torch.zeros(subspaces, size, device=vectors.device).scatter_add_(
            1, codes, torch.ones_like(codes, dtype=torch.float32)
        )
        sums = torch.zeros_like(centres).scatter_add_(1, codes.unsqueeze(-1).expand(-1, -1, dimension), vectors)
        means = sums / members.clamp(min=1).unsqueeze(-1)
        centres = torch.where(members.unsqueeze(-1) > 0, means, random_vectors())
    quantizer.codebooks.copy_(centres)
