"""One view on the autoencoders that the trainer and the evaluation handle: `PQModel` and `AutoencoderKL`."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from diffusers import AutoencoderKL

from ..models.autoencoder_pq import PQModel


AUTOENCODERS = {"PQModel": PQModel, "AutoencoderKL": AutoencoderKL}


@dataclass
class Reconstruction:
    """
    Args:
        sample (`torch.Tensor` of shape `(B, 3, H, W)`): The reconstruction, about [-1, 1].
        regularisation (`torch.Tensor`, scalar): Codebook and commitment loss of Eq. 1, or the KL divergence.
        codes (`torch.LongTensor` of shape `(B, S, h, w)`, *optional*): The codes, `None` without a quantiser.
        latents (`torch.Tensor` of shape `(B, d, h, w)`, *optional*): z_e, detached, where there are codes.
    """

    sample: torch.Tensor
    regularisation: torch.Tensor
    codes: torch.LongTensor | None = None
    latents: torch.Tensor | None = None


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
    return load_whole_model(autoencoder_class(path_or_repo, **hub_kwargs), path_or_repo, **hub_kwargs).eval()


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
    """SHA-256 of a model's weights, which says whether two models are the same wherever they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_pq_model(path_or_repo: str, **hub_kwargs) -> PQModel:
    """[`load_autoencoder`] for a model that must have codes; a `ValueError` names another class."""
    model = load_autoencoder(path_or_repo, **hub_kwargs)
    if not isinstance(model, PQModel):
        raise ValueError(f"{path_or_repo} holds a {type(model).__name__}, which has no codes. Give a PQModel.")
    return model


def create_autoencoder(config_name_or_path: str, **overrides) -> nn.Module:
    """A fresh autoencoder from a `config.json`, a folder or a Hub repository that holds one; overrides win over it."""
    if config_name_or_path.endswith(".json"):
        config = json.loads(Path(config_name_or_path).read_text(encoding="utf-8"))
        if config.get("_class_name") not in AUTOENCODERS:
            raise ValueError(f"{config_name_or_path} must name a `_class_name` out of {', '.join(AUTOENCODERS)}.")
        return AUTOENCODERS[config["_class_name"]].from_config(config, **overrides)
    model_class = autoencoder_class(config_name_or_path)
    return model_class.from_config(model_class.load_config(config_name_or_path), **overrides)


def downsampling_factor(model: nn.Module) -> int:
    """F: the ratio of image side to latent side, of any image autoencoder of diffusers with levels."""
    levels = model.config.get("block_out_channels") or model.config.encoder_block_out_channels
    return 2 ** (len(levels) - 1)


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
        latents = self.autoencoder.encode(images).latents
        if not quantize:
            sample = self.autoencoder.decode(latents, quantize=False).sample
            # Zero, but touches the codebooks: every parameter of a DDP model must receive a gradient.
            return Reconstruction(sample, 0.0 * self.autoencoder.quantizer.codebooks.sum())
        quantized = self.autoencoder.quantize(latents)
        sample = self.autoencoder.decode(quantized.latents, quantize=False).sample
        return Reconstruction(sample, quantized.loss, quantized.codes, latents.detach())

    def _reconstruct_kl(self, images: torch.Tensor) -> Reconstruction:
        posterior = self.autoencoder.encode(images).latent_dist
        latents = posterior.sample() if self.training else posterior.mode()
        return Reconstruction(self.autoencoder.decode(latents).sample, posterior.kl().mean())
