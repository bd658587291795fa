"""Endless training batches of a dataset or a stream that can go on exactly where they were."""

import copy
import logging
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice

import datasets
import pyarrow
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from .pictures import NO_USABLE_PICTURE, BadImageError


logger = logging.getLogger(__name__)

# What reading a damaged shard raises, with parquet files and tars respectively.
_SHARD_ERRORS = (OSError, EOFError, pyarrow.ArrowException, tarfile.TarError)
# Of these the operating system's that say nothing about the file.
_NOT_DAMAGE = (ConnectionError, TimeoutError, PermissionError)


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
        transform: Makes an item from a row and a `random.Random`, such as [`Crops`].
        seed (`int`)
        bad_images ([`BadImages`], *optional*): A skipped picture is replaced by the next one (of its group).
        groups (`Sequence[int | None]`, *optional*): See [`GroupBatchSampler`].
    """

    def __init__(
        self,
        dataset,
        transform: Callable,
        seed: int = 0,
        bad_images: BadImages | None = None,
        groups: Sequence[int | None] | None = None,
    ):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.bad_images = bad_images or BadImages()
        self.groups = groups

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]):
        epoch, first = item
        for index in (*range(first, len(self)), *range(first)):
            if self.groups is not None and self.groups[index] != self.groups[first]:
                continue
            try:
                return self.transform(self.dataset[index], random.Random(f"{self.seed} {epoch} {index}"))
            except BadImageError as error:
                self.bad_images.handle(error)
                last = error
        raise ValueError(f"{NO_USABLE_PICTURE}{last}.")


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


class GroupBatchSampler(Sampler):
    """
    Endless batches of `(epoch, index)` of a dataset, each of one group: of pictures of one size, that is.

    The order of the items is that of [`EpochSampler`]. Those of a group wait until they fill a batch, across epochs
    too, so that none is dropped.

    Args:
        groups (`Sequence[int | None]`): Of each item; those of `None` are left out.
        batch_size (`int`)
        seed (`int`)
        start (`int`): Items to leave out at the beginning, a multiple of `batch_size`.
        process_index, num_processes (`int`): Of the batches, every `num_processes`-th is this process's.

    Raises:
        ValueError: if all items are left out.
    """

    def __init__(
        self,
        groups: Sequence[int | None],
        batch_size: int,
        seed: int = 0,
        start: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        if all(group is None for group in groups):
            raise ValueError(f"{NO_USABLE_PICTURE}see the warnings above.")
        self.groups = groups
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.process_index = process_index
        self.num_processes = num_processes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return islice(self._batches(), self.start // self.batch_size + self.process_index, None, self.num_processes)

    def _batches(self):
        waiting = {group: [] for group in self.groups}
        for epoch, index in EpochSampler(len(self.groups), self.seed):
            group = self.groups[index]
            if group is None:
                continue
            waiting[group].append((epoch, index))
            if len(waiting[group]) == self.batch_size:
                yield waiting[group]
                waiting[group] = []


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
        transform: Makes an item from a row and a `random.Random`, such as [`Crops`].
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
        self._last_error = "there is none"

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
        found = self._position != {"epoch": self._position["epoch"], "shard": 0, "row": 0, "used": 0}
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
                raise ValueError(f"{NO_USABLE_PICTURE}{self._last_error}.")
            found = False
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
            except _NOT_DAMAGE:
                raise
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
            self._last_error = error
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
    prefetch_factor: int | None = None,
    groups: Sequence[int | None] | None = None,
) -> DataLoader:
    """
    This process's endless loader; it needs no `accelerator.prepare`.

    The position of a stream is registered for the accelerator's checkpoints; that of other datasets is `start`.

    Args:
        dataset: What [`PictureSource.load`] returns.
        transform: Makes an item from a row and a `random.Random`, such as [`Crops`].
        accelerator (`Accelerator`)
        batch_size (`int`): Items per process and batch.
        collate_fn (*optional*): Makes a batch of items. Default: torch's.
        seed (`int`)
        start (`int`): Items of all processes together that a resumed run has seen.
        shuffle_buffer (`int`): Rows of a stream that are shuffled among each other.
        num_workers (`int`)
        on_bad_image (`str`): See [`BadImages`].
        prefetch_factor (`int`, *optional*): Batches that each worker reads ahead. Default: torch's.
        groups (`Sequence[int | None]`, *optional*): Of the rows of a dataset that is not a stream; see
            [`GroupBatchSampler`].
    """
    place = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    bad_images = BadImages(on_bad_image, num_workers)
    options = {
        "collate_fn": collate_fn,
        "num_workers": num_workers,
        "prefetch_factor": prefetch_factor,
        "pin_memory": accelerator.device.type == "cuda",
        # torch draws the workers' seeds from it; from the global generator, a resumed run would draw once more.
        "generator": torch.Generator(),
    }
    if groups is not None:
        batches = GroupBatchSampler(groups, batch_size, seed, start, **place)
        return DataLoader(
            SeededDataset(dataset, transform, seed, bad_images, groups), batch_sampler=batches, **options
        )
    source, sampler = _seeded(dataset, transform, seed, shuffle_buffer, start, bad_images, **place)
    if isinstance(source, SeededDataset):
        return DataLoader(source, batch_size, sampler=sampler, **options)
    loader = StatefulDataLoader(source, batch_size, **options)
    accelerator.register_for_checkpointing(StreamPosition(loader, accelerator))
    return loader


def change_data(
    loader: DataLoader, dataset, transform: Callable, start: int, groups: Sequence[int | None] | None = None
):
    """
    Let the next iterator of a loader go on with another transform: of a stream at the same place, of other datasets
    (which may be exchanged, too) at `start`.

    Args:
        loader: What [`build_train_loader`] returned.
        dataset, transform, start, groups: See there; there are groups if there were some before.
    """
    loader.dataset.transform = transform
    if isinstance(loader, StatefulDataLoader):
        loader.load_state_dict(loader.state_dict())
        return
    loader.dataset.dataset, loader.dataset.groups = dataset, groups
    if groups is not None:
        loader.batch_sampler.groups, loader.batch_sampler.start = groups, start
    else:
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


def _reader() -> tuple[int, int]:
    """Number of this worker in its process, and how many there are."""
    worker = get_worker_info()
    return (0, 1) if worker is None else (worker.id, worker.num_workers)
