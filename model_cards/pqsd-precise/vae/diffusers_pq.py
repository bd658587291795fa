# PQModel of diffusers_pq 0.1.0 in one file, made of the package's sources. Licence: Apache-2.0.
# fmt: off
# ruff: noqa
import contextlib
import functools
import importlib
import importlib.util
import inspect
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.vae import AutoencoderMixin, Decoder, DecoderOutput, Encoder
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook


CODE_FILE = "diffusers_pq.py"


class AutoModelMixin:
    """
    Put before a `ModelMixin`, lets `AutoModel.from_pretrained(folder, trust_remote_code=True)` load what it saves,
    with or without `diffusers_pq`: by an `auto_map` in its `config.json`, and the code of the class beside it.
    """

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        # Not a setting of the model, about which the parent would warn.
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        if self._is_shipped():
            config["auto_map"] = {"AutoModel": f"{Path(CODE_FILE).stem}.{type(self).__name__}"}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike):
        """Write `config.json`, and the code beside it."""
        super().to_json_file(json_file_path)
        if self._is_shipped():
            Path(json_file_path).with_name(CODE_FILE).write_text(self.code(), encoding="utf-8")

    @classmethod
    def code(cls) -> str:
        """The class in one file that needs diffusers alone, see `diffusers_pq.models.standalone`."""
        own_file = Path(inspect.getfile(cls))
        if own_file.name == CODE_FILE:  # this is that file
            return own_file.read_text(encoding="utf-8")
        from . import standalone

        return standalone.standalone_code(cls)

    @classmethod
    def _is_shipped(cls) -> bool:
        """Of the package or of that file; a class that somebody derives from it has its code elsewhere."""
        return Path(CODE_FILE).stem in cls.__module__.split(".")


# Sub-vectors of more dimensions do not fit a thread's registers; for them a matrix product is faster.
_MAX_DIMENSION = 16
# The single file of `standalone_code` comes without the kernel.
_HAS_KERNEL = (
    importlib.util.find_spec("triton") is not None and Path(__file__).with_name("quantization_kernel.py").is_file()
)


def is_fusable(latents: torch.Tensor, codebooks: torch.Tensor) -> bool:
    """Whether the kernel runs on this device and for these shapes and dtypes; it needs no compilation to wait for."""
    return (
        latents.is_cuda
        and _HAS_KERNEL
        and codebooks.shape[-1] <= _MAX_DIMENSION
        and latents.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and codebooks.dtype == torch.float32
    )


@torch.library.custom_op("diffusers_pq_file::find_codes", mutates_args=())
def find_codes(latents: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """Codes `[B, S, P]` of `latents` `[B, d, P]`: of equally near entries of `codebooks` `[S, K, d/S]` the first."""
    from . import quantization_kernel

    return quantization_kernel.run(latents, codebooks.contiguous(), loss_scale=None)[1]


@find_codes.register_fake
def _(latents: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    return latents.new_empty((latents.shape[0], codebooks.shape[0], latents.shape[2]), dtype=torch.long)


@torch.library.custom_op("diffusers_pq_file::quantize", mutates_args=())
def quantize(
    latents: torch.Tensor, codebooks: torch.Tensor, commitment_beta: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Args:
        latents (`torch.Tensor` of shape `(B, d, P)`): See [`is_fusable`].
        codebooks (`torch.Tensor` of shape `(S, K, d/S)`): float32.
        commitment_beta (`float`): beta of Eq. 1.

    Returns:
        Quantised latents like `latents`, with the straight-through gradient; codes `[B, S, P]`; the loss of Eq. 1,
        float32. Where a sub-vector is not finite, its quantised latents and the loss are NaN.
    """
    from . import quantization_kernel

    scale = (1 + commitment_beta) / max(latents.numel(), 1)
    quantized, codes, losses = quantization_kernel.run(latents, codebooks.contiguous(), scale)
    return quantized, codes, losses.sum()


@quantize.register_fake
def _(latents: torch.Tensor, codebooks: torch.Tensor, commitment_beta: float):
    codes = latents.new_empty((latents.shape[0], codebooks.shape[0], latents.shape[2]), dtype=torch.long)
    return torch.empty_like(latents), codes, latents.new_empty((), dtype=torch.float32)


def _keep_for_backward(ctx, inputs, output):
    latents, codebooks, ctx.commitment_beta = inputs
    ctx.save_for_backward(latents, codebooks, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_quantized, _, grad_loss):
    latents, codebooks, codes = ctx.saved_tensors
    subspaces, size, dimension = codebooks.shape
    rows = codes + torch.arange(subspaces, device=codes.device).view(-1, 1) * size
    entries = codebooks.flatten(0, 1)[rows].movedim(3, 2).flatten(1, 2)
    pull = (latents.float() - entries) * (grad_loss * (2 / max(latents.numel(), 1)))
    grad_latents = (grad_quantized.float() + pull).to(latents.dtype) if ctx.needs_input_grad[0] else None
    grad_codebooks = None
    if ctx.needs_input_grad[1]:
        per_row = (-ctx.commitment_beta * pull).unflatten(1, (subspaces, dimension)).movedim(2, 3)
        # The backward of an embedding sums what belongs together, in a fixed order: `index_add_` has none on a GPU.
        grad_codebooks = torch.ops.aten.embedding_dense_backward(
            per_row.reshape(-1, dimension), rows.flatten(), subspaces * size, -1, False
        ).view_as(codebooks)
    return grad_latents, grad_codebooks, None


quantize.register_autograd(_backward, setup_context=_keep_for_backward)


logger = logging.getLogger(__name__)

# Distances that the product search holds at once: few enough for a CPU's cache, many enough to fill a GPU.
_DISTANCES_AT_ONCE = {"cpu": 2**18, "cuda": 2**26}
# Sub-vectors of up to so many dimensions are compared dimension by dimension; above, a matrix product is faster.
_MAX_FUSED_DIMENSION = 16
# The fused search is compiled once a shape of codebooks has cost so many distances (a few seconds on a CPU's core):
# compiling takes seconds too, which a single picture would never earn back.
COMPILE_AFTER = 2**31
# In training it is compiled at once, if a search takes at least so many distances: a choice that a run which resumes
# makes in the same way, since the kernels may break near ties differently.
_COMPILE_TRAINING_FROM = 2**22
# Latent pixels that the compiled search on a CPU handles together.
_BLOCK = 256

_distances_so_far = Counter()
_failed_to_compile = set()


@torch.no_grad()
def nearest_codes(vectors: torch.Tensor, codebooks: torch.Tensor, training: bool = False) -> torch.LongTensor:
    """
    Exact Euclidean nearest neighbour of every sub-vector in the codebook of its subspace.

    The distances are computed in float32 whatever autocast, TF32 or the inputs' dtype say: in less, neighbouring
    entries become ties. Of entries whose distances are equal within rounding any may be returned. Where a value is
    NaN, so is every distance, and the code is arbitrary but valid.

    Args:
        vectors (`torch.Tensor` of shape `(B, S, d/S, P)`): P sub-vectors in each of S subspaces, for B pictures.
        codebooks (`torch.Tensor` of shape `(S, K, d/S)`): K entries for each subspace.
        training (`bool`): The same search will be made many times, and by the same kernel also in a run that resumes.

    Returns:
        `torch.LongTensor` of shape `(B, S, P)`: indices in `[0, K)`.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        vectors, codebooks = vectors.float().contiguous(), codebooks.detach().float()
        if is_exporting():
            return _plain_search(vectors, codebooks)
        if is_fusable(vectors, codebooks):
            return find_codes(vectors.flatten(1, 2), codebooks)
        return _search(vectors, codebooks, training)


def is_exporting() -> bool:
    """Whether `torch.export` or `torch.onnx` are at work, whose graphs must do without this package."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


# Opaque to torch.compile, which would otherwise unroll the loop over chunks or store distances that are used twice.
@torch.library.custom_op("diffusers_pq_file::nearest_codes", mutates_args=())
def _search(vectors: torch.Tensor, codebooks: torch.Tensor, training: bool) -> torch.Tensor:
    if vectors.numel() == 0:
        return vectors.new_empty(vectors[:, :, 0].shape, dtype=torch.long)
    return _choose_search(vectors, codebooks, training)(vectors, codebooks).contiguous()


@_search.register_fake
def _(vectors: torch.Tensor, codebooks: torch.Tensor, training: bool) -> torch.Tensor:
    batch_size, subspaces, _, count = vectors.shape
    return vectors.new_empty((batch_size, subspaces, count), dtype=torch.long)


def _choose_search(vectors: torch.Tensor, codebooks: torch.Tensor, training: bool) -> Callable:
    dimension = codebooks.shape[-1]
    if dimension == 1:
        return _sorted_search
    key = _key(vectors, codebooks)
    if (
        vectors.is_cuda
        or dimension > _MAX_FUSED_DIMENSION
        or torch._dynamo.config.disable
        or key in _failed_to_compile
    ):
        return _product_search
    distances = vectors[:, :, 0].numel() * codebooks.shape[1]
    _distances_so_far[key] += distances
    worth_compiling = distances >= _COMPILE_TRAINING_FROM if training else _distances_so_far[key] > COMPILE_AFTER
    return _compiled_search if worth_compiling else _product_search


def _key(vectors: torch.Tensor, codebooks: torch.Tensor) -> tuple:
    return vectors.device.type, codebooks.shape


def _sorted_search(vectors: torch.Tensor, codebooks: torch.Tensor) -> torch.LongTensor:
    """Scalar quantisation (S = d): a binary search among the midpoints of the sorted entries."""
    batch_size, subspaces, _, count = vectors.shape
    entries, order = codebooks.squeeze(-1).sort(dim=-1)
    midpoints = (entries[:, 1:] + entries[:, :-1]) / 2
    scalars = vectors.squeeze(2).transpose(0, 1).reshape(subspaces, -1).contiguous()
    ranks = torch.searchsorted(midpoints.contiguous(), scalars)
    return order.gather(1, ranks).view(subspaces, batch_size, count).transpose(0, 1)


def _product_search(vectors: torch.Tensor, codebooks: torch.Tensor) -> torch.LongTensor:
    """|z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 does not change which entry is nearest: one batched product."""
    batch_size, subspaces, dimension, count = vectors.shape
    # Distances do not change with the origin, but what cancels in the product does.
    origin = codebooks.mean(1, keepdim=True)
    rows = vectors.permute(1, 0, 3, 2).reshape(subspaces, batch_size * count, dimension) - origin
    codebooks = codebooks - origin
    squared_norms = codebooks.square().sum(-1).unsqueeze(1)
    entries = codebooks.transpose(1, 2)
    limit = _DISTANCES_AT_ONCE.get(vectors.device.type, 2**24)
    rows_at_once = max(1, limit // (subspaces * codebooks.shape[1]))
    with _full_precision():
        codes = [
            torch.baddbmm(squared_norms, part, entries, alpha=-2).argmin(-1)
            for part in rows.split(rows_at_once, dim=1)
        ]
    return torch.cat(codes, dim=1).view(subspaces, batch_size, count).transpose(0, 1)


def _plain_search(vectors: torch.Tensor, codebooks: torch.Tensor) -> torch.LongTensor:
    """[`_product_search`] of standard operations alone, all distances at once, for batches of any size."""
    origin = codebooks.mean(1, keepdim=True)
    codebooks = codebooks - origin
    products = codebooks @ (vectors - origin.transpose(1, 2))
    return (codebooks.square().sum(-1, keepdim=True) - 2 * products).argmin(2)


@contextlib.contextmanager
def _full_precision():
    """No TF32, which keeps 10 bits of a product's factors."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _squared_distances(vectors: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """`[B, S, P, K]`; only ever inside a compiled reduction, which never stores it."""
    return sum((vectors[:, :, i, :, None] - codebooks[:, None, :, i]).square() for i in range(codebooks.shape[-1]))


def _smallest_distance(vectors: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    # Floats that are not negative are ordered like their bits, and a minimum of integers has no NaN to look for.
    return _squared_distances(vectors, codebooks).view(torch.int32).amin(-1)


def _first_at_distance(
    vectors: torch.Tensor, codebooks: torch.Tensor, distance: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    # Not `==`: it vectorises worse, and where a latent is NaN no distance would equal the smallest.
    is_farther = _squared_distances(vectors, codebooks) > distance.unsqueeze(-1)
    return torch.where(is_farther, len(index), index).amin(-1)


def _indices(codebooks: torch.Tensor) -> torch.Tensor:
    """0 ... K-1, handed to the kernel: it loads them faster than it makes them."""
    return torch.arange(codebooks.shape[1], device=codebooks.device, dtype=torch.int32)


@functools.cache
def _compiled(function: Callable) -> Callable:
    # With `fullgraph`, too many shapes raise an error; without, torch would run the function as it stands and store
    # all distances.
    return torch.compile(function, fullgraph=True)


def _compiled_search(vectors: torch.Tensor, codebooks: torch.Tensor) -> torch.LongTensor:
    """Two kernels, whatever S; falls back to the product where torch cannot compile."""
    try:
        # The limit is for functions that are recompiled by accident; here every shape of codebooks is one compilation.
        with torch._dynamo.config.patch(recompile_limit=256):
            return _search_on_cpu(vectors, codebooks)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, say: torch.compile's errors have no common class
        _failed_to_compile.add(_key(vectors, codebooks))
        logger.warning("torch.compile failed, so the codebook search stays slower here: %s", error)
        return _product_search(vectors, codebooks)


def _search_on_cpu(vectors: torch.Tensor, codebooks: torch.Tensor) -> torch.LongTensor:
    batch_size, _, _, count = vectors.shape
    # Blocks of one size let the kernels have fixed inner loops, for pictures of any size.
    padded = F.pad(vectors, (0, -count % _BLOCK)) if count % _BLOCK else vectors
    blocks = padded.unflatten(3, (-1, _BLOCK)).movedim(3, 1).flatten(0, 1).contiguous()
    torch._dynamo.mark_static(codebooks)
    for dimension in (1, 2, 3):
        torch._dynamo.mark_static(blocks, dimension)
    distance = _compiled(_smallest_distance)(blocks, codebooks).view(torch.float32)
    codes = _compiled(_first_at_distance)(blocks, codebooks, distance, _indices(codebooks))
    return codes.unflatten(0, (batch_size, -1)).movedim(1, 2).flatten(2)[..., :count].long()


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


# The pixels of a picture that is still taken whole. An autoencoder of Stable Diffusion's size needs some 8 GB for it.
WHOLE_PIXELS = 2048**2


@contextmanager
def tiled_beyond(model: nn.Module, height: int, width: int, whole_pixels: int | None = None) -> Iterator[None]:
    """
    Lets an autoencoder of diffusers that knows tiling take a picture in tiles if it has more than `whole_pixels`
    (default: 2048 x 2048), so that the memory does not grow with the picture.
    """
    limit = WHOLE_PIXELS if whole_pixels is None else whole_pixels
    tile = height * width > limit and getattr(model, "use_tiling", None) is False
    if tile:
        model.enable_tiling()
    try:
        yield
    finally:
        if tile:
            model.disable_tiling()


def _tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Evenly spread starts of full-size tiles: the last tile ends with the input, none is narrower than the others."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _ramp(length: int, overlap: int, at_start: bool, at_end: bool) -> torch.Tensor:
    """Weights of one tile along one axis: 1 inside, falling linearly, but never to zero, over the overlaps."""
    distance = torch.arange(1, length + 1, dtype=torch.float32) / (overlap + 1)
    rising = torch.ones(length) if at_start else distance.clamp(max=1)
    falling = torch.ones(length) if at_end else distance.flip(0).clamp(max=1)
    return rising * falling


def blend_tiles(
    function: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    tile_size: int,
    overlap_factor: float,
    scale: float,
) -> torch.Tensor:
    """
    Apply `function` to overlapping tiles of `x` and average the results, weighted linearly over the overlaps.

    Args:
        function: maps `[B, C, h, w]` to `[B, C', scale*h, scale*w]`.
        x (`torch.Tensor` of shape `(B, C, H, W)`): The whole input.
        tile_size (`int`): Side of a tile in `x`; a multiple of 1/scale if `scale` is below 1.
        overlap_factor (`float`): Share of a tile, in [0, 1), that overlaps with the next.
        scale (`float`): Output side over input side: F or 1/F.

    Returns:
        `torch.Tensor` of shape `(B, C', scale*H, scale*W)`, in the dtype that `function` returns.
    """
    # Tiles start on whole latent pixels, in units of which everything below is counted.
    unit = round(1 / scale) if scale < 1 else 1
    to_output = round(scale * unit)
    sizes = [side // unit for side in x.shape[-2:]]
    tile = tile_size // unit
    overlap = int(tile * overlap_factor)
    rows, columns = (_tile_starts(size, tile, overlap) for size in sizes)

    total = weights = None
    for top in rows:
        for left in columns:
            area = x[..., top * unit : (top + tile) * unit, left * unit : (left + tile) * unit]
            result = function(area)
            height, width = result.shape[-2:]
            weight = _ramp(height, overlap * to_output, top == rows[0], top == rows[-1])[:, None]
            weight = (weight * _ramp(width, overlap * to_output, left == columns[0], left == columns[-1])).to(x.device)
            if total is None:
                output_size = [size * to_output for size in sizes]
                total = torch.zeros(*result.shape[:2], *output_size, device=x.device)
                weights = torch.zeros(output_size, device=x.device)
            place = (
                ...,
                slice(top * to_output, top * to_output + height),
                slice(left * to_output, left * to_output + width),
            )
            total[place] += result * weight
            weights[place] += weight
    return (total / weights).to(result.dtype)


@dataclass
class PQEncoderOutput(BaseOutput):
    """
    Output of [`PQModel.encode`].

    Args:
        latents (`torch.Tensor` of shape `(batch_size, latent_channels, height / F, width / F)`):
            The continuous latents z_e, before quantisation.
    """

    latents: torch.Tensor


@dataclass
class PQModelOutput(BaseOutput):
    """
    Output of [`PQModel`].

    Args:
        sample (`torch.Tensor` of shape `(batch_size, out_channels, height, width)`): Reconstruction, about [-1, 1].
        codes (`torch.LongTensor` of shape `(batch_size, num_subspaces, height / F, width / F)`): The codes.
        loss (`torch.Tensor`, scalar, float32): Codebook and commitment loss of Eq. 1.
    """

    sample: torch.Tensor
    codes: torch.LongTensor
    loss: torch.Tensor


_LARGEST = 2**20  # channels, layers, entries


class PQModel(AutoModelMixin, ModelMixin, AttentionMixin, AutoencoderMixin, ConfigMixin):
    r"""
    A product-quantised autoencoder: the encoder and decoder of VQGAN with its vector quantiser replaced by a
    [`ProductQuantizer`] (Product-Quantised Image Representation for High-Quality Image
    Synthesis, section 3).

    This model inherits from [`ModelMixin`]. Check the superclass documentation for its generic methods implemented for
    all models (such as downloading or saving). It can stand in for the `vae` of diffusers' Stable Diffusion pipelines,
    which ignore `latents_mean` and `latents_std`; those of this package do not.

    Parameters:
        in_channels (`int`, *optional*, defaults to 3): Number of channels in the input image.
        out_channels (`int`, *optional*, defaults to 3): Number of channels in the output.
        down_block_types (`tuple[str]`, *optional*, defaults to `("DownEncoderBlock2D",)`):
            Tuple of downsample block types, one per level; `"AttnDownEncoderBlock2D"` adds attention at that level.
        up_block_types (`tuple[str]`, *optional*, defaults to `("UpDecoderBlock2D",)`):
            Tuple of upsample block types, from the latent resolution up.
        block_out_channels (`tuple[int]`, *optional*, defaults to `(64,)`):
            Tuple of block output channels. L levels give a downsampling factor F = 2^(L-1).
        layers_per_block (`int`, *optional*, defaults to 1): Number of residual blocks per level.
        act_fn (`str`, *optional*, defaults to `"silu"`): The activation function to use.
        norm_num_groups (`int`, *optional*, defaults to 32): Number of groups for normalization layers.
        mid_block_add_attention (`bool`, *optional*, defaults to `True`): Attention in the middle blocks.
        sample_size (`int`, *optional*, defaults to 256): Side of a tile, in pixels, once tiling is enabled.
        z_channels (`int`, *optional*):
            Channels at the encoder's end; `quant_conv` maps them to `latent_channels`. `None` means `latent_channels`.
        latent_channels (`int`, *optional*, defaults to 128): d, the channels a denoiser sees.
        num_subspaces (`int`, *optional*, defaults to 64): S; 1 is vector quantisation, d scalar quantisation.
        codebook_size (`int`, *optional*, defaults to 512): K, entries in the codebook of each subspace.
        commitment_beta (`float`, *optional*, defaults to 0.25): beta of Eq. 1, on the codebook term.
        scaling_factor (`float`, *optional*, defaults to 1.0):
            Latents are multiplied by it before they go to a denoiser, as in [`AutoencoderKL`].
        latents_mean (`list[float]`, *optional*): Mean of each latent channel over a data set, of length d.
        latents_std (`list[float]`, *optional*): Standard deviation of each latent channel, of length d.
        force_upcast (`bool`, *optional*, defaults to `False`):
            Makes pipelines run this model in float32 even when the rest is in float16.
        codebook_distance (`str`, *optional*, defaults to `"euclidean"`): Or `"cosine"`, see [`ProductQuantizer`].
        image_mean, image_std (`list[float]`, *optional*):
            Mean and standard deviation of each colour channel, of colours in [0, 1], that the networks' pictures are
            normalised with. Input and output are in [-1, 1] in any case. `None`: no normalisation.

    Raises:
        ValueError: if d is not divisible by S, S < 1, K < 2, a size is not an integer or absurdly large, the tuples
            do not have one entry per level, or `image_mean` and `image_std` are not both given, with a value for each
            colour channel.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock2D", "ProductQuantizer"]
    _repeated_blocks = ["ResnetBlock2D"]
    _keep_in_fp32_modules = ["quantizer"]
    _skip_layerwise_casting_patterns = ["quantizer"]
    _group_offload_block_modules = ["quant_conv", "quantizer", "post_quant_conv", "encoder", "decoder"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        sample_size: int = 256,
        z_channels: int | None = None,
        latent_channels: int = 128,
        num_subspaces: int = 64,
        codebook_size: int = 512,
        commitment_beta: float = 0.25,
        scaling_factor: float = 1.0,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        force_upcast: bool = False,
        codebook_distance: str = "euclidean",
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
    ):
        super().__init__()
        _check_sizes(
            in_channels=in_channels,
            out_channels=out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            z_channels=z_channels or latent_channels,
            latent_channels=latent_channels,
            codebook_size=codebook_size,
        )
        if not isinstance(act_fn, str):
            raise ValueError(f"`act_fn` must be the name of an activation function, but is {act_fn!r}.")
        _check_levels(block_out_channels, down_block_types=down_block_types, up_block_types=up_block_types)
        check_statistics(latent_channels, "latent", latents_mean=latents_mean, latents_std=latents_std)
        _check_image_statistics(in_channels, out_channels, image_mean, image_std)
        z_channels = z_channels or latent_channels

        self.encoder = Encoder(
            in_channels=in_channels,
            out_channels=z_channels,
            down_block_types=down_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            norm_num_groups=norm_num_groups,
            double_z=False,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.quant_conv = nn.Conv2d(z_channels, latent_channels, 1)
        self.quantizer = ProductQuantizer(
            latent_channels, num_subspaces, codebook_size, commitment_beta, codebook_distance
        )
        self.post_quant_conv = nn.Conv2d(latent_channels, z_channels, 1)
        self.decoder = Decoder(
            in_channels=z_channels,
            out_channels=out_channels,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            norm_num_groups=norm_num_groups,
            mid_block_add_attention=mid_block_add_attention,
        )

        self.use_slicing = False
        self.use_tiling = False
        # only relevant if tiling is enabled
        self.tile_latent_min_size = max(1, sample_size // self.downsampling_factor)
        self.tile_sample_min_size = self.tile_latent_min_size * self.downsampling_factor
        self.tile_overlap_factor = 0.25

    @property
    def downsampling_factor(self) -> int:
        """F: the ratio of image side to latent side, 2^(levels - 1)."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def bits_per_pixel(self) -> float:
        """Size of the codes of a picture, S ceil(log2 K) / F^2, in bits per image pixel."""
        return self.config.num_subspaces * bits_per_code(self.config.codebook_size) / self.downsampling_factor**2

    def set_default_attn_processor(self):
        """Go back from custom attention processors to the default ones."""
        self.set_attn_processor(AttnProcessor())

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> PQEncoderOutput | tuple[torch.Tensor]:
        """
        Encode a batch of images into continuous latents z_e.

        Args:
            x (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): Images in [-1, 1].
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`PQEncoderOutput`] instead of a plain tuple.

        Returns:
            [`PQEncoderOutput`] or `tuple`: The latents of shape `(batch_size, latent_channels, height/F, width/F)`.

        Raises:
            ValueError: if the channels are wrong or a side is not a multiple of the downsampling factor F.
        """
        self._check_image(x)
        latents = self._sliced(self._encode, x)
        if not return_dict:
            return (latents,)
        return PQEncoderOutput(latents=latents)

    @apply_forward_hook
    def quantize(self, z: torch.Tensor) -> ProductQuantizerOutput:
        """
        Snap latents to the codebooks.

        Args:
            z (`torch.Tensor` of shape `(batch_size, latent_channels, height, width)`): z_e, in any float dtype.

        Returns:
            [`ProductQuantizerOutput`]: the quantised `latents`, the `codes` and the `loss` of Eq. 1.

        Raises:
            ValueError: see [`ProductQuantizer.forward`].
        """
        return self.quantizer(z)

    @apply_forward_hook
    def decode(
        self,
        z: torch.Tensor,
        quantize: bool = True,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """
        Decode a batch of latents into images.

        Args:
            z (`torch.Tensor` of shape `(batch_size, latent_channels, height, width)`): Latents, quantised or not.
            quantize (`bool`, *optional*, defaults to `True`): Whether to snap the latents to the codebooks first.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`~models.vae.DecoderOutput`] instead of a plain tuple.
            generator (`torch.Generator`, *optional*): Unused; pipelines pass it to every autoencoder.

        Returns:
            [`~models.vae.DecoderOutput`] or `tuple`: Images of shape `(batch_size, out_channels, F*height, F*width)`.

        Raises:
            ValueError: see [`ProductQuantizer.forward`].
        """
        if quantize:
            z = self.quantizer(z).latents
        else:
            self.quantizer.check_latents(z)
        sample = self._sliced(self._decode, z)
        if not return_dict:
            return (sample,)
        return DecoderOutput(sample=sample)

    def encode_codes(self, x: torch.Tensor) -> torch.LongTensor:
        """Images `[B, 3, H, W]` in [-1, 1] to codes `[B, S, H/F, W/F]`."""
        return self.quantize(self.encode(x).latents).codes

    @apply_forward_hook
    def decode_codes(self, codes: torch.LongTensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Codes `[B, S, h, w]` to images `[B, 3, F*h, F*w]`; a `ValueError` names codes outside `[0, K)`."""
        latents = self.quantizer.lookup(codes).to(self.dtype)
        return self.decode(latents, quantize=False, return_dict=return_dict)

    def scale_latents(self, z: torch.Tensor) -> torch.Tensor:
        """
        Latents `[B, d, h, w]` as a denoiser sees them: normalised per channel if `latents_mean` and `latents_std` are
        set, times `scaling_factor`.
        """
        mean, std = self._latent_statistics(z)
        return (z - mean) / std * self.config.scaling_factor

    def unscale_latents(self, z: torch.Tensor) -> torch.Tensor:
        """Inverse of [`~PQModel.scale_latents`], of the same shape."""
        mean, std = self._latent_statistics(z)
        return z / self.config.scaling_factor * std + mean

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> PQModelOutput | tuple[torch.Tensor, ...]:
        r"""
        Encode, quantise and decode a batch of images.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): Images in [-1, 1].
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`PQModelOutput`] instead of a plain tuple.

        Returns:
            [`PQModelOutput`] or `tuple`: `(sample, codes, loss)`.
        """
        quantized = self.quantize(self.encode(sample).latents)
        reconstruction = self.decode(quantized.latents, quantize=False).sample
        if not return_dict:
            return (reconstruction, quantized.codes, quantized.loss)
        return PQModelOutput(sample=reconstruction, codes=quantized.codes, loss=quantized.loss)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        def encode_tile(tile):
            return self.quant_conv(self.encoder(fastest_layout(tile))).contiguous()

        x = self._normalize_images(x)
        if self.use_tiling and max(x.shape[-2:]) > self.tile_sample_min_size:
            scale = 1 / self.downsampling_factor
            return blend_tiles(encode_tile, x, self.tile_sample_min_size, self.tile_overlap_factor, scale)
        return encode_tile(x)

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        def decode_tile(tile):
            return self.decoder(self.post_quant_conv(fastest_layout(tile))).contiguous()

        if self.use_tiling and max(z.shape[-2:]) > self.tile_latent_min_size:
            scale = self.downsampling_factor
            sample = blend_tiles(decode_tile, z, self.tile_latent_min_size, self.tile_overlap_factor, scale)
        else:
            sample = decode_tile(z)
        return self._denormalize_images(sample)

    def _normalize_images(self, x: torch.Tensor) -> torch.Tensor:
        """
        From [-1, 1] to what the encoder was trained on. Folded into its first convolution, the normalisation would
        change the colour that the convolution pads with.
        """
        if self.config.image_mean is None:
            return x
        mean, std = self._image_statistics(x)
        return (x * (0.5 / std) + (0.5 - mean) / std).to(x.dtype)

    def _denormalize_images(self, sample: torch.Tensor) -> torch.Tensor:
        """Inverse of `_normalize_images`."""
        if self.config.image_mean is None:
            return sample
        mean, std = self._image_statistics(sample)
        return (sample * (2 * std) + (2 * mean - 1)).to(sample.dtype)

    def _image_statistics(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # In float32, so that the arithmetic in half precision is rounded once.
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=x.device).view(-1, 1, 1)
            for values in (self.config.image_mean, self.config.image_std)
        )
        return mean, std

    def _sliced(self, function, batch: torch.Tensor) -> torch.Tensor:
        if self.use_slicing and batch.shape[0] > 1:
            return torch.cat([function(part) for part in batch.split(1)])
        return function(batch)

    def _latent_statistics(self, z: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        def per_channel(values, default):
            return default if values is None else torch.tensor(values).view(1, -1, 1, 1).to(z.device, z.dtype)

        return per_channel(self.config.latents_mean, 0.0), per_channel(self.config.latents_std, 1.0)

    def _check_image(self, x: torch.Tensor):
        channels, factor = self.config.in_channels, self.downsampling_factor
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(
                f"`x` must have shape [batch, {channels}, height, width] (in_channels = {channels}), but has shape "
                f"{list(x.shape)}."
            )
        height, width = x.shape[-2:]
        if height % factor or width % factor or not (height and width):
            raise ValueError(
                f"The sides of `x` must be multiples of the downsampling factor F = {factor}, but are {height} x "
                f"{width}. Pad or crop the images (`diffusers_pq.images.pad_to_multiple` does the former)."
            )


def fastest_layout(x: torch.Tensor) -> torch.Tensor:
    """On a CPU channels_last, which saves up to a third of the time (`benchmarks/model_speed.py`); else as it is."""
    if x.device.type != "cpu" or is_exporting():  # what is exported need not run here
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _check_sizes(**sizes: int):
    """A configuration may come from anywhere, and what it asks for is allocated."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral) or not 1 <= size <= _LARGEST:
            raise ValueError(f"`{name}` must be a whole number from 1 to {_LARGEST}, but is {size!r}.")


def _check_levels(block_out_channels: tuple[int, ...], **block_types: tuple[str, ...]):
    if len(block_out_channels) == 0:
        raise ValueError("`block_out_channels` must have one entry per level, but is empty.")
    for channels in block_out_channels:
        _check_sizes(block_out_channels=channels)
    for name, types in block_types.items():
        if not all(isinstance(kind, str) for kind in types):
            raise ValueError(f"`{name}` must hold names of block types, but is {tuple(types)}.")
        if len(types) != len(block_out_channels):
            raise ValueError(
                f"`{name}` must have one entry per entry of `block_out_channels`, but has {len(types)} for "
                f"{len(block_out_channels)} levels: {tuple(types)}."
            )


def check_statistics(channels: int, kind: str, **statistics: list[float] | None):
    """Raise a `ValueError` for means or deviations by name that do not fit so many channels, or are not positive."""
    for name, values in statistics.items():
        if values is not None and len(values) != channels:
            raise ValueError(
                f"`{name}` must have one value for each of the {channels} {kind} channels, but has {len(values)}."
            )
        if values is not None and name.endswith("_std") and not min(values) > 0:
            raise ValueError(f"`{name}` must be positive, but its smallest value is {min(values)}.")


def _check_image_statistics(
    in_channels: int, out_channels: int, image_mean: list[float] | None, image_std: list[float] | None
):
    if (image_mean is None) != (image_std is None):
        raise ValueError(f"`image_mean` and `image_std` must be given together, but are {image_mean} and {image_std}.")
    for channels in (in_channels, out_channels):
        check_statistics(channels, "colour", image_mean=image_mean, image_std=image_std)


# Where the package is installed, its own class is the one that its pipelines know.
if importlib.util.find_spec("diffusers_pq") is not None:
    PQModel = importlib.import_module("diffusers_pq").PQModel
