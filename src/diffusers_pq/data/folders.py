"""A folder of pictures, read whole: its splits, captions and classes."""

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import datasets
import PIL.Image


logger = logging.getLogger(__name__)
_log_once = cache(logger.log)  # a folder is loaded for each split, and more than once

# Folders at the top that are splits; whatever lies elsewhere is for training. Nothing else in a name is a split: a
# class may be called `train`, a picture `test.jpg`.
_SPLIT_FOLDERS = {"validation": "validation", "val": "validation", "valid": "validation", "test": "test"}
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Of datasets that are not folders of pictures, even where they include a picture.
_OTHER_DATA = {".parquet", ".arrow", ".tar"}


@dataclass(frozen=True)
class PictureFolder:
    """
    The files below a folder, by absolute path, in the order of the paths as strings. Links are followed; names that
    begin with a dot or two underscores are passed over.

    Args:
        path (`str` or `os.PathLike`)

    Raises:
        FileNotFoundError: if there is no such folder.
    """

    path: str | os.PathLike

    def __post_init__(self):
        if not Path(self.path).is_dir():
            raise FileNotFoundError(f"The folder of pictures {self.path} does not exist.")

    @cached_property
    def files(self) -> list[str]:
        return sorted(_walk(os.path.abspath(self.path), ()))

    @cached_property
    def pictures(self) -> list[str]:
        """Files that Pillow can open, going by their suffixes."""
        PIL.Image.init()
        suffixes = {suffix for suffix, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN}
        return [file for file in self.files if _suffix(file) in suffixes]

    @property
    def metadata(self) -> list[str]:
        """Files that say something of the pictures beside and below them."""
        return [file for file in self.files if os.path.basename(file) in _METADATA and os.path.getsize(file)]

    @property
    def archives(self) -> list[str]:
        return [file for file in self.files if _suffix(file) == ".zip"]

    def split_of(self, file: str) -> str:
        """The split of a file's path: that of its folder (or archive) at the top, or else `"train"`."""
        top, _, below = os.path.relpath(file, os.path.abspath(self.path)).partition(os.sep)
        name = top if below else top.removesuffix(".zip")
        return _SPLIT_FOLDERS.get(name, "train") if below or name != top else "train"

    def is_dataset_of_pictures(self) -> bool:
        """Whether this is neither another kind of dataset nor a copy of a repository, whose card names its splits."""
        others = any(_suffix(file) in _OTHER_DATA for file in set(self.files) - set(self.metadata))
        return bool(self.pictures) and not others and not Path(self.path, "README.md").is_file()

    def load(
        self, split: str, image_column: str = "image", needs_metadata: bool = False, cache_dir: str | None = None
    ) -> datasets.Dataset | None:
        """
        The rows of a split: pictures with what the metadata files say of them, or with a `label` that is the name of
        their folder where all lie equally deep in several folders.

        Args:
            split (`str`): `"train"`, `"validation"` or `"test"`.
            image_column (`str`): The column that holds the pictures.
            needs_metadata (`bool`): Leave out the pictures that no metadata file lists. They are counted in the log;
                without it, they follow behind those that are listed.
            cache_dir (`str`, *optional*): Of `datasets`.

        Returns:
            `datasets.Dataset`, or `None` if the folder has no such split. Pictures are paths, not yet decoded.

        Raises:
            FileNotFoundError: if there are no pictures in the whole folder.
        """
        if not self.pictures and not self.archives:
            raise FileNotFoundError(f"The folder {self.path} holds no pictures.")
        if self.archives:
            return self._with_archives(split, cache_dir)
        pictures = [picture for picture in self.pictures if self.split_of(picture) == split]
        if not self.metadata:
            dataset = self._without_metadata(pictures)
        else:
            dataset = self._with_metadata(pictures, split, image_column, needs_metadata, cache_dir)
        others = Counter(_suffix(file) for file in set(self.files) - {*self.pictures, *self.metadata})
        _log_once(
            logging.INFO,
            "%s: %d pictures in the split %r. Files of other kinds, not read: %s.",
            self.path,
            len(dataset),
            split,
            ", ".join(f"{number} {suffix}" for suffix, number in others.most_common()) or "none",
        )
        return dataset if len(dataset) else None

    def _without_metadata(self, pictures: list[str]) -> datasets.Dataset:
        rows, features = {"image": pictures}, datasets.Features({"image": datasets.Image()})
        if names := self._class_names():
            features["label"] = datasets.ClassLabel(names=names)
            rows["label"] = [os.path.basename(os.path.dirname(picture)) for picture in pictures]
        return datasets.Dataset.from_dict(rows, features=features)

    def _class_names(self) -> list[str]:
        """The names of the folders that hold the pictures, if they can be classes."""
        folders = {os.path.dirname(picture) for picture in self.pictures}
        splits = {os.path.join(os.path.abspath(self.path), name) for name in ("train", *_SPLIT_FOLDERS)}
        equally_deep = len({folder.count(os.sep) for folder in folders}) == 1
        names = sorted({os.path.basename(folder) for folder in folders})
        return names if len(names) > 1 and equally_deep and not folders <= splits else []

    def _with_metadata(self, pictures, split, image_column, needs_metadata, cache_dir) -> datasets.Dataset:
        # A part for each file: within a part, the order of files would change from process to process. They are read
        # for all splits, since one at the top may list the pictures of several.
        files = {f"part{number:06d}": [glob.escape(file)] for number, file in enumerate(self.metadata)}
        parts = _read_metadata(files, cache_dir)
        rows = datasets.concatenate_datasets([parts[name] for name in files if name in parts])
        if image_column not in rows.column_names:
            return rows
        images = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        paths = [value["path"] if value else None for value in images[image_column]]
        rows = rows.select([n for n, path in enumerate(paths) if (self.split_of(path) if path else "train") == split])
        self._warn_of_absent(set(paths) - {None})
        unlisted = sorted(set(pictures) - set(paths))
        if not unlisted:
            return rows
        if needs_metadata:
            number, names = len(unlisted), ", ".join(os.path.basename(path) for path in unlisted[:3])
            message = "%s: not read, since no metadata file lists them: %d pictures, %s, ..."
            _log_once(logging.WARNING, message, self.path, number, names)
            return rows
        rows = rows.select_columns([image_column])
        rest = datasets.Dataset.from_dict({image_column: unlisted}, features=rows.features)
        return datasets.concatenate_datasets([rows, rest])

    def _warn_of_absent(self, listed: set[str]):
        absent = sorted(os.path.relpath(path, os.path.abspath(self.path)) for path in listed - set(self.files))
        if absent:
            names = ", ".join(absent[:3])
            _log_once(
                logging.WARNING, "%s: listed, but not there: %d pictures, %s, ...", self.path, len(absent), names
            )

    def _with_archives(self, split, cache_dir) -> datasets.Dataset | None:
        files = {}
        for file in self.files:
            files.setdefault(self.split_of(file), []).append(glob.escape(file))
        return datasets.load_dataset("imagefolder", data_files=files, cache_dir=cache_dir).get(split)


def _read_metadata(files: dict[str, list[str]], cache_dir: str | None) -> datasets.DatasetDict:
    """The rows of metadata files with their pictures; a `ValueError` names the first that cannot be read."""
    try:
        return datasets.load_dataset("imagefolder", data_files=files, cache_dir=cache_dir)
    except Exception as error:  # anything, of a damaged file
        if len(files) > 1:
            for name, file in files.items():
                _read_metadata({name: file}, cache_dir)
        (file,) = next(iter(files.values()))
        reason = "it has no rows" if isinstance(error, IndexError) else error.__cause__ or error
        raise ValueError(f"{file} cannot be read as metadata of pictures: {reason}") from error


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it lies in
        return
    for entry in os.scandir(folder):
        if entry.name.startswith((".", "__")):
            continue
        if entry.is_dir():
            yield from _walk(entry.path, (*above, real))
        # A link that leads nowhere is a bad picture, which is counted.
        elif entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
            yield entry.path


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()
