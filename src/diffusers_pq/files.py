"""Files that are written whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """
    Gives a path to write to, with the same suffix in the same folder, which is made if need be; what was written there
    takes the place of `path` if no error is raised.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{path.name}")
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
