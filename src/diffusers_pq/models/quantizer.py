"""Product quantisation of latents (PQGAN, section 3.1)."""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.utils import BaseOutput

from .fused_quantization import is_fusable, quantize
from .search import is_exporting, nearest_codes


@dataclass
class ProductQuantizerOutput(BaseOutput):
    """
    Output of [`ProductQuantizer`] and of [`PQModel.quantize`].

    Args:
        latents (`torch.Tensor` of shape `(batch_size, latent_channels, height, width)`):
            The quantised latents z_q, in the dtype of the input; gradients pass straight through to the input.
        codes (`torch.LongTensor` of shape `(batch_size, num_subspaces, height, width)`):
            Index of the nearest codebook entry in every subspace, in `[0, codebook_size)`.
        loss (`torch.Tensor`, scalar, float32):
            The codebook and commitment terms of Eq. 1, averaged over all elements.
    """

    latents: torch.Tensor
    codes: torch.LongTensor
    loss: torch.Tensor


class ProductQuantizer(nn.Module):
    r"""
    Splits every latent pixel of dimension d into S sub-vectors and snaps each to the nearest of the K entries of its
    own codebook (PQGAN, section 3.1). S = 1 is vector quantisation, S = d scalar quantisation.

    Parameters:
        latent_channels (`int`): d, the dimension of a latent pixel.
        num_subspaces (`int`): S; must divide `latent_channels`.
        codebook_size (`int`): K >= 2, the number of entries in the codebook of each subspace.
        commitment_beta (`float`, *optional*, defaults to 0.25):
            beta of Eq. 1. As there (and in VQGAN's code) it weighs the term that moves the codebooks.
        codebook_distance (`str`, *optional*, defaults to `"euclidean"`):
            `"cosine"` compares directions: sub-vectors and entries are taken at length 1, also in `loss` and in the
            quantised latents (Yu et al., 2022). Not the paper's; needs d/S > 1.

    Attributes:
        codebooks (`nn.Parameter` of shape `(S, K, d/S)`): starts from N(0, 1). Stays in float32 when the module is
            cast to a shorter dtype, which would make other entries of them for good.
        gradient_estimator (`str`): How gradients pass the quantiser in training: `"straight_through"` as in the paper,
            or `"rotation"`, the rotation trick (Fifty et al., 2024).

    Raises:
        ValueError: if S < 1, K < 2, d is not divisible by S, or the distance is unknown or impossible for d/S.
    """

    def __init__(
        self,
        latent_channels: int,
        num_subspaces: int,
        codebook_size: int,
        commitment_beta: float = 0.25,
        codebook_distance: str = "euclidean",
    ):
        super().__init__()
        if num_subspaces < 1:
            raise ValueError(f"`num_subspaces` must be at least 1, but is {num_subspaces}.")
        if codebook_size < 2:
            raise ValueError(f"`codebook_size` must be at least 2, but is {codebook_size}.")
        if latent_channels < 1 or latent_channels % num_subspaces:
            raise ValueError(
                f"`latent_channels` must be a positive multiple of `num_subspaces`, but {latent_channels} is not "
                f"divisible by {num_subspaces}. Choose `num_subspaces` among the divisors of `latent_channels`."
            )
        if codebook_distance not in ("euclidean", "cosine"):
            raise ValueError(f'`codebook_distance` must be "euclidean" or "cosine", but is {codebook_distance!r}.')
        if codebook_distance == "cosine" and latent_channels == num_subspaces:
            raise ValueError(
                '`codebook_distance="cosine"` needs sub-vectors of more than one dimension, but `latent_channels` and '
                f"`num_subspaces` are both {num_subspaces}. Choose fewer subspaces."
            )
        self.latent_channels = latent_channels
        self.num_subspaces = num_subspaces
        self.codebook_size = codebook_size
        self.commitment_beta = commitment_beta
        self.codebook_distance = codebook_distance
        self.gradient_estimator = "straight_through"
        self.codebooks = nn.Parameter(torch.randn(num_subspaces, codebook_size, latent_channels // num_subspaces))

    def _apply(self, fn, recurse=True):
        def keep_precision(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            return applied if applied.dtype.itemsize >= 4 else tensor.to(applied.device, torch.float32)

        return super()._apply(keep_precision, recurse)

    def extra_repr(self) -> str:
        return f"d={self.latent_channels}, S={self.num_subspaces}, K={self.codebook_size}"

    def split(self, latents: torch.Tensor) -> torch.Tensor:
        """`[B, d, h, w]` latents to `[B, S, d/S, h*w]`; channels s d/S to (s+1) d/S - 1 are subspace s."""
        batch_size, channels, height, width = latents.shape
        return latents.reshape(batch_size, self.num_subspaces, channels // self.num_subspaces, height * width)

    def sub_vectors(self, latents: torch.Tensor) -> torch.Tensor:
        """What is compared with `entries`: [`split`] in float32, `[B, S, d/S, h*w]`, of length 1 for the cosine."""
        vectors = self.split(latents.float())
        return F.normalize(vectors, dim=2) if self.codebook_distance == "cosine" else vectors

    @property
    def entries(self) -> torch.Tensor:
        """The codebooks as they are compared and looked up, `[S, K, d/S]`: of length 1 for the cosine distance."""
        return F.normalize(self.codebooks, dim=-1) if self.codebook_distance == "cosine" else self.codebooks

    def lookup(self, codes: torch.LongTensor) -> torch.Tensor:
        """
        The codebook entries behind `codes`, differentiable in the codebooks.

        Args:
            codes (`torch.LongTensor` of shape `(batch_size, num_subspaces, height, width)`): in `[0, codebook_size)`.

        Returns:
            `torch.Tensor` of shape `(batch_size, latent_channels, height, width)`, in the codebooks' dtype.

        Raises:
            ValueError: if the codes are not integers, have the wrong shape or lie outside `[0, codebook_size)`.
        """
        self.check_codes(codes)
        # Through `forward`, since what brings offloaded codebooks here are hooks on it.
        return self.forward(codes=codes)

    def _lookup(self, codes: torch.LongTensor) -> torch.Tensor:
        batch_size, _, height, width = codes.shape
        first_entry = torch.arange(self.num_subspaces, device=codes.device).view(-1, 1, 1) * self.codebook_size
        entries = F.embedding(codes.long() + first_entry, self.entries.flatten(0, 1))
        return entries.permute(0, 1, 4, 2, 3).reshape(batch_size, self.latent_channels, height, width)

    def forward(
        self, latents: torch.Tensor | None = None, codes: torch.LongTensor | None = None
    ) -> ProductQuantizerOutput | torch.Tensor:
        """
        Args:
            latents (`torch.Tensor` of shape `(batch_size, latent_channels, height, width)`): z_e, any float dtype.
            codes (`torch.LongTensor`, *optional*): In place of `latents`, codes for [`lookup`], which checks them.

        Returns:
            [`ProductQuantizerOutput`]; for `codes` what `lookup` returns.

        Raises:
            ValueError: if the shape is wrong or, in eval mode and not on a GPU, a latent is not finite. In training
                mode and on a GPU, where looking would wait for the device, non-finite values pass on to the latents
                and to the loss.
        """
        if codes is not None:
            return self._lookup(codes)
        self.check_latents(latents)
        if self._is_fusable(latents):
            return self._quantize_fused(latents)
        with torch.autocast(latents.device.type, enabled=False):
            z_e = self.sub_vectors(latents)
            codes = nearest_codes(z_e, self.entries, self.training)
            codes = codes.reshape(latents.shape[0], self.num_subspaces, *latents.shape[2:])
            z_q = self.split(self._lookup(codes).float())
            # Eq. 1: |z_e - sg(z_q)|^2 + beta |sg(z_e) - z_q|^2
            loss = F.mse_loss(z_e, z_q.detach()) + self.commitment_beta * F.mse_loss(z_q, z_e.detach())
            carrier = _rotated(z_e, z_q.detach()) if self.gradient_estimator == "rotation" else z_e
            # The difference is exactly zero, so in float32 the value is the codebook entry itself.
            z_q = (z_q.detach() + (carrier - carrier.detach())).reshape(latents.shape)
        return ProductQuantizerOutput(latents=z_q.to(latents.dtype), codes=codes, loss=loss)

    def _is_fusable(self, latents: torch.Tensor) -> bool:
        plain = self.codebook_distance == "euclidean" and self.gradient_estimator == "straight_through"
        return plain and not is_exporting() and is_fusable(latents, self.codebooks)

    def _quantize_fused(self, latents: torch.Tensor) -> ProductQuantizerOutput:
        z_q, codes, loss = quantize(latents.flatten(2), self.codebooks, self.commitment_beta)
        size = latents.shape[2:]
        return ProductQuantizerOutput(latents=z_q.unflatten(2, size), codes=codes.unflatten(2, size), loss=loss)

    def check_latents(self, latents: torch.Tensor):
        """
        Raise a `ValueError` for latents of another shape than `(B, d, h, w)` and, outside training, on a CPU, for
        values that are not finite.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"`latents` must have shape [batch, {self.latent_channels}, height, width] (latent_channels = "
                f"{self.latent_channels}), but have shape {list(latents.shape)}."
            )
        if self.training or latents.is_cuda or torch.compiler.is_compiling() or is_exporting():
            return
        if not latents.isfinite().all():
            bad = int((~latents.isfinite()).sum())
            raise ValueError(
                f"`latents` hold {bad} non-finite values (NaN or infinity) of {latents.numel()}. Look for a damaged "
                f"input or for an overflow in {latents.dtype}; bfloat16 or float32 avoids the latter."
            )

    def check_codes(self, codes: torch.LongTensor):
        """
        Raise a `ValueError` for codes that are not integers of shape `(B, S, h, w)` or, outside training, not in
        `[0, K)`.
        """
        if codes.is_floating_point() or codes.ndim != 4 or codes.shape[1] != self.num_subspaces:
            raise ValueError(
                f"`codes` must be integers of shape [batch, {self.num_subspaces}, height, width] (num_subspaces = "
                f"{self.num_subspaces}), but are {codes.dtype} of shape {list(codes.shape)}."
            )
        if self.training or torch.compiler.is_compiling() or is_exporting() or codes.numel() == 0:
            return
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.codebook_size:
            raise ValueError(
                f"`codes` must lie in [0, {self.codebook_size - 1}] (codebook_size = {self.codebook_size}), but range "
                f"from {low} to {high}. Were they made by a model with another codebook?"
            )


def bits_per_code(codebook_size: int) -> int:
    """Whole bits that a code takes: ceil(log2 K)."""
    return (codebook_size - 1).bit_length()


def _rotated(z_e: torch.Tensor, z_q: torch.Tensor) -> torch.Tensor:
    """z_e `[B, S, d/S, P]` times the constant rotation and scale that take each sub-vector to its entry in z_q."""
    constant = z_e.detach()
    scale = z_q.norm(dim=2, keepdim=True) / constant.norm(dim=2, keepdim=True).clamp(min=1e-6)
    source, target = F.normalize(constant, dim=2), F.normalize(z_q, dim=2)
    # R = I - 2 m m^T + 2 target source^T with m halfway between the two: Fifty et al., section 4.2
    middle = F.normalize(source + target, dim=2)
    along_middle = (middle * z_e).sum(2, keepdim=True)
    along_source = (source * z_e).sum(2, keepdim=True)
    return scale * (z_e - 2 * middle * along_middle + 2 * target * along_source)
