"""Pictures in and out: any size and mode to RGB tensors in [-1, 1] and back."""

import os

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F

from .files import check_output, replacing


def load_image(path: str | os.PathLike, max_pixels: int | None = None) -> PIL.Image.Image:
    """
    Read a picture file as upright 8-bit RGB.

    Args:
        path (`str` or `os.PathLike`)
        max_pixels (`int`, *optional*): Larger pictures are refused before they are decoded: a file of a few kB can
            hold gigabytes. Default: `PIL.Image.MAX_IMAGE_PIXELS`, 89 million; it may be changed.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a picture, is damaged, or is too large.
    """
    try:
        with PIL.Image.open(path) as picture:
            _check_size(picture, max_pixels or PIL.Image.MAX_IMAGE_PIXELS)
            return to_rgb(picture)
    except FileNotFoundError:
        raise FileNotFoundError(f"No such picture: {path}") from None
    except MemoryError:  # says nothing about the picture
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files, broken EXIF for one
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def _check_size(picture: PIL.Image.Image, max_pixels: int | None):
    if max_pixels and picture.width * picture.height > max_pixels:
        size = f"{picture.width} x {picture.height}"
        raise ValueError(
            f"it is too large, {size} pixels, more than {max_pixels}. Make it smaller or, in Python, set "
            "`PIL.Image.MAX_IMAGE_PIXELS`"
        )


def to_rgb(picture: PIL.Image.Image, upright: bool = True) -> PIL.Image.Image:
    """
    8-bit RGB; transparent parts on white, deeper grey scaled to 8 bits.

    Args:
        picture (`PIL.Image.Image`): Of any mode.
        upright (`bool`, *optional*, defaults to `True`): Whether to turn it as its EXIF data say.

    Raises:
        ValueError: if float pixels lie outside [0, 1] or integers outside 16 bits: their range cannot be known.
    """
    if upright:
        picture = PIL.ImageOps.exif_transpose(picture)
    if picture.mode[0] in "IF":
        picture = PIL.Image.fromarray(_eight_bit_grey(np.asarray(picture), picture.mode))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", picture.size, "white")
        picture = PIL.Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _eight_bit_grey(pixels: np.ndarray, mode: str) -> np.ndarray:
    """Grey pixels `[H, W]` of 16-bit integers, integers or floats as uint8."""
    top = 1 if mode == "F" else 255 if mode == "I" and pixels.max() <= 255 else 65535
    if not (pixels.min() >= 0 and pixels.max() <= top):
        raise ValueError(
            f"its pixels range from {pixels.min()} to {pixels.max()}, which cannot be scaled to 8 bits: store floats "
            "in [0, 1], or integers of at most 16 bits"
        )
    return (pixels * 255.0 / top).astype(np.uint8)


def to_tensor(picture: PIL.Image.Image) -> torch.Tensor:
    """A picture as `[3, H, W]` float32 in [-1, 1]; modes other than RGB go through [`to_rgb`]."""
    picture = picture if picture.mode == "RGB" else to_rgb(picture)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] rounded to the 0 ... 255 they would be stored as; uint8, same shape."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: torch.Tensor) -> PIL.Image.Image:
    """`[3, H, W]` in [-1, 1] as an 8-bit RGB picture."""
    return PIL.Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())


def pad_to_multiple(images: torch.Tensor, factor: int) -> torch.Tensor:
    """Repeat the last row and column of `[B, C, H, W]` until both sides are multiples of `factor`."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % factor, 0, -height % factor), mode="replicate")


def check_picture_output(path: str | os.PathLike, *inputs: str | os.PathLike):
    """`diffusers_pq.files.check_output` of a picture, whose format follows the suffix of `path`."""
    check_output(path, *inputs)
    PIL.Image.init()
    suffix = os.path.splitext(path)[1].lower()
    if PIL.Image.registered_extensions().get(suffix) not in PIL.Image.SAVE:
        raise ValueError(
            f"The output {path} must end in the suffix of a format that Pillow can write, such as .png, .jpg or .webp."
        )


def save_image(picture: PIL.Image.Image, path: str | os.PathLike):
    """Write a picture whole or not at all; the format follows the file name."""
    with replacing(path) as unfinished:
        picture.save(unfinished)
