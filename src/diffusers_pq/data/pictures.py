"""Pictures, captions and classes of any Hugging Face dataset, image folder, parquet files or webdataset tars."""

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import torch
from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets
from PIL import ExifTags
from PIL.Image import Resampling, Transpose

from ..files import folder_or_hub
from ..images import to_rgb, to_tensor
from .folders import PictureFolder


logger = logging.getLogger(__name__)

RESIZE_MODES = ("native", "short_side", "stretch")
INTERPOLATION_MODES = ("bicubic", "bilinear", "box", "lanczos")
# What follows is why the last one cannot be used.
NO_USABLE_PICTURE = (
    "The dataset has no picture that can be used: all are damaged, or smaller than `--min_image_side`, which is the "
    "resolution unless it is given. The last one: "
)


class BadImageError(ValueError):
    """A picture that cannot be trained on: damaged or too small."""


@dataclass(frozen=True)
class PictureSource:
    """
    Where pictures come from.

    Args:
        dataset_name (`str`, *optional*): A Hub dataset or a local folder of parquet files or webdataset tars.
        data_dir (`str`, *optional*): A folder of pictures, see [`~diffusers_pq.data.folders.PictureFolder`]; exclusive
            with `dataset_name`.
        image_column (`str`): The column that holds the pictures.
        dataset_config_name (`str`, *optional*): Of a dataset with several configurations.
        cache_dir (`str`, *optional*): Where datasets are kept; default: the Hub's cache.
        streaming (`bool`): Read while training instead of downloading first.

    Raises:
        ValueError: if neither or both sources are given.
    """

    dataset_name: str | None = None
    data_dir: str | None = None
    image_column: str = "image"
    dataset_config_name: str | None = None
    cache_dir: str | None = None
    streaming: bool = False

    def __post_init__(self):
        if (self.dataset_name is None) == (self.data_dir is None):
            raise ValueError("Give exactly one of `--dataset_name` and a folder of pictures.")

    @property
    def name(self) -> str:
        """The dataset's name or folder without what precedes the last slash."""
        return Path(self.dataset_name or self.data_dir).name

    def load(self, split: str, *other_columns: str) -> datasets.Dataset | datasets.IterableDataset | None:
        """
        One split. The pictures are left encoded; [`decode_image`] reads them.

        Args:
            split (`str`): `"train"`, `"validation"`, ...
            other_columns (`str`): Further columns to keep, such as the captions'.

        Returns:
            `datasets.Dataset`, or `datasets.IterableDataset` if streaming; `None` if there is no such split.

        Raises:
            ValueError: if a column is missing; the message lists the columns.
            FileNotFoundError: if the folder does not exist or holds no pictures.
        """
        folder = self.folder
        if folder is not None:
            needs = bool(other_columns)
            dataset = folder.load(split, self.image_column, needs_metadata=needs, cache_dir=self.cache_dir)
        else:
            options = {"cache_dir": self.cache_dir, "streaming": self.streaming}
            with folder_or_hub(self.dataset_name):
                dataset = datasets.load_dataset(self.dataset_name, self.dataset_config_name, **options).get(split)
        if dataset is None:
            return None
        if dataset.features is None:  # of some streams, columns are known only from the first rows
            dataset = dataset._resolve_features()
        for column in (self.image_column, *other_columns):
            if column not in dataset.column_names:
                raise ValueError(f"There is no column {column!r}; the dataset has {', '.join(dataset.column_names)}.")
        dataset = dataset.select_columns([self.image_column, *other_columns])
        dataset = dataset.cast_column(self.image_column, datasets.Image(decode=False))
        return dataset.to_iterable_dataset() if folder is not None and self.streaming else dataset

    @property
    def folder(self) -> PictureFolder | None:
        """The folder of pictures, or `None` of another kind of dataset."""
        if self.data_dir is not None:
            return PictureFolder(self.data_dir)
        if not Path(self.dataset_name).is_dir():
            return None
        folder = PictureFolder(self.dataset_name)
        return folder if folder.is_dataset_of_pictures() else None


def decode_image(value: dict, min_side: int = 1) -> PIL.Image.Image:
    """
    Decode one value of an undecoded image column to upright 8-bit RGB.

    Raises:
        BadImageError: if the picture is missing, cannot be decoded, or has a side below `min_side`.
    """
    if value is None:
        raise BadImageError("a row holds no picture")
    name = value.get("path") or "a picture"
    try:
        picture = to_rgb(datasets.Image().decode_example(value))
    except (ConnectionError, TimeoutError, PermissionError, MemoryError):  # says nothing about the picture
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files, broken EXIF for one
        raise BadImageError(f"{name} cannot be read: {error}") from error
    if min(picture.size) < min_side:
        raise BadImageError(
            f"{name} is too small: {picture.width} x {picture.height}, needs at least {min_side} a side"
        )
    return picture


def usable_rows(dataset, image_column: str, limit: int) -> list[dict]:
    """The first `limit` rows of a dataset or stream whose pictures can be decoded."""
    rows = []
    for row in dataset:
        if len(rows) == limit:
            break
        try:
            decode_image(row[image_column])
        except BadImageError as error:
            logger.warning("Left out of the validation: %s", error)
            continue
        rows.append(row)
    return rows


@dataclass
class Crops:
    """
    Cuts square crops from a picture: a row of a dataset to `[crops_per_image, 3, R, R]` in [-1, 1].

    Args:
        image_column (`str`): The column that holds the pictures.
        resolution (`int`): R, the side of a crop.
        crops_per_image (`int`): Crops cut from each decoded picture, which saves decoding on large pictures.
        resize_mode (`str`): `"native"` cuts from pictures as they are, only those with a side below R are enlarged;
            `"short_side"` resizes every picture, its proportions kept, until its shorter side is R; `"stretch"` makes
            the whole picture a square of side R, which changes its proportions and leaves nothing to cut.
        image_interpolation_mode (`str`): Filter of the resizing, antialiased: `"bicubic"`, `"bilinear"`, `"box"` or
            `"lanczos"`.
        center_crop (`bool`): Take the middle instead of a random part.
        random_flip (`bool`): Mirror half the crops.
        min_image_side (`int`, *optional*):
            Pictures with a shorter side are bad; those between it and R are enlarged. Default: R.
    """

    image_column: str
    resolution: int
    crops_per_image: int = 1
    resize_mode: str = "native"
    image_interpolation_mode: str = "bicubic"
    center_crop: bool = False
    random_flip: bool = False
    min_image_side: int | None = None

    @classmethod
    def middle(cls, image_column: str, resolution: int, resize_mode: str = "short_side", **options) -> "Crops":
        """The middle of each picture, also of a small one: what does not change from one look to the next."""
        return cls(image_column, resolution, resize_mode=resize_mode, center_crop=True, min_image_side=1, **options)

    def __call__(self, row: dict, generator: random.Random) -> torch.Tensor:
        picture = self._decoded(row)
        size = self._size(picture)
        picture = self._resized(picture, size)
        crops = [self._one_crop(picture, size, generator)[0] for _ in range(self.crops_per_image)]
        return torch.stack([to_tensor(crop) for crop in crops])

    def with_sizes(self, row: dict, generator: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """
        One crop, `[3, R, R]`, and what Stable Diffusion XL is told of it, `[6]`: the picture's height and width, top
        and left of the crop after resizing (and mirroring), and R twice.
        """
        original = self._decoded(row)
        size = self._size(original)
        crop, top, left = self._one_crop(self._resized(original, size), size, generator)
        sizes = original.height, original.width, top, left, *size
        return to_tensor(crop), torch.tensor(sizes, dtype=torch.float32)

    def groups(self, rows: datasets.Dataset) -> list[int | None] | None:
        """The number of the size that each row's crop will have, `None` for bad pictures; `None` if all have one."""
        return None

    def _decoded(self, row):
        min_side = self.resolution if self.min_image_side is None else self.min_image_side
        return decode_image(row[self.image_column], min_side)

    def _size(self, picture) -> tuple[int, int]:
        """Height and width of the crop."""
        return self.resolution, self.resolution

    def _resized(self, picture, size):
        height, width = size
        resample = Resampling[self.image_interpolation_mode.upper()]
        if self.resize_mode == "stretch":
            # In one step, without a fast coarse one before it, as the paper's authors do.
            return picture.resize((width, height), resample)
        if self.resize_mode == "short_side" or picture.height < height or picture.width < width:
            return _scaled_to(picture, size, resample)
        return picture

    def _one_crop(self, picture, size, generator):
        height, width = size
        spare = picture.width - width, picture.height - height
        left, top = (length // 2 if self.center_crop else generator.randint(0, length) for length in spare)
        crop = picture.crop((left, top, left + width, top + height))
        if self.random_flip and generator.random() < 0.5:
            crop = crop.transpose(Transpose.FLIP_LEFT_RIGHT)
            left = picture.width - left - width
        return crop, top, left


@dataclass(kw_only=True)
class BucketCrops(Crops):
    """
    [`Crops`] that keep nearly all of a picture: `[.., 3, h, w]` of the one of several sizes whose proportions are next
    to the picture's, to which it is resized.

    Args:
        buckets (`Sequence[tuple[int, int]]`): Heights and widths, see [`aspect_ratio_buckets`].
        min_image_side (`int`, *optional*): Default: pictures that would have to be enlarged are bad.
    """

    buckets: Sequence[tuple[int, int]]

    def __post_init__(self):
        self.resize_mode = "short_side"

    def groups(self, rows: datasets.Dataset) -> list[int | None]:
        """See [`Crops.groups`]; reads the header of each picture."""
        return [self._group(row[self.image_column]) for row in rows.select_columns(self.image_column)]

    def _group(self, value: dict) -> int | None:
        try:
            width, height = picture_size(value)
        except BadImageError as error:
            logger.warning("Left out: %s", error)
            return None
        return find_nearest_bucket(height, width, self.buckets)

    def _decoded(self, row):
        picture = decode_image(row[self.image_column], self.min_image_side or 1)
        height, width = self._size(picture)
        if self.min_image_side is None and (picture.height < height or picture.width < width):
            name = row[self.image_column].get("path") or "a picture"
            raise BadImageError(f"{name} is too small: {picture.width} x {picture.height}, needs {width} x {height}")
        return picture

    def _size(self, picture):
        return self.buckets[find_nearest_bucket(picture.height, picture.width, self.buckets)]


def aspect_ratio_buckets(
    resolution: int, multiple: int, given: Sequence[tuple[int, int]] | None = None
) -> list[tuple[int, int]]:
    """
    Heights and widths of about R x R pixels.

    Args:
        resolution (`int`): R.
        multiple (`int`): Of which all sides are multiples: of F times the denoiser's patch size.
        given (`Sequence[tuple[int, int]]`, *optional*): Heights and widths whose proportions they shall have. Default:
            those that diffusers proposes, from 1:2 to 2:1.
    """
    return generate_aspect_ratio_buckets(resolution, multiple, given)


def picture_size(value: dict) -> tuple[int, int]:
    """
    Width and height of one value of an undecoded image column when it is upright, from its header.

    Raises:
        BadImageError: if the picture is missing or its header cannot be read.
    """
    name = (value or {}).get("path") or "a picture"
    try:
        with PIL.Image.open(BytesIO(value["bytes"]) if value["bytes"] else value["path"]) as picture:
            width, height = picture.size
            # Of a PNG file, Pillow would look for it behind the pixels as well, and decode them.
            exif = {} if picture.format == "PNG" and "exif" not in picture.info else picture.getexif()
            is_turned = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception as error:  # see `decode_image`
        raise BadImageError(f"{name} cannot be read: {error}") from error
    return (height, width) if is_turned else (width, height)


@dataclass
class ConditionedCrops:
    """
    Makes a training example of a picture and its condition: a row of a dataset to `pixel_values` `[3, R, R]` in
    [-1, 1] and `condition`.

    Args:
        crops ([`Crops`]): One of each picture.
        condition ([`~diffusers_pq.data.conditions.Prompts`] or [`~diffusers_pq.data.conditions.ClassLabels`]):
            Makes the condition of the row.
        with_sizes (`bool`): Also put `sizes` into `condition`, a dictionary; see [`Crops.with_sizes`].
    """

    crops: Crops
    condition: Callable[[dict, random.Random], Any]
    with_sizes: bool = False

    def __call__(self, row: dict, generator: random.Random) -> dict[str, Any]:
        pixel_values, sizes = self.crops.with_sizes(row, generator)
        condition = self.condition(row, generator)
        if self.with_sizes:
            condition = condition | {"sizes": sizes}
        return {"pixel_values": pixel_values, "condition": condition}

    def groups(self, rows: datasets.Dataset) -> list[int | None] | None:
        """See [`Crops.groups`]."""
        return self.crops.groups(rows)


def _scaled_to(picture: PIL.Image.Image, size: tuple[int, int], resample: Resampling) -> PIL.Image.Image:
    """The picture as small as it covers a height and a width."""
    height, width = size
    scale = max(height / picture.height, width / picture.width)
    sides = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    return picture.resize(sides, resample, reducing_gap=3.0)
