"""Views of codes and of details, for a demo or a figure."""

import matplotlib
import PIL.Image
import torch

from .models.quantizer import ProductQuantizer


def code_map(quantizer: ProductQuantizer, codes: torch.LongTensor, subspace: int) -> PIL.Image.Image:
    """
    The codes of one subspace as a picture. The entries that occur are coloured by their rank along their first
    principal axis, so that close entries get close colours.

    Args:
        quantizer ([`ProductQuantizer`]): The one that gave the codes.
        codes (`torch.LongTensor` of shape `(1, S, h, w)`): The codes of one picture.
        subspace (`int`): In `[0, S)`.

    Returns:
        `PIL.Image.Image`: 8-bit RGB of h x w pixels.
    """
    used, places = codes[0, subspace].unique(return_inverse=True)
    entries = quantizer.entries[subspace][used].detach().float()
    entries = entries - entries.mean(0)
    axis = torch.linalg.svd(entries, full_matrices=False).Vh[0]
    ranks = (entries @ axis).argsort().argsort()
    shades = ranks / max(len(used) - 1, 1)
    colours = matplotlib.colormaps["viridis"](shades[places].cpu().numpy(), bytes=True)
    return PIL.Image.fromarray(colours[..., :3])


def enlarged_detail(picture: PIL.Image.Image, center: tuple[int, int], side: int, factor: int) -> PIL.Image.Image:
    """
    A square of a picture with every pixel enlarged to `factor` x `factor`.

    Args:
        picture (`PIL.Image.Image`)
        center (`tuple[int, int]`): x and y in pixels; the square is moved where it would leave the picture.
        side (`int`): Of the square, in pixels; at most the picture's shorter side is taken.
        factor (`int`)
    """
    side = min(side, *picture.size)
    left, top = (min(max(middle - side // 2, 0), length - side) for middle, length in zip(center, picture.size))
    box = (left, top, left + side, top + side)
    return picture.resize((factor * side, factor * side), PIL.Image.Resampling.NEAREST, box)
