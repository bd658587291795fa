"""Files that are written whole or not at all."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import get_session, httpx


_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")  # on the Hub


def check_output(path: str | os.PathLike, *inputs: str | os.PathLike):
    """
    Raise a `ValueError` unless a file can be written there without harm: `path` must be a new name or a regular file,
    since anything else, such as a device or a link, would be replaced by the file; and none of the `inputs`.
    """
    path = Path(path)
    if path.is_symlink():
        raise ValueError(f"The output {path} is a link, which would be replaced: name the file it leads to.")
    if not path.exists():
        check_output_folder(path.parent)
        return
    if path.is_dir():
        raise ValueError(f"The output {path} is a folder: name a file.")
    if not path.is_file():
        raise ValueError(f"The output {path} is not a regular file, and would be replaced: name another one.")
    if any(os.path.exists(other) and path.samefile(other) for other in inputs):
        raise ValueError(f"The output {path} is the input, which would be overwritten: name another file.")


def check_output_folder(path: str | os.PathLike):
    """Raise a `ValueError` if a folder is neither there nor can be made, since a part of its path is a file."""
    found = next(part for part in (Path(path), *Path(path).parents) if part.exists())
    if not found.is_dir():
        raise ValueError(f"The output folder {path} cannot be made, since {found} is a file: name another folder.")


def check_new(path: str | os.PathLike):
    """Raise a `FileExistsError` if there is something at the path already."""
    if Path(path).exists():
        raise FileExistsError(f"{path} exists already: choose another folder or remove it.")


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """
    Gives a path to write to, with the same suffix in the same folder, which is made if need be; what was written there
    takes the place of `path` if no error is raised.

    Raises:
        ValueError: if `path` is there, but no regular file; see [`check_output`].
    """
    path = Path(path)
    check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{path.name}")
    unfinished.unlink(missing_ok=True)  # a link there would be written through
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str):
    """Write a UTF-8 file as [`replacing`] does."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value):
    """Write a JSON file as [`replacing`] does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | os.PathLike, kind: type = object) -> Any:
    """
    The content of a JSON file.

    Args:
        path (`str` or `os.PathLike`)
        kind (`type`): What it must be, such as `dict`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else; both messages name it.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing.") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder: name a JSON file.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} must hold a JSON {kind.__name__}, but holds a {type(value).__name__}.")
    return value


@contextmanager
def naming(config: str | os.PathLike) -> Iterator[None]:
    """
    Around what makes a network of a configuration: a `ValueError` names that, in place of what a number raises that is
    a text, is negative or does not divide another.
    """
    try:
        yield
    except (OSError, MemoryError):  # says nothing about the configuration
        raise
    except Exception as error:
        raise ValueError(f"{config}: {error}") from error


@contextmanager
def folder_or_hub(source: str | os.PathLike) -> Iterator[None]:
    """
    Around what loads from a folder or, if there is none of that name, from the Hub: from its cache alone while it
    cannot be reached.

    Raises:
        FileNotFoundError: if there is no such folder, and the name can be none on the Hub or an `OSError` is raised
            within; says so first.
        ValueError: if a configuration in the folder is no JSON object; the message names the file.
    """
    if str(source) and Path(source).exists():
        _check_configs(Path(source))
        yield
        return
    if not _REPOSITORY.fullmatch(str(source)):
        raise FileNotFoundError(f"The folder {source} does not exist.")
    try:
        with hub_tried_once():
            yield
    except OSError as error:
        raise FileNotFoundError(
            f"The folder {source} does not exist, and no such repository could be loaded from the Hub: {error}"
        ) from error


@contextmanager
def hub_tried_once() -> Iterator[None]:
    """Around what loads from the Hub: from its cache alone while it cannot be reached."""
    is_offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = is_offline or not hub_is_reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = is_offline


def _check_configs(folder: Path):
    """diffusers passes on what it reads, and fails far away if it is a list or a number."""
    for name in ("config.json", "model_index.json", "scheduler_config.json"):
        for path in (folder / name, *folder.glob(f"*/{name}")):
            if path.is_file():
                read_json(path, dict)


def hub_is_reachable() -> bool:
    """Whether the Hub answers at once. Its client tries each file of a model six times, half a minute in all."""
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except (OSError, httpx.TransportError):
        return False
    return True
