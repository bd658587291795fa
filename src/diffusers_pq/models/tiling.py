"""Run a convolutional network over overlapping tiles of a large input."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn


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
