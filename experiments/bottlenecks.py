"""
The bottlenecks that Table 1 compares, to be trained on one backbone.

All have the interface of [`ProductQuantizer`] and, where there are codebooks, its loss (Eq. 1) and straight-through
gradients, so that they differ in how they quantise and in nothing else. The residual and the finite scalar quantiser
are those of vector-quantize-pytorch.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from diffusers_pq.models.autoencoder_pq import PQModel
from diffusers_pq.models.kmeans import kmeans_codebooks
from diffusers_pq.models.quantizer import ProductQuantizer, ProductQuantizerOutput


# name -> what it is called in a table
BOTTLENECKS = {
    "vq": "vector (VQ)",
    "multi_channel": "multi-channel, shared codebook (MCQ)",
    "residual": "residual (RQ)",
    "scalar": "scalar (S = d)",
    "fsq": "finite scalar (FSQ)",
    "kl": "KL",
    "none": "none",
    "pq": "product (PQ)",
}

# Bits of a continuous value, float16.
_VALUE_BITS = 16

# What PQModel and AutoencoderKL call the same.
_BACKBONE = (
    "in_channels",
    "out_channels",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "act_fn",
    "norm_num_groups",
    "mid_block_add_attention",
    "sample_size",
)


def create_bottleneck(name: str, config: Mapping, vq_codebook_size: int = 1024) -> nn.Module:
    """
    A fresh autoencoder with one of the `BOTTLENECKS` on the backbone of a [`PQModel`].

    All but two take as many bits for a latent pixel as the product quantiser, S log2 K, or as near as they come: the
    residual quantiser as many stages, multi-channel quantisation as many channel groups as that has subspaces; scalar
    ones fewer entries; KL fewer channels (float16). Vector quantisation cannot: it takes log2 `vq_codebook_size`. No
    bottleneck takes 16 d.

    Args:
        name (`str`): Out of `BOTTLENECKS`.
        config (`Mapping`): Of the [`PQModel`].
        vq_codebook_size (`int`): K of vector quantisation.

    Returns:
        `nn.Module`: An `AutoencoderKL`, or a [`PQModel`] whose `quantizer` may be another than its config says; for no
            bottleneck a [`PQModel`] that is to be trained without its quantiser.
    """
    d, subspaces, size = (config[key] for key in ("latent_channels", "num_subspaces", "codebook_size"))
    bits = subspaces * math.log2(size)
    levels = 2 ** max(1, round(bits / d))
    if name == "kl":
        return _create_kl(config, max(1, round(bits / _VALUE_BITS)))
    if name == "vq":
        return PQModel.from_config(config, num_subspaces=1, codebook_size=vq_codebook_size)
    if name == "scalar":
        return PQModel.from_config(config, num_subspaces=d, codebook_size=levels)
    model = PQModel.from_config(config)
    shape = (d, subspaces, size, model.config.commitment_beta)
    if name == "multi_channel":
        model.quantizer = MultiChannelQuantizer(*shape)
    elif name == "residual":
        model.quantizer = ResidualQuantizer(*shape)
    elif name == "fsq":
        model.quantizer = FiniteScalarQuantizer(d, levels)
    return model


def load_bottleneck(name: str, folder: str | os.PathLike, config: Mapping, vq_codebook_size: int = 1024) -> nn.Module:
    """
    A trained autoencoder in eval mode.

    Args:
        name, config, vq_codebook_size: As for [`create_bottleneck`].
        folder (`str` or `PathLike`): Where training has saved it.

    Raises:
        OSError, RuntimeError: if the weights are missing, damaged or of another bottleneck.
    """
    model = create_bottleneck(name, config, vq_codebook_size)
    model.load_state_dict(load_file(Path(folder, SAFETENSORS_WEIGHTS_NAME)))
    if name == "none":
        model.quantizer = Unquantized(model.config.latent_channels)
    return model.eval()


def _create_kl(config: Mapping, latent_channels: int) -> AutoencoderKL:
    backbone = {key: config[key] for key in _BACKBONE if key in config}
    return AutoencoderKL(**backbone, latent_channels=latent_channels)


def fit_quantizer(quantizer: nn.Module, latents: torch.Tensor):
    """
    Start a quantiser from latents: codebooks from their k-means centres, finite scalar quantisation from their spread.

    Args:
        quantizer (`nn.Module`): Of a model that [`create_bottleneck`] made; changed in place.
        latents (`torch.Tensor` of shape `(B, d, h, w)`): z_e, at least K latent pixels.
    """
    if type(quantizer) is ProductQuantizer:
        kmeans_codebooks(quantizer, latents)
    else:
        quantizer.fit(latents)


class MultiChannelQuantizer(ProductQuantizer):
    """A [`ProductQuantizer`] whose subspaces share one codebook (Zheng et al., 2022, "MoVQ")."""

    def __init__(self, latent_channels: int, num_subspaces: int, codebook_size: int, commitment_beta: float = 0.25):
        super().__init__(latent_channels, num_subspaces, codebook_size, commitment_beta)
        self.codebooks = nn.Parameter(self.codebooks.detach()[:1].clone())

    @property
    def entries(self) -> torch.Tensor:
        """`[S, K, d/S]`, S times the same."""
        return self.codebooks.expand(self.num_subspaces, -1, -1)

    @torch.no_grad()
    def fit(self, latents: torch.Tensor):
        """Set the codebook to k-means centres of the sub-vectors of all subspaces."""
        pooled = ProductQuantizer(self.latent_channels // self.num_subspaces, 1, self.codebook_size)
        kmeans_codebooks(pooled.to(latents.device), self.split(latents).flatten(0, 1).unsqueeze(-1))
        self.codebooks.copy_(pooled.codebooks)


class _Quantizer(nn.Module):
    """What [`PQModel`] and the trainer expect of a quantiser."""

    check_latents = ProductQuantizer.check_latents

    def __init__(self, latent_channels: int, num_subspaces: int | None, codebook_size: int | None):
        super().__init__()
        self.latent_channels = latent_channels
        self.num_subspaces = num_subspaces
        self.codebook_size = codebook_size

    def forward(self, latents: torch.Tensor) -> ProductQuantizerOutput:
        """As [`ProductQuantizer.forward`]."""
        self.check_latents(latents)
        with torch.autocast(latents.device.type, enabled=False):
            z_q, codes, loss = self.snap(_to_rows(latents))
        codes = codes.transpose(1, 2).unflatten(2, latents.shape[2:]).long()
        z_q = z_q.transpose(1, 2).reshape(latents.shape)
        return ProductQuantizerOutput(latents=z_q.to(latents.dtype), codes=codes, loss=loss)


class ResidualQuantizer(_Quantizer):
    """
    S stages, each with its own codebook for what the stages before have left (Lee et al., 2022). The codebooks start
    and learn as those of [`ProductQuantizer`].
    """

    def __init__(self, latent_channels: int, num_subspaces: int, codebook_size: int, commitment_beta: float = 0.25):
        from vector_quantize_pytorch import ResidualVQ

        super().__init__(latent_channels, num_subspaces, codebook_size)
        self.commitment_beta = commitment_beta
        self.library = ResidualVQ(
            dim=latent_channels,
            num_quantizers=num_subspaces,
            codebook_size=codebook_size,
            learnable_codebook=True,
            ema_update=False,
        )
        for codebook in self.library.parameters():
            nn.init.normal_(codebook)

    def snap(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """z_q, codes `[B, P, S]` and the loss for z_e `[B, P, d]` of P latent pixels."""
        self.library.eval()  # in training mode it would add losses and averages of its own
        with torch.no_grad():
            codes = self.library(rows)[1]
        z_q = self.library.get_output_from_indices(codes)
        loss = F.mse_loss(rows, z_q.detach()) + self.commitment_beta * F.mse_loss(z_q, rows.detach())
        return z_q.detach() + (rows - rows.detach()), codes, loss

    @torch.no_grad()
    def fit(self, latents: torch.Tensor):
        """Set the codebooks to k-means centres, with the library's own k-means."""
        for name, buffer in self.library.named_buffers():
            if name.endswith("initted"):
                buffer.fill_(False)
        self.snap(_to_rows(latents))


class FiniteScalarQuantizer(_Quantizer):
    """
    Rounds every channel to a fixed grid (Mentzer et al., 2024); nothing is learnt, so there is no loss.

    Attributes:
        scale (`torch.Tensor` of shape `(d,)`): Half the width of the grid.
    """

    def __init__(self, latent_channels: int, levels: int):
        from vector_quantize_pytorch import FSQ

        super().__init__(latent_channels, num_subspaces=latent_channels, codebook_size=levels)
        self.library = FSQ([levels], num_codebooks=latent_channels, preserve_symmetry=levels == 2)
        self.register_buffer("scale", torch.ones(latent_channels))

    def snap(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As [`ResidualQuantizer.snap`]."""
        z_q, codes = self.library(rows / self.scale)
        return z_q * self.scale, codes, rows.new_zeros(())

    @torch.no_grad()
    def fit(self, latents: torch.Tensor):
        """Let the grid reach over two standard deviations of each channel."""
        self.scale.copy_(2 * _to_rows(latents).flatten(0, 1).std(0))


class Unquantized(_Quantizer):
    """Passes latents on as they are: no codes, no loss."""

    def __init__(self, latent_channels: int):
        super().__init__(latent_channels, num_subspaces=None, codebook_size=None)

    def forward(self, latents: torch.Tensor) -> ProductQuantizerOutput:
        self.check_latents(latents)
        return ProductQuantizerOutput(latents=latents, codes=None, loss=latents.new_zeros(()))


def _to_rows(latents: torch.Tensor) -> torch.Tensor:
    """`[B, d, h, w]` latents to `[B, h*w, d]` in float32."""
    return latents.float().flatten(2).transpose(1, 2)
