"""The code of models, written beside them: by it diffusers loads them without this package."""

import os
from pathlib import Path

import diffusers_pq

from ..files import read_json, write_json, write_text
from ..models.auto_class import CODE_FILE, AutoModelMixin


def write_code(folder: str | os.PathLike) -> list[Path]:
    """
    Bring the code of the models of this package in a folder, and in the sub-folders of a pipeline, up to date.

    `save_pretrained` writes the same; what was saved by an earlier version, or had its code removed, gets it here.

    Args:
        folder (`str` or `os.PathLike`): Of a model or a pipeline. An `auto_map` that is missing in a `config.json` is
            added.

    Returns:
        `list[Path]`: The files of code.

    Raises:
        NotADirectoryError: if there is no such folder.
        ValueError: if it holds no model of this package.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"No such folder: {folder}")
    written = write_present_code(folder)
    if not written:
        raise ValueError(f"{folder} holds no config.json of a model of diffusers_pq, nor does a folder in it.")
    return written


def write_present_code(folder: Path) -> list[Path]:
    """[`write_code`], also where there may be no model of this package."""
    written = []
    for config_file in sorted([*folder.glob("config.json"), *folder.glob("*/config.json")]):
        config = read_json(config_file, dict)
        model_class = getattr(diffusers_pq, str(config.get("_class_name")), None)
        if not (isinstance(model_class, type) and issubclass(model_class, AutoModelMixin)):
            continue
        auto_map = {"AutoModel": f"{Path(CODE_FILE).stem}.{model_class.__name__}"}
        if config.get("auto_map") != auto_map:
            write_json(config_file, config | {"auto_map": auto_map})
        path = config_file.with_name(CODE_FILE)
        write_text(path, model_class.code())
        written.append(path)
    return written
