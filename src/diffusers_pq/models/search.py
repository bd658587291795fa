"""Exact nearest neighbours in the codebooks of all subspaces at once, without a distance matrix in memory."""

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .fused_quantization import find_codes, is_fusable


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
@torch.library.custom_op("diffusers_pq::nearest_codes", mutates_args=())
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
