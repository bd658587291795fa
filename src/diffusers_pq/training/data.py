"""Image datasets for training: any Hugging Face dataset, image folder or set of parquet files."""

import random

import torch
from datasets import Dataset, Image, load_dataset
from PIL.Image import Transpose

from ..images import to_rgb, to_tensor


def load_images(
    dataset_name: str | None,
    train_data_dir: str | None,
    image_column: str,
    split: str,
    dataset_config_name: str | None = None,
    cache_dir: str | None = None,
) -> Dataset | None:
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
        splits = load_dataset(dataset_name, dataset_config_name, cache_dir=cache_dir)
    else:
        splits = load_dataset("imagefolder", data_dir=train_data_dir, cache_dir=cache_dir)
    if split not in splits:
        return None
    dataset = splits[split]
    if image_column not in dataset.column_names:
        raise ValueError(
            f"`--image_column` is {image_column!r}, but the dataset has the columns {', '.join(dataset.column_names)}."
        )
    return dataset.cast_column(image_column, Image(mode=None))


class RandomCrops:
    """
    `Dataset.set_transform` hook that turns every picture into square training crops.

    Args:
        image_column (`str`): The column that holds the pictures.
        resolution (`int`): Side of a crop; smaller pictures are enlarged to it first.
        crops_per_image (`int`): Crops cut from each decoded picture, which saves decoding on large pictures.
        center_crop (`bool`): Cut from the middle, for validation.
        random_flip (`bool`): Mirror half the crops.
    """

    def __init__(self, image_column, resolution, crops_per_image=1, center_crop=False, random_flip=False):
        self.image_column = image_column
        self.resolution = resolution
        self.crops_per_image = crops_per_image
        self.center_crop = center_crop
        self.random_flip = random_flip

    def __call__(self, batch: dict) -> dict:
        return {"pixel_values": [self._crops(picture) for picture in batch[self.image_column]]}

    def _crops(self, picture) -> torch.Tensor:
        picture = to_rgb(picture)
        side = min(picture.size)
        if side < self.resolution:
            scale = self.resolution / side
            picture = picture.resize([max(self.resolution, round(length * scale)) for length in picture.size])
        return torch.stack([to_tensor(self._crop(picture)) for _ in range(self.crops_per_image)])

    def _crop(self, picture):
        spare = [length - self.resolution for length in picture.size]
        left, top = [length // 2 if self.center_crop else random.randint(0, length) for length in spare]
        crop = picture.crop((left, top, left + self.resolution, top + self.resolution))
        if self.random_flip and random.random() < 0.5:
            crop = crop.transpose(Transpose.FLIP_LEFT_RIGHT)
        return crop


def collate_crops(examples: list[dict]) -> torch.Tensor:
    """Crops of several pictures as one batch `[B, 3, H, W]` in [-1, 1]."""
    return torch.cat([example["pixel_values"] for example in examples])
