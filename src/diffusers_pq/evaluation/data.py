"""The pictures of an evaluation, and the protocols by which others measure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from ..data.fingerprints import fingerprint_files, fingerprint_rows
from ..data.pictures import PictureSource, decode_image
from ..images import to_tensor


RESIZE_MODES = ("short_side", "stretch")
PROTOCOLS = {
    "paper": {
        "split": "validation",
        "resize_mode": "stretch",
        "image_interpolation_mode": "bilinear",
        "as_authors": True,
    }
}
"""How others measure: settings by the protocol's name."""


def resize_mode(name: str) -> str:
    """The name of a resize mode; `"crop"` is what an earlier version called `"short_side"`."""
    return "short_side" if name == "crop" else name


@dataclass(frozen=True)
class EvaluationData:
    """
    The pictures to evaluate on, made square.

    Args:
        dataset_name (`str`, *optional*): A Hub dataset or a local dataset folder (parquet files, say).
        data_dir (`str`, *optional*): A folder in the `imagefolder` layout; exclusive with `dataset_name`.
        dataset_config_name (`str`, *optional*)
        split (`str`): `"validation"`, `"test"`, ...
        image_column (`str`): The column that holds the pictures.
        resolution (`int`): Side of the squares, in pixels. `None`, with generated pictures only, is theirs.
        resize_mode (`str`): `"short_side"` resizes the short side and takes the centre; `"stretch"` resizes whole
            pictures, whose proportions change, as the paper's authors do.
        image_interpolation_mode (`str`): Filter of the resizing, antialiased.
        max_samples (`int`, *optional*): Only the first pictures; default: all.

    Raises:
        ValueError: if neither or both sources are given, or the `resize_mode` is unknown.
    """

    dataset_name: str | None = None
    data_dir: str | None = None
    dataset_config_name: str | None = None
    split: str = "validation"
    image_column: str = "image"
    resolution: int | None = 256
    resize_mode: str = "short_side"
    image_interpolation_mode: str = "bicubic"
    max_samples: int | None = None

    def __post_init__(self):
        if (self.dataset_name is None) == (self.data_dir is None):
            raise ValueError("Give exactly one of `--dataset_name` and `--data_dir`.")
        object.__setattr__(self, "resize_mode", resize_mode(self.resize_mode))
        if self.resize_mode not in RESIZE_MODES:
            raise ValueError(f"`--resize_mode` must be one of {', '.join(RESIZE_MODES)}, but is {self.resize_mode!r}.")

    @classmethod
    def of(cls, settings: dict) -> "EvaluationData":
        """The data in the settings of an evaluation, as its `results.json` holds them."""
        return cls(**{name: value for name, value in settings.items() if name in DATA_DEFAULTS})

    @property
    def name(self) -> str:
        """The dataset's name or folder without what precedes the last slash."""
        return Path(self.dataset_name or self.data_dir).name

    @property
    def source(self) -> PictureSource:
        """Where the pictures come from."""
        return PictureSource(self.dataset_name, self.data_dir, self.image_column, self.dataset_config_name)

    def rows(
        self, streaming: bool = False, cache_dir: str | None = None, other_columns: Sequence[str] = ()
    ) -> datasets.Dataset | datasets.IterableDataset:
        """
        The pictures, left encoded, with further columns.

        Raises:
            ValueError: if the split or a column does not exist.
        """
        dataset = replace(self.source, cache_dir=cache_dir, streaming=streaming).load(self.split, *other_columns)
        if dataset is None:
            raise ValueError(f"`--split` is {self.split!r}, but {self.name} has no such split.")
        if self.max_samples is not None:
            dataset = dataset.take(self.max_samples if streaming else min(self.max_samples, len(dataset)))
        return dataset

    def fingerprint(
        self, streaming: bool = False, cache_dir: str | None = None, other_columns: tuple[str, ...] = ()
    ) -> dict[str, str]:
        """
        What tells these pictures from others of the same name: `rows_sha256`, or `files_sha256` of a stream of shards,
        as [`~diffusers_pq.data.fingerprints`] makes them.
        """
        if not streaming or self.source.folder is not None:
            return {"rows_sha256": fingerprint_rows(self.rows(False, cache_dir, other_columns))}
        builder = datasets.load_dataset_builder(self.dataset_name, self.dataset_config_name, cache_dir=cache_dir)
        return {"files_sha256": fingerprint_files((builder.config.data_files or {}).get(self.split, ()))}

    def loader(
        self,
        batch_size: int,
        num_workers: int = 0,
        streaming: bool = False,
        cache_dir: str | None = None,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> DataLoader:
        """
        A loader of one process's share of the pictures, as `[B, 3, R, R]` in [-1, 1]; the shares of all processes
        hold every picture once. The last batch may be smaller.

        Raises:
            ValueError: if the split or the column does not exist; while loading, if a picture is damaged.
        """
        dataset = self.rows(streaming, cache_dir)
        strategy = "auto"
        if streaming and self.max_samples is not None:
            # Otherwise the first pictures of each shard would be taken, and more shares mean other pictures.
            strategy, num_workers = "examples", min(num_workers, 1)
        return DataLoader(
            split_dataset_by_node(dataset, process_index, num_processes, strategy),
            batch_size=batch_size,
            collate_fn=partial(_squares, self),
            num_workers=num_workers,
        )


DATA_DEFAULTS = {field.name: field.default for field in fields(EvaluationData)}
"""The settings of [`EvaluationData`] by name, with their defaults."""


def _squares(data: EvaluationData, rows: list[dict]) -> torch.Tensor:
    side = data.resolution if data.resize_mode == "short_side" else (data.resolution, data.resolution)
    resize = Resize(side, InterpolationMode(data.image_interpolation_mode))
    square = Compose([resize, CenterCrop(data.resolution), to_tensor])
    return torch.stack([square(decode_image(row[data.image_column])) for row in rows])


def protocol_of(settings: dict) -> str | None:
    """The name of the protocol that an evaluation's settings follow, if they follow one."""
    return next((name for name, values in PROTOCOLS.items() if values.items() <= settings.items()), None)


def data_flags(settings: dict) -> dict[str, str | int]:
    """The flags, by name, of an evaluation's data and protocol that differ from their defaults."""
    data = asdict(EvaluationData.of(settings))
    protocol = protocol_of(settings)
    flags = {name: data[name] for name, default in DATA_DEFAULTS.items() if data[name] != default}
    if protocol is None:
        return flags
    return {"protocol": protocol} | {name: flag for name, flag in flags.items() if name not in PROTOCOLS[protocol]}
