"""Image datasets for training: any Hugging Face dataset, image folder, set of parquet files or webdataset tars."""

import copy
import logging
import random
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice

import datasets
import PIL.Image
import pyarrow
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL.Image import Transpose
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from ..images import to_rgb, to_tensor


logger = logging.getLogger(__name__)

# What reading a damaged shard raises, with parquet files and tars respectively.
_SHARD_ERRORS = (OSError, EOFError, pyarrow.ArrowException, tarfile.TarError)


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
        train_data_dir (`str`, *optional*): A folder in the `imagefolder` layout; exclusive with `dataset_name`.
        image_column (`str`): The column that holds the pictures.
        split (`str`): `"train"`, `"validation"`, ...
        streaming (`bool`): Read while training instead of downloading first.
        other_columns (`tuple[str]`): Further columns to keep, such as the captions'.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` if streaming; `None` if the dataset has no such split.

    Raises:
        ValueError: if neither or both sources are given, or a column is missing; the message lists the columns.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError("Give exactly one of `--dataset_name` and `--train_data_dir`.")
    options = {"cache_dir": cache_dir, "streaming": streaming}
    if dataset_name is not None:
        splits = datasets.load_dataset(dataset_name, dataset_config_name, **options)
    else:
        splits = datasets.load_dataset("imagefolder", data_dir=train_data_dir, **options)
    if split not in splits:
        return None
    dataset = splits[split]
    if dataset.features is None:  # of some streams, columns are known only from the first rows
        dataset = dataset._resolve_features()
    for column in (image_column, *other_columns):
        if column not in dataset.column_names:
            raise ValueError(f"There is no column {column!r}; the dataset has {', '.join(dataset.column_names)}.")
    return dataset.select_columns([image_column, *other_columns]).cast_column(
        image_column, datasets.Image(decode=False)
    )


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
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise BadImageError(f"{name} cannot be read: {error}") from error
    if min(picture.size) < min_side:
        raise BadImageError(f"{name} is too small: {picture.width} x {picture.height}, shortest side {min_side}")
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


@dataclass
class Prompts:
    """
    Makes token ids `[L]` of a row's caption, L the tokenizer's `model_max_length`.

    Args:
        caption_column (`str`): A caption may be a list of captions, of which one is drawn.
        tokenizer (`CLIPTokenizer`)
        proportion_empty_prompts (`float`): Share of the captions that are left out, for classifier-free guidance.
    """

    caption_column: str
    tokenizer: Callable
    proportion_empty_prompts: float = 0.0

    def __call__(self, row: dict, generator: random.Random) -> torch.LongTensor:
        caption = row[self.caption_column]
        caption = generator.choice(caption) if isinstance(caption, list) else caption or ""
        if generator.random() < self.proportion_empty_prompts:
            caption = ""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(caption, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
        return tokens.input_ids[0]


@dataclass
class CaptionedCrops:
    """
    Makes a training example of a picture and its caption: a row of a dataset to `pixel_values` `[3, R, R]` in [-1, 1]
    and `input_ids` `[L]`. The picture is resized, its proportions kept, until its shorter side is R; then cropped.

    Args:
        image_column (`str`)
        resolution (`int`): R.
        prompts ([`Prompts`], *optional*): `None` if only `pixel_values` are wanted.
        center_crop (`bool`): Take the middle instead of a random part.
        random_flip (`bool`): Mirror half the pictures.
        min_image_side (`int`, *optional*): Pictures with a shorter side are bad. Default: R.
    """

    image_column: str
    resolution: int
    prompts: Prompts | None
    center_crop: bool = False
    random_flip: bool = False
    min_image_side: int | None = None

    def __call__(self, row: dict, generator: random.Random) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixel_values(row, generator), "input_ids": self.prompts(row, generator)}

    def pixel_values(self, row: dict, generator: random.Random) -> torch.Tensor:
        """The picture alone, `[3, R, R]`."""
        min_side = self.resolution if self.min_image_side is None else self.min_image_side
        picture = _scaled_to(decode_image(row[self.image_column], min_side), self.resolution)
        crop = _crop(picture, self.resolution, None if self.center_crop else generator)
        if self.random_flip and generator.random() < 0.5:
            crop = crop.transpose(Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(crop)


class BadImages:
    """
    What happens to pictures that cannot be used.

    Args:
        action (`str`): `"skip"` warns and counts them, `"raise"` ends the run with the error.
        num_workers (`int`): Of the loader. Each counts in a slot of its own, in memory that all share.
    """

    def __init__(self, action: str = "skip", num_workers: int = 0):
        self.action = action
        self.counts = torch.zeros(max(1, num_workers), dtype=torch.long).share_memory_()

    def handle(self, error: Exception):
        """Count the picture (or shard), or raise the error."""
        if self.action == "raise":
            raise error
        logger.warning("Skipped: %s", error)
        self.counts[_reader()[0]] += 1

    def total(self, accelerator: Accelerator) -> int:
        """Pictures skipped by all processes so far, also those of batches not yet used; to be called by all."""
        return int(accelerator.reduce(self.counts.sum().to(accelerator.device)))


class SeededDataset(Dataset):
    """
    A dataset whose items depend on `(epoch, index)`, as [`EpochSampler`] yields them, and a seed only: not on the
    process, the worker, or on what was read before. A run that resumes reads what it would have read.

    Args:
        dataset (`datasets.Dataset`)
        transform: Makes an item from a row and a `random.Random`, such as [`RandomCrops`].
        seed (`int`)
        bad_images ([`BadImages`], *optional*): A skipped picture is replaced by the next one.
    """

    def __init__(self, dataset, transform: Callable, seed: int = 0, bad_images: BadImages | None = None):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.bad_images = bad_images or BadImages()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]):
        epoch, first = item
        for index in (*range(first, len(self)), *range(first)):
            try:
                return self.transform(self.dataset[index], random.Random(f"{self.seed} {epoch} {index}"))
            except BadImageError as error:
                self.bad_images.handle(error)
        raise ValueError(_NO_IMAGES)


class EpochSampler(Sampler):
    """
    Endless `(epoch, index)` of a dataset, each epoch in an order of its own that depends on seed and epoch only.

    Epochs follow each other without a gap: no picture is dropped to fill up batches.

    Args:
        length (`int`): Of the dataset.
        seed (`int`)
        start (`int`): Items to leave out at the beginning, those that a resumed run has seen.
        process_index, num_processes (`int`): Of the items, every `num_processes`-th is this process's.
    """

    def __init__(self, length: int, seed: int = 0, start: int = 0, process_index: int = 0, num_processes: int = 1):
        self.length = length
        self.seed = seed
        self.start = start
        self.process_index = process_index
        self.num_processes = num_processes

    def __iter__(self) -> Iterator[tuple[int, int]]:
        orders = {}
        for position in count(self.start + self.process_index, self.num_processes):
            epoch, place = divmod(position, self.length)
            if epoch not in orders:
                orders = {epoch: list(range(self.length))}
                random.Random(f"{self.seed} {epoch}").shuffle(orders[epoch])
            yield epoch, orders[epoch][place]


class SeededStream(IterableDataset):
    """
    Endless items of a streamed dataset, epoch after epoch, that can go on exactly where it was.

    The R readers (workers of all processes) share each epoch out among them. With at least R shards (files), reader r
    takes every R-th in an order that depends on seed and epoch; with fewer, it takes every R-th row of all. Rows are
    shuffled in blocks of `shuffle_buffer`, so that the position is known by three numbers and a block is read again
    after a restart: a rolling buffer could not be restored. What is left of a damaged shard is skipped like a damaged
    picture.

    Args:
        stream (`datasets.IterableDataset`)
        transform: Makes an item from a row and a `random.Random`, such as [`RandomCrops`].
        seed (`int`)
        shuffle_buffer (`int`): Rows, still encoded, that are shuffled among each other.
        bad_images ([`BadImages`], *optional*)
        process_index, num_processes (`int`): Of this process.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        transform: Callable,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        bad_images: BadImages | None = None,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.stream = stream
        self.transform = transform
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.bad_images = bad_images or BadImages()
        self.process_index = process_index
        self.num_processes = num_processes
        # Where the current block starts (epoch, place in this reader's order of the shards, row) and how many of its
        # rows have been used.
        self._position = {"epoch": 0, "shard": 0, "row": 0, "used": 0}
        self._skipped_in_block = 0

    def state_dict(self) -> dict:
        """Where this reader is, and how many pictures it has skipped."""
        worker, _ = _reader()
        # Shards skipped while the block was read will be met, and counted, again.
        skipped = int(self.bad_images.counts[worker]) - self._skipped_in_block
        return self._position | {"readers": self._readers()[1], "skipped": skipped}

    def load_state_dict(self, state: dict):
        """
        Go on from what `state_dict` returned in the same worker of the same process.

        Raises:
            ValueError: if the number of readers has changed.
        """
        state = copy.deepcopy(state)
        readers, skipped = state.pop("readers"), state.pop("skipped")
        if readers != self._readers()[1]:
            raise ValueError(
                f"The checkpoint is of a stream with {readers} readers, now there are {self._readers()[1]}: resume "
                "with as many processes and the same `--dataloader_num_workers`."
            )
        self._position = state
        self.bad_images.counts[_reader()[0]] = skipped

    def __iter__(self) -> Iterator:
        reader, _ = self._readers()
        found = self._position["used"] > 0
        while True:
            epoch = self._position["epoch"]
            rows = self._rows(epoch, self._position["shard"], self._position["row"])
            while block := self._next_block(rows):
                end = block[-1][0]
                generator = random.Random(f"{self.seed} {epoch} {reader} {end}")
                generator.shuffle(block)
                seeds = [generator.random() for _ in block]
                for place in range(self._position["used"], len(block)):
                    # Set before the item is handed out: the state then belongs to the item.
                    self._position["used"] = place + 1
                    item = self._item(block[place][1], random.Random(seeds[place]))
                    if item is not None:
                        found = True
                        yield item
                self._position = {"epoch": epoch, "shard": end[0], "row": end[1] + 1, "used": 0}
            if not found:
                raise ValueError(_NO_IMAGES)
            self._position = {"epoch": epoch + 1, "shard": 0, "row": 0, "used": 0}

    def _readers(self) -> tuple[int, int]:
        """This reader's number and how many there are."""
        worker, workers = _reader()
        return self.process_index * workers + worker, self.num_processes * workers

    def _rows(self, epoch: int, first_shard: int, first_row: int) -> Iterator[tuple[tuple[int, int], dict]]:
        """This reader's rows of an epoch, each behind its place: position in the order of the shards, and row."""
        reader, readers = self._readers()
        shards = list(range(self.stream.num_shards))
        random.Random(f"{self.seed} {epoch}").shuffle(shards)
        share_rows = len(shards) < readers
        mine = shards if share_rows else shards[reader::readers]
        for position in range(first_shard, len(mine)):
            start = first_row if position == first_shard else 0
            shard = self.stream.shard(self.stream.num_shards, mine[position])
            for number, row in self._shard_rows(shard.skip(start) if start else shard, mine[position], start):
                if not share_rows or number % readers == reader:
                    yield (position, number), row

    def _shard_rows(self, shard: datasets.IterableDataset, name: int, start: int) -> Iterator[tuple[int, dict]]:
        # `iter(batch_size)`, since the dataset's own iterator would share the shard out among the workers once more.
        batches = enumerate(shard.iter(batch_size=1), start)
        while True:
            try:
                number, batch = next(batches)
            except StopIteration:
                return
            except _SHARD_ERRORS as error:
                self.bad_images.handle(BadImageError(f"what is left of shard {name} of the dataset: {error}"))
                return
            yield number, {column: values[0] for column, values in batch.items()}

    def _next_block(self, rows: Iterator) -> list[tuple[tuple[int, int], dict]]:
        counts, (worker, _) = self.bad_images.counts, _reader()
        before = int(counts[worker])
        block = list(islice(rows, self.shuffle_buffer))
        self._skipped_in_block = int(counts[worker]) - before
        return block

    def _item(self, row: dict, generator: random.Random):
        try:
            return self.transform(row, generator)
        except BadImageError as error:
            self.bad_images.handle(error)
            return None


class StreamPosition:
    """
    Puts the positions of a streaming loader in all processes into accelerate's checkpoints.

    Args:
        loader (`StatefulDataLoader`): Of this process.
        accelerator (`Accelerator`)
    """

    def __init__(self, loader: StatefulDataLoader, accelerator: Accelerator):
        self.loader = loader
        self.accelerator = accelerator

    def state_dict(self) -> dict:
        """To be called by all processes."""
        return {"processes": gather_object([self.loader.state_dict()])}

    def load_state_dict(self, state: dict):
        states = state["processes"]
        if len(states) != self.accelerator.num_processes:
            raise ValueError(
                f"The checkpoint is of a stream in {len(states)} processes, but there are "
                f"{self.accelerator.num_processes} now: resume with as many."
            )
        self.loader.load_state_dict(states[self.accelerator.process_index])


def build_train_loader(
    dataset: datasets.Dataset | datasets.IterableDataset,
    transform: Callable,
    accelerator: Accelerator,
    batch_size: int,
    collate_fn: Callable | None = None,
    seed: int = 0,
    start: int = 0,
    shuffle_buffer: int = 1000,
    num_workers: int = 0,
    on_bad_image: str = "skip",
) -> DataLoader:
    """
    This process's endless loader; it needs no `accelerator.prepare`.

    The position of a stream is registered for the accelerator's checkpoints; that of other datasets is `start`.

    Args:
        dataset: What [`load_images`] returns.
        transform: Makes an item from a row and a `random.Random`, such as [`RandomCrops`].
        accelerator (`Accelerator`)
        batch_size (`int`): Items per process and batch.
        collate_fn (*optional*): Makes a batch of items. Default: torch's.
        seed (`int`)
        start (`int`): Items of all processes together that a resumed run has seen.
        shuffle_buffer (`int`): Rows of a stream that are shuffled among each other.
        num_workers (`int`)
        on_bad_image (`str`): See [`BadImages`].
    """
    place = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    bad_images = BadImages(on_bad_image, num_workers)
    source, sampler = _seeded(dataset, transform, seed, shuffle_buffer, start, bad_images, **place)
    options = {
        "batch_size": batch_size,
        "collate_fn": collate_fn,
        "num_workers": num_workers,
        "pin_memory": accelerator.device.type == "cuda",
        # torch draws the workers' seeds from it; from the global generator, a resumed run would draw once more.
        "generator": torch.Generator(),
    }
    if isinstance(source, SeededDataset):
        return DataLoader(source, sampler=sampler, **options)
    loader = StatefulDataLoader(source, **options)
    accelerator.register_for_checkpointing(StreamPosition(loader, accelerator))
    return loader


def change_data(loader: DataLoader, dataset, transform: Callable, start: int):
    """
    Let the next iterator of a loader go on with another transform: of a stream at the same place, of other datasets
    (which may be exchanged, too) at `start`.

    Args:
        loader: What [`build_train_loader`] returned.
        dataset, transform, start: See there.
    """
    loader.dataset.transform = transform
    if isinstance(loader, StatefulDataLoader):
        loader.load_state_dict(loader.state_dict())
        return
    loader.dataset.dataset = dataset
    loader.sampler.length, loader.sampler.start = len(dataset), start


def first_batches(
    dataset: datasets.Dataset | datasets.IterableDataset,
    transform: Callable,
    batch_size: int,
    collate_fn: Callable | None = None,
    seed: int = 0,
    shuffle_buffer: int = 1000,
) -> DataLoader:
    """What a run in one process begins with, the same in every process; for starts that are fitted to the data."""
    source, sampler = _seeded(dataset, transform, seed, shuffle_buffer)
    return DataLoader(source, batch_size, sampler=sampler, collate_fn=collate_fn)


def _seeded(dataset, transform, seed, shuffle_buffer, start=0, bad_images=None, process_index=0, num_processes=1):
    """The samples of a dataset or stream, and the order to read them in."""
    if isinstance(dataset, datasets.IterableDataset):
        stream = SeededStream(dataset, transform, seed, shuffle_buffer, bad_images, process_index, num_processes)
        return stream, None
    sampler = EpochSampler(len(dataset), seed, start, process_index, num_processes)
    return SeededDataset(dataset, transform, seed, bad_images), sampler


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


_NO_IMAGES = "The dataset has no picture that can be used: all are damaged or smaller than `--min_image_side`."


def _reader() -> tuple[int, int]:
    """Number of this worker in its process, and how many there are."""
    worker = get_worker_info()
    return (0, 1) if worker is None else (worker.id, worker.num_workers)


def _crop(picture: PIL.Image.Image, side: int, generator: random.Random | None = None) -> PIL.Image.Image:
    """A square part at a random place, or the middle."""
    spare = [length - side for length in picture.size]
    left, top = (length // 2 if generator is None else generator.randint(0, length) for length in spare)
    return picture.crop((left, top, left + side, top + side))


def _at_least(picture: PIL.Image.Image, side: int) -> PIL.Image.Image:
    return picture if min(picture.size) >= side else _scaled_to(picture, side)


def _scaled_to(picture: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """The picture with `side` as its shorter side."""
    scale = side / min(picture.size)
    return picture.resize([max(side, round(length * scale)) for length in picture.size], reducing_gap=3.0)
