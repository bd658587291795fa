"""What pictures are generated from: captions and classes of a dataset's rows, as a denoiser takes them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch


# Arrow's, of a column of classes.
_LABEL_TYPES = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_LABEL_TYPES |= {"bool", "string", "large_string"}

# ImageNet-21k has 21,841. A label of 10^9 would be a table of as many names, and of embeddings.
_MOST_CLASSES = 100_000


def caption_texts(value: str | list | None, column: str) -> list[str]:
    """
    The captions of a row: those of a list, or the one that it has; `None` is none.

    Raises:
        ValueError: if one is not a text; the message names the column.
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
        return torch.tensor(int(label))  # a column of True and False is one of 1 and 0


def class_names(
    dataset: datasets.Dataset | datasets.IterableDataset, label_column: str, names_file: str | None = None
) -> list[str]:
    """
    The names of a dataset's classes; label i is the i-th.

    Args:
        dataset: What [`~diffusers_pq.data.pictures.PictureSource.load`] returns.
        label_column (`str`): Of type `ClassLabel`, or of strings or whole numbers.
        names_file (`str`, *optional*): A text file with a name in each line. Default: the names of a `ClassLabel`; or
            the column's strings in alphabetical order; or the numbers up to its largest.

    Raises:
        ValueError: if the file cannot be read, or names a class twice while the column may hold names; if a stream's
            column does not say what classes there are; or if labels are negative or absurdly large.
    """
    feature = dataset.features[label_column]
    dtype = getattr(feature, "dtype", "list")
    if not (isinstance(feature, datasets.ClassLabel) or dtype in _LABEL_TYPES):
        raise ValueError(
            f"Classes must be whole numbers or strings, but the column {label_column!r} holds {dtype}: name another "
            "one with `--label_column`, or cast it."
        )
    if names_file is not None:
        names = _read_names(names_file)
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
        if values and not 0 <= min(values) <= max(values) < _MOST_CLASSES:
            raise ValueError(
                f"The labels in the column {label_column!r} range from {min(values)} to {max(values)}, but must lie "
                f"in 0 ... {_MOST_CLASSES - 1}: renumber them, or cast the column to strings."
            )
        return [str(label) for label in range(max(values) + 1)]
    return sorted(values)


def _read_names(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`--class_names_file` {path} cannot be read as text in UTF-8: {error}") from error


def check_condition_column(dataset: datasets.Dataset, column: str):
    """Raise a `ValueError` if a column can hold neither captions, as texts or lists of texts, nor classes."""
    feature = dataset.features[column]
    kind = getattr(getattr(feature, "feature", feature), "dtype", None)
    if kind not in _LABEL_TYPES | {"null"}:
        raise ValueError(
            f"The column {column!r} must hold captions (texts, or lists of texts) or classes (whole numbers or "
            f"strings), but holds {feature}."
        )
