"""A dataset's pictures, encoded once to packed codes, for the training of denoisers."""

import logging
import math
import os
import random
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..autoencoders import check_resolution, weights_digest
from ..files import read_json, replacing, write_json
from ..models.autoencoder_pq import PQModel
from ..models.quantizer import bits_per_code
from .conditions import ClassLabels, Prompts, check_condition_column
from .fingerprints import fingerprint_rows
from .loaders import BadImages
from .pictures import NO_USABLE_PICTURE, BadImageError, Crops


logger = logging.getLogger(__name__)

_INDEX = "latents.json"
_SIZES = ("num_subspaces", "codebook_size", "downsampling_factor")
# What indices of earlier versions do not say.
_EARLIER_CROPS = {"resize_mode": "short_side", "image_interpolation_mode": "bicubic"}


def pack_codes(codes: torch.LongTensor, codebook_size: int) -> bytes:
    """Codes of any shape, in [0, K), as ceil(log2 K) bits each, the lowest bit first."""
    bits = torch.arange(bits_per_code(codebook_size), device=codes.device)
    return np.packbits((codes.flatten().unsqueeze(-1) >> bits & 1).to(torch.uint8).cpu().numpy()).tobytes()


def unpack_codes(packed: bytes, shape: tuple[int, ...], codebook_size: int) -> torch.LongTensor:
    """The inverse of [`pack_codes`]; a `ValueError` if a code is not below K."""
    bits, count = bits_per_code(codebook_size), math.prod(shape)
    flat = torch.from_numpy(np.unpackbits(np.frombuffer(packed, np.uint8), count=count * bits)).view(count, bits)
    codes = (flat.long() << torch.arange(bits)).sum(-1).view(shape)
    largest = int(codes.max())
    if largest >= codebook_size:
        raise ValueError(f"Packed codes are damaged: one is {largest}, but K is {codebook_size}.")
    return codes


@torch.no_grad()
def encode_dataset(
    vae: PQModel,
    dataset: datasets.Dataset,
    crops: Crops,
    condition_column: str,
    output_dir: str | os.PathLike,
    accelerator: Accelerator,
    batch_size: int = 8,
    rows_per_shard: int = 1000,
) -> dict[str, int]:
    """
    Write a dataset's codes and captions or classes as parquet shards to `<output_dir>/<resolution>`.

    Shards are shared out among the processes. Each is written whole or not at all, and those that exist are left
    alone: an interrupted run resumes where it stopped.

    Args:
        vae ([`PQModel`]): In eval mode, on the accelerator's device.
        dataset (`datasets.Dataset`): See [`~diffusers_pq.data.pictures.PictureSource`].
        crops ([`Crops`]): One of each picture, drawn once for all epochs.
        condition_column (`str`): Kept beside the codes as it is.
        output_dir: Of several resolutions of one dataset.
        accelerator (`Accelerator`)
        batch_size (`int`): Pictures that are encoded together.
        rows_per_shard (`int`)

    Returns:
        `dict[str, int]`: Shards `written` by this process and pictures it `skipped` because they were bad.

    Raises:
        ValueError: if the folder holds codes of another model, of other crops, or of other pictures or captions; if
            no picture can be used, the model cannot encode such crops, or the column is one of neither captions nor
            classes.
    """
    check_resolution("--resolution", crops.resolution, vae.downsampling_factor)
    check_condition_column(dataset, condition_column)
    _check_pictures(dataset, crops)
    folder = Path(output_dir) / str(crops.resolution)
    index = _index(vae, crops.resolution) | {"rows": len(dataset), "rows_per_shard": rows_per_shard}
    settings = "resize_mode", "image_interpolation_mode", "center_crop", "random_flip", "min_image_side"
    index |= {name: getattr(crops, name) for name in settings} | {"condition_column": condition_column}
    if accelerator.is_main_process:
        index |= {"rows_sha256": fingerprint_rows(dataset)}
        folder.mkdir(parents=True, exist_ok=True)
        _write_index(folder / _INDEX, index)
    accelerator.wait_for_everyone()
    bad_images, written = BadImages(), 0
    starts = range(0, len(dataset), rows_per_shard)
    for number in tqdm(range(accelerator.process_index, len(starts), accelerator.num_processes), desc="Shards"):
        path = folder / f"train-{number:05d}-of-{len(starts):05d}.parquet"
        if path.is_file():
            continue
        rows = dataset.select(range(starts[number], min(starts[number] + rows_per_shard, len(dataset))))
        shard = _encode_shard(vae, rows, starts[number], crops, condition_column, batch_size, bad_images)
        with replacing(path) as unfinished:
            shard.to_parquet(unfinished)
        written += 1
    return {"written": written, "skipped": int(bad_images.counts.sum())}


def _check_pictures(dataset, crops):
    last = "there is none"
    for row in dataset:
        try:
            crops(row, random.Random(0))
            return
        except BadImageError as error:
            last = error
    raise ValueError(f"{NO_USABLE_PICTURE}{last}.")


def _encode_shard(vae, rows, first, crops, condition_column, batch_size, bad_images) -> datasets.Dataset:
    pictures, conditions, packed = [], [], []

    def encode_pictures():
        batch = torch.stack(pictures).to(vae.device, vae.dtype)
        packed.extend(pack_codes(codes, vae.config.codebook_size) for codes in vae.encode_codes(batch))
        pictures.clear()

    for number, row in enumerate(rows, first):
        try:
            pictures.append(crops(row, random.Random(number))[0])
            conditions.append(row[condition_column])
        except BadImageError as error:
            bad_images.handle(error)
        if len(pictures) == batch_size:
            encode_pictures()
    if pictures:
        encode_pictures()
    kept = rows.features[condition_column]
    features = datasets.Features({"codes": datasets.Value("binary"), condition_column: kept})
    return datasets.Dataset.from_dict({"codes": packed, condition_column: conditions}, features=features)


@dataclass
class CachedCodes:
    """
    Makes a training example of a cached row: `codes` `[S, h, w]` and `condition`.

    Args:
        shape (`tuple[int, int, int]`): S, h and w.
        codebook_size (`int`): K.
        condition ([`Prompts`] or [`ClassLabels`])
        resolution (`int`, *optional*): Side R of the pictures. If given, `condition` is a dictionary and gets `sizes`,
            as [`ConditionedCrops`] makes them, of pictures that were R x R: a cache does not know their sizes.
    """

    shape: tuple[int, int, int]
    codebook_size: int
    condition: Prompts | ClassLabels
    resolution: int | None = None

    def __call__(self, row: dict, generator: random.Random) -> dict[str, torch.Tensor]:
        codes = unpack_codes(row["codes"], self.shape, self.codebook_size)
        condition, side = self.condition(row, generator), self.resolution
        if side is not None:
            condition = condition | {"sizes": torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32)}
        return {"codes": codes, "condition": condition}

    def groups(self, rows: datasets.Dataset) -> None:
        """All are of one size; see [`~data.pictures.Crops.groups`]."""


def load_cached_codes(
    latents_dir: str | os.PathLike,
    resolution: int,
    vae: PQModel,
    condition: Prompts | ClassLabels,
    cache_dir: str | None = None,
    with_sizes: bool = False,
) -> tuple[datasets.Dataset, CachedCodes]:
    """
    The rows that [`encode_dataset`] wrote for a resolution, and the transform that makes examples of them, with their
    sizes if asked to.

    Raises:
        FileNotFoundError: if there are none, or shards are missing.
        ValueError: if they are the codes of another model; the message says what differs.
    """
    folder = Path(latents_dir) / str(resolution)
    if not (folder / _INDEX).is_file():
        raise FileNotFoundError(f"`--latents_dir` {latents_dir} has no codes at {resolution} px: {folder / _INDEX}.")
    index = read_json(folder / _INDEX)
    _check_index(_index(vae, resolution), index, folder)
    shards = sorted(map(str, folder.glob("train-*.parquet")))
    expected = math.ceil(index["rows"] / index["rows_per_shard"])
    if len(shards) != expected:
        raise FileNotFoundError(f"{folder} has {len(shards)} of {expected} shards: run the encoding to its end.")
    side = resolution // vae.downsampling_factor
    shape = vae.config.num_subspaces, side, side
    transform = CachedCodes(shape, vae.config.codebook_size, condition, resolution if with_sizes else None)
    return datasets.load_dataset("parquet", data_files=shards, split="train", cache_dir=cache_dir), transform


def _index(vae: PQModel, resolution: int) -> dict:
    """What must be the same for codes to mean the same, the plainest first."""
    sizes = vae.config.num_subspaces, vae.config.codebook_size, vae.downsampling_factor
    return dict(zip(_SIZES, sizes)) | {"model_sha256": weights_digest(vae), "resolution": resolution}


def _write_index(path: Path, index: dict):
    if path.is_file():
        found = read_json(path)
        if "rows_sha256" not in found:
            logger.warning("%s does not say of which pictures its codes are; they are taken for these.", path)
            found["rows_sha256"] = index["rows_sha256"]
        _check_index(index, found, path.parent)
    write_json(path, index)


def _check_index(expected: dict, found: dict, folder: Path):
    # The sizes are missing in indices of earlier versions, which the digest of the model stands for.
    found = {name: expected[name] for name in _SIZES if name in expected} | _EARLIER_CROPS | found
    unlike = [name for name, value in expected.items() if found.get(name) != value]
    if unlike:
        differences = ", ".join(f"{name} is {found.get(name)}, not {expected[name]}" for name in unlike)
        if "rows_sha256" in unlike:
            differences += " (pictures or captions were changed, or are another dataset's)"
        raise ValueError(f"{folder} holds other codes: {differences}. Choose another folder or remove this one.")
