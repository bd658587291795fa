"""Pictures, captions and classes of any Hugging Face dataset, image folder, parquet files or webdataset tars."""

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import PIL.Image
import torch
from PIL.Image import Transpose
from torch.utils.data import Dataset

from ..files import folder_or_hub
from ..images import to_rgb, to_tensor
from .folders import PictureFolder


logger = logging.getLogger(__name__)


# Arrow's, of a column of classes.
_LABEL_TYPES = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_LABEL_TYPES |= {"bool", "string", "large_string"}


class BadImageError(ValueError):
    """A picture that cannot be trained on: damaged or too small."""


def load_images(
    dataset_name: str | None,
    train_data_dir: str | None,
    image_column: str,
    split: str,
    dataset_config_name: str | None = None,
    cache_dir: str | None = None,
    streaming: bool = False,
    other_columns: tuple[str, ...] = (),
) -> datasets.Dataset | datasets.IterableDataset | None:
    """
    One split of a dataset. The pictures are left encoded; [`decode_image`] reads them.

    Args:
        dataset_name (`str`, *optional*): A Hub dataset or a local folder of parquet files or webdataset tars.
        train_data_dir (`str`, *optional*): A folder of pictures, see [`~diffusers_pq.data.folders.PictureFolder`];
            exclusive with `dataset_name`.
        image_column (`str`): The column that holds the pictures.
        split (`str`): `"train"`, `"validation"`, ...
        streaming (`bool`): Read while training instead of downloading first.
        other_columns (`tuple[str]`): Further columns to keep, such as the captions'.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` if streaming; `None` if the dataset has no such split.

    Raises:
        ValueError: if neither or both sources are given, or a column is missing; the message lists the columns.
        FileNotFoundError: if the folder does not exist or holds no pictures.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError("Give exactly one of `--dataset_name` and `--train_data_dir`.")
    folder = picture_folder(dataset_name, train_data_dir)
    if folder is not None:
        dataset = folder.load(split, image_column, needs_metadata=bool(other_columns), cache_dir=cache_dir)
    else:
        with folder_or_hub(dataset_name):
            dataset = datasets.load_dataset(
                dataset_name, dataset_config_name, cache_dir=cache_dir, streaming=streaming
            ).get(split)
    if dataset is None:
        return None
    if dataset.features is None:  # of some streams, columns are known only from the first rows
        dataset = dataset._resolve_features()
    for column in (image_column, *other_columns):
        if column not in dataset.column_names:
            raise ValueError(f"There is no column {column!r}; the dataset has {', '.join(dataset.column_names)}.")
    dataset = dataset.select_columns([image_column, *other_columns])
    dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    return dataset.to_iterable_dataset() if folder is not None and streaming else dataset


def picture_folder(dataset_name: str | None, train_data_dir: str | None) -> PictureFolder | None:
    """The folder of pictures that two flags name, or `None` if it is another kind of dataset."""
    if train_data_dir is not None:
        return PictureFolder(train_data_dir)
    if not Path(dataset_name).is_dir():
        return None
    folder = PictureFolder(dataset_name)
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


@dataclass
class RandomCrops:
    """
    Cuts square crops from a picture: a row of a dataset to `[crops_per_image, 3, R, R]` in [-1, 1].

    Args:
        image_column (`str`): The column that holds the pictures.
        resolution (`int`): R, the side of a crop.
        crops_per_image (`int`): Crops cut from each decoded picture, which saves decoding on large pictures.
        random_flip (`bool`): Mirror half the crops.
        min_image_side (`int`, *optional*):
            Pictures with a shorter side are bad; those between it and R are enlarged. Default: R.
    """

    image_column: str
    resolution: int
    crops_per_image: int = 1
    random_flip: bool = False
    min_image_side: int | None = None

    def __call__(self, row: dict, generator: random.Random) -> torch.Tensor:
        min_side = self.resolution if self.min_image_side is None else self.min_image_side
        picture = _at_least(decode_image(row[self.image_column], min_side), self.resolution)
        return torch.stack([to_tensor(self._one_crop(picture, generator)) for _ in range(self.crops_per_image)])

    def _one_crop(self, picture, generator):
        crop = _crop(picture, self.resolution, generator)
        if self.random_flip and generator.random() < 0.5:
            crop = crop.transpose(Transpose.FLIP_LEFT_RIGHT)
        return crop


def caption_texts(value: str | list | None, column: str) -> list[str]:
    """
    The captions of a row: those of a list, or the one that it has; `None` is none.

    Raises:
        ValueError: if one is no text; the message names the column.
    """
    captions = [caption for caption in (value if isinstance(value, list) else [value]) if caption is not None]
    for caption in captions:
        if not isinstance(caption, str):
            raise ValueError(
                f"The captions in the column {column!r} must be texts, or lists of texts, but one is {caption!r}."
            )
    return captions


@dataclass
class Prompts:
    """
    Makes what a denoiser is conditioned on of a row's caption.

    Args:
        caption_column (`str`): A caption may be a list of captions, of which one is drawn.
        condition: Makes a dictionary of tensors, or of such, of a text; `""` is a caption that is left out.
        proportion_empty_prompts (`float`): Share of the captions that are left out, for classifier-free guidance.
    """

    caption_column: str
    condition: Callable[[str], dict]
    proportion_empty_prompts: float = 0.0

    def __call__(self, row: dict, generator: random.Random) -> dict:
        caption = generator.choice(caption_texts(row[self.caption_column], self.caption_column) or [""])
        if generator.random() < self.proportion_empty_prompts:
            caption = ""
        return self.condition(caption)


@dataclass
class ClassLabels:
    """
    Makes a class label, a scalar tensor, of a row.

    Args:
        label_column (`str`): Holds labels or names of classes.
        names (`Sequence[str]`): Of the classes; label i is the i-th.
        proportion_empty_labels (`float`): Share of the labels that are replaced by the one after the last, which
            stands for no class; for classifier-free guidance.

    Raises:
        ValueError: on a row of an unknown class.
    """

    label_column: str
    names: Sequence[str]
    proportion_empty_labels: float = 0.0

    def __post_init__(self):
        self._labels = {name: label for label, name in enumerate(self.names)}

    def __call__(self, row: dict, generator: random.Random) -> torch.LongTensor:
        value = row[self.label_column]
        label = self._labels.get(value) if isinstance(value, str) else value
        if label is None or not 0 <= label < len(self.names):
            raise ValueError(
                f"A row has the class {value!r} in the column {self.label_column!r}, which is none of the "
                f"{len(self.names)} classes ({', '.join(self.names[:5])}, ...)."
            )
        if generator.random() < self.proportion_empty_labels:
            label = len(self.names)
        return torch.tensor(label)


def class_names(
    dataset: datasets.Dataset | datasets.IterableDataset, label_column: str, names_file: str | None = None
) -> list[str]:
    """
    The names of a dataset's classes; label i is the i-th.

    Args:
        dataset: What [`load_images`] returns.
        label_column (`str`): Of type `ClassLabel`, or of strings or whole numbers.
        names_file (`str`, *optional*): A text file with a name in each line. Default: the names of a `ClassLabel`; or
            the column's strings in alphabetical order; or the numbers up to its largest.

    Raises:
        ValueError: if the file names a class twice and the column may hold names, or a stream's column does not say
            what classes there are.
    """
    feature = dataset.features[label_column]
    dtype = getattr(feature, "dtype", "list")
    if not (isinstance(feature, datasets.ClassLabel) or dtype in _LABEL_TYPES):
        raise ValueError(
            f"Classes must be whole numbers or strings, but the column {label_column!r} holds {dtype}: name another "
            "one with `--label_column`, or cast it."
        )
    if names_file is not None:
        names = Path(names_file).read_text(encoding="utf-8").splitlines()
        # ImageNet's usual names have two of "crane" and "maillot": no harm where the rows hold numbers.
        is_number = "int" in dtype
        if len(set(names)) < len(names) and not is_number:
            raise ValueError(f"`--class_names_file` {names_file} names a class twice.")
        return names
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    if isinstance(dataset, datasets.IterableDataset):
        raise ValueError(
            f"The stream does not say what classes its column {label_column!r} has: give `--class_names_file`, a text "
            "file with a name in each line."
        )
    values = dataset.unique(label_column)
    if None in values:
        raise ValueError(f"Some rows have no class in the column {label_column!r}.")
    if all(isinstance(value, int) for value in values):
        return [str(label) for label in range(max(values) + 1)]
    return sorted(values)


@dataclass
class ConditionedCrops:
    """
    Makes a training example of a picture and its condition: a row of a dataset to `pixel_values` `[3, R, R]` in
    [-1, 1] and `condition`. The picture is resized, its proportions kept, until its shorter side is R; then cropped.

    Args:
        image_column (`str`)
        resolution (`int`): R.
        condition ([`Prompts`] or [`ClassLabels`], *optional*): `None` if only `pixel_values` are wanted.
        center_crop (`bool`): Take the middle instead of a random part.
        random_flip (`bool`): Mirror half the pictures.
        min_image_side (`int`, *optional*): Pictures with a shorter side are bad. Default: R.
        with_sizes (`bool`): Also put `sizes` `[6]` into `condition`, a dictionary: the picture's height and width, top
            and left of the crop after resizing (and mirroring), and R twice.
    """

    image_column: str
    resolution: int
    condition: Prompts | ClassLabels | None
    center_crop: bool = False
    random_flip: bool = False
    min_image_side: int | None = None
    with_sizes: bool = False

    def __call__(self, row: dict, generator: random.Random) -> dict[str, torch.Tensor]:
        pixel_values, sizes = self._picture_and_sizes(row, generator)
        condition = self.condition(row, generator)
        if self.with_sizes:
            condition = condition | {"sizes": torch.tensor(sizes, dtype=torch.float32)}
        return {"pixel_values": pixel_values, "condition": condition}

    def pixel_values(self, row: dict, generator: random.Random) -> torch.Tensor:
        """The picture alone, `[3, R, R]`."""
        return self._picture_and_sizes(row, generator)[0]

    def _picture_and_sizes(self, row, generator):
        side = self.resolution
        original = decode_image(row[self.image_column], side if self.min_image_side is None else self.min_image_side)
        picture = _scaled_to(original, side)
        left, top = _place(picture, side, None if self.center_crop else generator)
        crop = picture.crop((left, top, left + side, top + side))
        if self.random_flip and generator.random() < 0.5:
            crop = crop.transpose(Transpose.FLIP_LEFT_RIGHT)
            left = picture.width - left - side
        return to_tensor(crop), (original.height, original.width, top, left, side, side)


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


class CentreCrops(Dataset):
    """
    The middle of every picture as `[1, 3, R, R]` in [-1, 1], for validation.

    Args:
        rows (sequence of `dict`): See [`usable_rows`].
        image_column (`str`): The column that holds the pictures.
        resolution (`int`): R, the side of a crop; smaller pictures are enlarged to it first.
    """

    def __init__(self, rows, image_column: str, resolution: int):
        self.rows = rows
        self.image_column = image_column
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        picture = _at_least(decode_image(self.rows[index][self.image_column]), self.resolution)
        return to_tensor(_crop(picture, self.resolution))[None]


def _crop(picture: PIL.Image.Image, side: int, generator: random.Random | None = None) -> PIL.Image.Image:
    """A square part at a random place, or the middle."""
    left, top = _place(picture, side, generator)
    return picture.crop((left, top, left + side, top + side))


def _place(picture: PIL.Image.Image, side: int, generator: random.Random | None = None) -> list[int]:
    """Left and top of a square part, random or of the middle."""
    spare = [length - side for length in picture.size]
    return [length // 2 if generator is None else generator.randint(0, length) for length in spare]


def _at_least(picture: PIL.Image.Image, side: int) -> PIL.Image.Image:
    return picture if min(picture.size) >= side else _scaled_to(picture, side)


def _scaled_to(picture: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """The picture with `side` as its shorter side."""
    scale = side / min(picture.size)
    return picture.resize([max(side, round(length * scale)) for length in picture.size], reducing_gap=3.0)
