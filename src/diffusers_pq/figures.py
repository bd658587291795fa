"""Views of codes and details, and reconstructions side by side with what they got wrong (Figures 1 and 7)."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .images import to_tensor
from .models.quantizer import ProductQuantizer


# How far apart the boxes lie that are tried, in pixels.
_STRIDE = 8


def difference_map(picture: PIL.Image.Image, original: PIL.Image.Image) -> np.ndarray:
    """|picture - original|, averaged over the colours, in 0 ... 255: float32 `[H, W]`."""
    return (to_tensor(picture) - to_tensor(original)).abs().mean(0).numpy() * 127.5


def most_different_box(
    original: PIL.Image.Image, reconstructions: list[PIL.Image.Image], side: int
) -> tuple[int, int, int, int]:
    """
    The square in which the differences of the reconstructions to the original differ most from each other; that with
    the largest difference if there is only one reconstruction.

    Args:
        original (`PIL.Image.Image`): 8-bit RGB.
        reconstructions (`list[PIL.Image.Image]`): Of the same size.
        side (`int`): Of the square, in pixels; at most the picture's shorter side is taken.

    Returns:
        `tuple`: left, top, right and bottom, in pixels.
    """
    side = min(side, *original.size)
    maps = torch.stack([torch.from_numpy(difference_map(picture, original)) for picture in reconstructions])
    sums = F.avg_pool2d(maps.unsqueeze(1), side, stride=_STRIDE).squeeze(1)
    spread = sums.amax(0) - sums.amin(0) if len(sums) > 1 else sums[0]
    row, column = divmod(int(spread.argmax()), spread.shape[1])
    left, top = column * _STRIDE, row * _STRIDE
    return left, top, left + side, top + side


def draw_reconstructions(
    originals: Mapping[str, PIL.Image.Image],
    reconstructions: Mapping[str, Mapping[str, PIL.Image.Image]],
    boxes: Mapping[str, tuple[int, int, int, int]],
    titles: Mapping[str, Mapping[str, str]],
    amplification: float = 4.0,
) -> Figure:
    """
    Three rows for each picture: whole, a crop, and the crop's differences to the original. The first column is the
    original, each further one a model.

    Args:
        originals (`Mapping`): Pictures by their names, 8-bit RGB.
        reconstructions (`Mapping`): model -> picture -> reconstruction, of the original's size.
        boxes (`Mapping`): picture -> left, top, right and bottom of the crop.
        titles (`Mapping`): model -> picture -> what to write above, such as the PSNR.
        amplification (`float`): Differences of 255 over this are white; the scale is the same for all models.
    """
    columns = len(reconstructions) + 1
    heights = [ratio for picture in originals.values() for ratio in (picture.height / picture.width, 1, 1)]
    figure = Figure(figsize=(3 * columns, 3.2 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.axis("off")
    for row, (name, original) in enumerate(originals.items()):
        wholes, details, differences = axes[3 * row : 3 * row + 3]
        pictures = {"original": original} | {model: found[name] for model, found in reconstructions.items()}
        left, top, right, bottom = boxes[name]
        for column, (model, picture) in enumerate(pictures.items()):
            wholes[column].imshow(picture)
            wholes[column].set_title(f"{name}: {titles[model][name] if column else model}", fontsize=9)
            outline = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="red")
            wholes[column].add_patch(outline)
            detail = picture.crop(boxes[name])
            details[column].imshow(detail, interpolation="nearest")
            if column == 0:
                continue
            error = difference_map(detail, original.crop(boxes[name]))
            shown = differences[column].imshow(
                error, cmap="magma", vmin=0, vmax=255 / amplification, interpolation="nearest"
            )
            differences[column].set_title(f"|difference| x {amplification:g}, mean {error.mean():.1f}", fontsize=8)
        scale = differences[0].inset_axes((0.1, 0.5, 0.8, 0.06))
        figure.colorbar(shown, cax=scale, orientation="horizontal", extend="max", label="|difference|, of 255")
    return figure


def draw_overview(details: Sequence[Mapping[str, PIL.Image.Image]], painted: Mapping[str, PIL.Image.Image]) -> Figure:
    """
    A row of details for each photograph and, below them at half the size, a row of generated pictures.

    Args:
        details (`Sequence[Mapping]`): For each photograph: title -> square detail, as many for each.
        painted (`Mapping`): Prompt -> square picture, at most twice as many as a photograph has details.
    """
    columns, rows = len(details[0]), len(details)
    figure = Figure(figsize=(2.2 * columns, 2.4 * rows + 1.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    grid = figure.add_gridspec(2 * rows + 1, 2 * columns)
    for row, by_title in enumerate(details):
        for column, (title, picture) in enumerate(by_title.items()):
            place = grid[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            _show(figure.add_subplot(place), picture, title, "nearest")
    for column, (prompt, picture) in enumerate(painted.items()):
        _show(figure.add_subplot(grid[-1, column]), picture, f"“{prompt}”", "bicubic")
    return figure


def _show(axis, picture: PIL.Image.Image, title: str, interpolation: str):
    axis.imshow(picture, interpolation=interpolation)
    axis.set_title(title, fontsize=9)
    axis.axis("off")


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
