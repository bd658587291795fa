"""A dataset's pictures, encoded once, before a training, and kept in the memory of the CPU (`--cache_latents`)."""

import logging
import random
from dataclasses import dataclass

import datasets
import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..autoencoders import encode_reusably
from .conditions import ClassLabels, Prompts
from .loaders import BadImages
from .pictures import BadImageError, ConditionedCrops


logger = logging.getLogger(__name__)


@dataclass
class RememberedLatents:
    """
    Makes a training example of a row of [`encode_in_memory`]: what was encoded, and `condition`.

    Args:
        condition ([`Prompts`] or [`ClassLabels`])
        with_sizes (`bool`): See [`ConditionedCrops`].
    """

    condition: Prompts | ClassLabels
    with_sizes: bool = False

    def __call__(self, row: dict, generator: random.Random) -> dict:
        condition = self.condition(row, generator)
        if self.with_sizes:
            condition = condition | {"sizes": row["sizes"]}
        return row["encoded"] | {"condition": condition}

    def groups(self, rows: list[dict]) -> list[int] | None:
        """See [`Crops.groups`]."""
        sizes = [tuple(row["sizes"][-2:].tolist()) for row in rows]
        numbers = {size: number for number, size in enumerate(dict.fromkeys(sizes))}
        return [numbers[size] for size in sizes] if len(numbers) > 1 else None


def encode_in_memory(
    vae: nn.Module,
    dataset: datasets.Dataset,
    crops: ConditionedCrops,
    condition_column: str,
    accelerator: Accelerator,
    batch_size: int = 8,
    on_bad_image: str = "skip",
) -> tuple[list[dict], RememberedLatents]:
    """
    One crop of each picture, encoded; of codes and distributions latents are made anew in each epoch. To be called by
    all processes, which share the work out and end with all of it.

    Args:
        vae (`nn.Module`): See [`~autoencoders.encode_reusably`].
        dataset (`datasets.Dataset`)
        crops ([`ConditionedCrops`]): The crop of a picture depends on its row number only.
        condition_column (`str`): Kept beside what was encoded.
        accelerator (`Accelerator`)
        batch_size (`int`): Pictures that are encoded together.
        on_bad_image (`str`): See [`BadImages`].

    Returns:
        The rows, and the transform that makes examples of them.

    Raises:
        ValueError: if no picture can be used.
    """
    bad_images, rows, waiting = BadImages(on_bad_image), [], {}
    numbers = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    for number in tqdm(numbers, desc="Latents", disable=not accelerator.is_local_main_process):
        source = dataset[number]
        try:
            pixel_values, sizes = crops.crops.with_sizes(source, random.Random(number))
        except BadImageError as error:
            bad_images.handle(error)
            continue
        row = {"number": number, condition_column: source[condition_column], "sizes": sizes}
        batch = waiting.setdefault(pixel_values.shape, [])
        batch.append((row, pixel_values))
        if len(batch) == batch_size:
            rows += _encoded(vae, waiting.pop(pixel_values.shape))
    for batch in waiting.values():
        rows += _encoded(vae, batch)
    if accelerator.num_processes > 1:
        rows = gather_object(rows)
    if not rows:
        raise ValueError("--cache_latents: no picture can be used; see the warnings above.")
    rows.sort(key=lambda row: row["number"])
    size = sum(value.nbytes for row in rows for value in row["encoded"].values())
    logger.info("%d pictures are encoded: %.2f GiB", len(rows), size / 2**30)
    return rows, RememberedLatents(crops.condition, crops.with_sizes)


def _encoded(vae, batch) -> list[dict]:
    rows, pictures = zip(*batch)
    encoded = {name: value.cpu() for name, value in encode_reusably(vae, torch.stack(pictures)).items()}
    return [
        # Copies: a view would keep the whole batch, and be sent whole to other processes.
        row | {"encoded": {name: value[number].clone() for name, value in encoded.items()}}
        for number, row in enumerate(rows)
    ]
