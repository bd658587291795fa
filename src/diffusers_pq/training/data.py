"""Image datasets for training: any Hugging Face dataset, image folder or set of parquet files."""

import random
from collections.abc import Iterator
from itertools import count

import datasets
import torch
from PIL.Image import Transpose
from torch.utils.data import Dataset, Sampler

from ..images import to_rgb, to_tensor


def load_images(
    dataset_name: str | None,
    train_data_dir: str | None,
    image_column: str,
    split: str,
    dataset_config_name: str | None = None,
    cache_dir: str | None = None,
) -> datasets.Dataset | None:
    """
    One split of a dataset, its image column decoded to PIL.

    Args:
        dataset_name (`str`, *optional*): A Hub dataset or a local dataset folder (parquet files, say).
        train_data_dir (`str`, *optional*): A folder in the `imagefolder` layout; exclusive with `dataset_name`.
        image_column (`str`): The column that holds the pictures.
        split (`str`): `"train"`, `"validation"`, ...

    Returns:
        `datasets.Dataset`, or `None` if the dataset has no such split.

    Raises:
        ValueError: if neither or both sources are given, or the column is missing; the message lists the columns.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError("Give exactly one of `--dataset_name` and `--train_data_dir`.")
    if dataset_name is not None:
        splits = datasets.load_dataset(dataset_name, dataset_config_name, cache_dir=cache_dir)
    else:
        splits = datasets.load_dataset("imagefolder", data_dir=train_data_dir, cache_dir=cache_dir)
    if split not in splits:
        return None
    dataset = splits[split]
    if image_column not in dataset.column_names:
        raise ValueError(
            f"`--image_column` is {image_column!r}, but the dataset has the columns {', '.join(dataset.column_names)}."
        )
    return dataset.cast_column(image_column, datasets.Image(mode=None))


class RandomCrops(Dataset):
    """
    Square training crops `[crops_per_image, 3, R, R]` in [-1, 1] of a dataset's pictures.

    An item is named by `(epoch, index)`, as [`EpochSampler`] yields it, and depends on nothing else but the seed: not
    on the process, the worker, or on what was read before. A run that resumes reads what it would have read.

    Args:
        dataset (`datasets.Dataset`): With decoded pictures in `image_column`.
        image_column (`str`): The column that holds the pictures.
        resolution (`int`): R, the side of a crop; smaller pictures are enlarged to it first.
        crops_per_image (`int`): Crops cut from each decoded picture, which saves decoding on large pictures.
        random_flip (`bool`): Mirror half the crops.
        seed (`int`): Of the crops' positions and flips.
    """

    def __init__(self, dataset, image_column, resolution, crops_per_image=1, random_flip=False, seed=0):
        self.dataset = dataset.select_columns(image_column)
        self.image_column = image_column
        self.resolution = resolution
        self.crops_per_image = crops_per_image
        self.random_flip = random_flip
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> torch.Tensor:
        epoch, index = item
        generator = random.Random(f"{self.seed} {epoch} {index}")
        picture = _at_least(to_rgb(self.dataset[index][self.image_column]), self.resolution)
        return torch.stack([to_tensor(self._crop(picture, generator)) for _ in range(self.crops_per_image)])

    def _crop(self, picture, generator):
        left, top = (generator.randint(0, length - self.resolution) for length in picture.size)
        crop = picture.crop((left, top, left + self.resolution, top + self.resolution))
        if self.random_flip and generator.random() < 0.5:
            crop = crop.transpose(Transpose.FLIP_LEFT_RIGHT)
        return crop


class CentreCrops(Dataset):
    """
    The middle of every picture as `[1, 3, R, R]` in [-1, 1], for validation.

    Args:
        dataset (`datasets.Dataset`): With decoded pictures in `image_column`.
        image_column (`str`): The column that holds the pictures.
        resolution (`int`): R, the side of a crop; smaller pictures are enlarged to it first.
    """

    def __init__(self, dataset, image_column, resolution):
        self.dataset = dataset.select_columns(image_column)
        self.image_column = image_column
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> torch.Tensor:
        picture = _at_least(to_rgb(self.dataset[index][self.image_column]), self.resolution)
        left, top = ((length - self.resolution) // 2 for length in picture.size)
        return to_tensor(picture.crop((left, top, left + self.resolution, top + self.resolution)))[None]


class EpochSampler(Sampler):
    """
    Endless `(epoch, index)` of a dataset, each epoch in an order of its own that depends on seed and epoch only.

    Epochs follow each other without a gap: no picture is dropped to fill up batches.

    Args:
        length (`int`): Of the dataset.
        seed (`int`)
        start (`int`): Items to leave out at the beginning, those that a resumed run has seen.
    """

    def __init__(self, length: int, seed: int = 0, start: int = 0):
        self.length = length
        self.seed = seed
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first_epoch, skipped = divmod(self.start, self.length)
        for epoch in count(first_epoch):
            order = list(range(self.length))
            random.Random(f"{self.seed} {epoch}").shuffle(order)
            for index in order[skipped if epoch == first_epoch else 0 :]:
                yield epoch, index


def _at_least(picture, side: int):
    if min(picture.size) >= side:
        return picture
    scale = side / min(picture.size)
    return picture.resize([max(side, round(length * scale)) for length in picture.size])
