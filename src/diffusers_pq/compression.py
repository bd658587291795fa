"""
Pictures as small files: the codes of a [`PQModel`], entropy-coded. An addition to the paper.

Every subspace is coded with the frequencies of its own codes so far, which the decoder counts along. So nothing but
the model is needed and no table is stored: files come out smaller than with frequencies of the training data, because
one picture uses few of the entries, and others than the next one does.

A file is, with integers in little-endian order:

| bytes | content |
|---|---|
| 4 | magic, `\\x89PQC` |
| 1 | version of the format, 1 |
| 8 | fingerprint of the codebooks: the first bytes of the SHA-256 of their float32 values |
| 4, 4 | width and height of the picture, not padded |
| 4, 4, 4 | S, h, w |
| ... | codes, range-coded to 32-bit words: for each latent pixel, by rows, those of subspace 0, 1, ... |
| 4 | CRC-32 of all before |
"""

import hashlib
import math
import struct
import zlib

import numpy as np
import PIL.Image
import torch

from .images import pad_to_multiple, to_pil, to_tensor
from .models.autoencoder_pq import PQModel
from .models.tiling import tiled_beyond


try:
    from constriction import stream
except ImportError as error:
    raise ImportError('Compressing pictures needs `pip install "diffusers_pq[compress]"`.') from error


_MAGIC = b"\x89PQC"
_VERSION = 1
_HEADER = struct.Struct("<4sB8s5I")
_CHECKSUM = struct.Struct("<I")
_DISTRIBUTIONS = stream.model.Categorical(perfect=False)
# The uniform distribution at the start weighs as much as this many codes. Chosen on the validation tiles of
# `diffusers-pq prepare-data`: smaller suits a large codebook, larger a small one, and neither by more than 1%.
_START_WEIGHT = 32
# What Pillow refuses to open: a header of a few bytes can claim anything.
_MOST_PIXELS = 2 * 89_478_485


@torch.no_grad()
def compress_picture(model: PQModel, picture: PIL.Image.Image) -> bytes:
    """
    The content of a file that [`decompress_picture`] turns back into the model's reconstruction of a picture.

    Args:
        model ([`PQModel`]): In eval mode.
        picture (`PIL.Image.Image`): Of any size; modes other than RGB are converted. One of more than 2048 x 2048
            pixels is encoded in tiles.

    Raises:
        TypeError: if the model is no [`PQModel`].
    """
    _check_model(model)
    original = to_tensor(picture)[None]
    height, width = original.shape[-2:]
    images = pad_to_multiple(original, model.downsampling_factor).to(model.device, model.dtype)
    with tiled_beyond(model, height, width):
        codes = model.encode_codes(images)
    return pack_codes(model, codes, (width, height))


@torch.no_grad()
def decompress_picture(model: PQModel, data: bytes) -> PIL.Image.Image:
    """
    The picture behind what [`compress_picture`] returned, in its original size.

    Raises:
        TypeError: if the model is no [`PQModel`].
        ValueError: if the data are damaged, truncated, of another format or of another model.
    """
    _check_model(model)
    codes, (width, height) = unpack_codes(model, data)
    with tiled_beyond(model, height, width):
        sample = model.decode_codes(codes.to(model.device)).sample
    return to_pil(sample[0, :, :height, :width])


def pack_codes(model: PQModel, codes: torch.LongTensor, size: tuple[int, int]) -> bytes:
    """
    The codes of one picture as the content of a file; lossless.

    Args:
        model ([`PQModel`]): Its codebooks are what the codes mean.
        codes (`torch.LongTensor` of shape `(1, S, h, w)`): In `[0, K)`.
        size (`tuple[int, int]`): Width and height of the picture before it was padded to a multiple of F.

    Raises:
        ValueError: if the codes do not fit the size or the model.
    """
    shape = _codes_shape(model, size)
    if codes.shape != (1, *shape):
        raise ValueError(
            f"`codes` of a picture of {size[0]} x {size[1]} pixels must have shape {[1, *shape]}, but have shape "
            f"{list(codes.shape)}."
        )
    model.quantizer.check_codes(codes)
    encoder, weights = stream.queue.RangeEncoder(), _start_weights(model)
    for pixel in codes[0].flatten(1).T.contiguous().int().cpu().numpy():
        encoder.encode(pixel, _DISTRIBUTIONS, weights)
        _count(weights, pixel)
    header = _HEADER.pack(_MAGIC, _VERSION, _fingerprint(model), *size, *shape)
    content = header + encoder.get_compressed().astype("<u4").tobytes()
    return content + _CHECKSUM.pack(zlib.crc32(content))


def unpack_codes(model: PQModel, data: bytes) -> tuple[torch.LongTensor, tuple[int, int]]:
    """
    The inverse of [`pack_codes`].

    Returns:
        `tuple`: codes of shape `(1, S, h, w)`, on the CPU, and width and height of the picture.

    Raises:
        ValueError: if the data are damaged, truncated, of another format or of another model.
    """
    _check_integrity(data)
    _, _, fingerprint, width, height, *shape = _HEADER.unpack_from(data)
    if fingerprint != _fingerprint(model) or tuple(shape) != _codes_shape(model, (width, height)):
        raise ValueError("The compressed picture was made with another model: decompress it with that one.")
    content = data[_HEADER.size : -_CHECKSUM.size]
    _check_size(model, width, height, len(content))
    subspaces, rows, columns = shape
    words = np.frombuffer(content, dtype="<u4").astype(np.uint32)
    decoder, weights = stream.queue.RangeDecoder(words), _start_weights(model)
    codes = np.empty((rows * columns, subspaces), dtype=np.int64)
    for pixel in codes:
        try:
            pixel[:] = decoder.decode(_DISTRIBUTIONS, weights)
        except AssertionError as error:  # of the decoder, about words that no encoder writes
            raise ValueError(f"The compressed picture is damaged: {error}") from error
        _count(weights, pixel)
    codes = torch.from_numpy(codes).T.reshape(1, subspaces, rows, columns)
    if pack_codes(model, codes, (width, height)) != data:  # too many words, or too few, decode to something, too
        raise ValueError("The compressed picture is damaged: its content is not that of its codes.")
    return codes, (width, height)


def _start_weights(model: PQModel) -> np.ndarray:
    """Distributions `[S, K]` of the first latent pixel's codes, not normalised."""
    return np.full((model.config.num_subspaces, model.config.codebook_size), float(_START_WEIGHT))


def _count(weights: np.ndarray, pixel: np.ndarray):
    """Add the S codes of a latent pixel to the weights."""
    subspaces, codebook_size = weights.shape
    # K instead of 1 keeps the start weight whole: sums of whole numbers are exact, so every machine decodes alike.
    weights[np.arange(subspaces), pixel] += codebook_size


def _codes_shape(model: PQModel, size: tuple[int, int]) -> tuple[int, int, int]:
    width, height = (-(-side // model.downsampling_factor) for side in size)
    return model.config.num_subspaces, height, width


def _fingerprint(model: PQModel) -> bytes:
    codebooks = model.quantizer.codebooks.detach().float().cpu().numpy()
    return hashlib.sha256(codebooks.astype("<f4").tobytes()).digest()[:8]


def _check_size(model: PQModel, width: int, height: int, num_bytes: int):
    """Raise a `ValueError` unless so many bytes can hold the codes of a picture of this size."""
    subspaces, rows, columns = _codes_shape(model, (width, height))
    if not 0 < width * height <= _MOST_PIXELS:
        raise ValueError(f"The compressed picture claims {width} x {height} pixels: it is damaged or an attack.")
    # What it takes to code one and the same entry each time, the cheapest there is: -log2 of the product of
    # (n + start / K) / (n + start) over the latent pixels n.
    start, entries, pixels = _START_WEIGHT, model.config.codebook_size, rows * columns
    logarithm = math.lgamma(pixels + start) - math.lgamma(start)
    logarithm -= math.lgamma(pixels + start / entries) - math.lgamma(start / entries)
    # The coder ends on whole words of 32 bits.
    if num_bytes % 4 or 8 * num_bytes + 32 < subspaces * logarithm / math.log(2):
        raise ValueError(f"The compressed picture is damaged: {num_bytes} bytes cannot be {width} x {height} pixels.")


def _check_model(model: torch.nn.Module):
    if not isinstance(model, PQModel):
        raise TypeError(
            f"Only a PQModel has codes to compress a picture to, but `model` is of class {type(model).__name__}."
        )


def _check_integrity(data: bytes):
    if not data.startswith(_MAGIC):
        raise ValueError("This is not a picture compressed by `diffusers-pq compress`: its first bytes differ.")
    if len(data) < _HEADER.size + _CHECKSUM.size:
        raise ValueError(f"The compressed picture is truncated: only {len(data)} bytes are there.")
    version = data[len(_MAGIC)]
    if version != _VERSION:
        raise ValueError(
            f"The compressed picture has version {version} of the format, but this diffusers_pq reads version "
            f"{_VERSION}. Update diffusers_pq."
        )
    if _CHECKSUM.unpack(data[-_CHECKSUM.size :])[0] != zlib.crc32(data[: -_CHECKSUM.size]):
        raise ValueError("The compressed picture is damaged or truncated: its checksum does not match.")
