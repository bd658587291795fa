"""Training checkpoints: folders `checkpoint-<step>` that exist either whole or not at all."""

import hashlib
import json
import logging
import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, load, patch_environment

from ..files import read_json, write_json


logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_RECORD = "run.json"
_PICKLES = (".bin", ".pkl", ".pt")
_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(output_dir: str) -> list[Path]:
    """The checkpoints in a folder, oldest first; unfinished ones carry another name and are not listed."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The number of optimisation steps a checkpoint was written after."""
    return int(_NAME.fullmatch(path.name).group(1))


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str,
    step: int,
    total_limit: int | None,
    record: dict[str, Any] | None = None,
):
    """
    Write `checkpoint-<step>` under another name, rename it when complete, and drop the oldest beyond the limit. To be
    called by all processes.

    Args:
        accelerator (`Accelerator`): With models, optimisers, schedulers and what is registered for checkpoints.
        output_dir (`str`): Of the run.
        step (`int`): Optimisation steps so far.
        total_limit (`int`, *optional*): So many checkpoints are kept; `None` keeps all.
        record (`dict`, *optional*): What [`read_record`] returns.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    unfinished = Path(output_dir) / f"unfinished-{final.name}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    write_json(unfinished / _RECORD, record or {})
    _write_manifest(unfinished)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(unfinished, final)
    older = [path for path in list_checkpoints(output_dir) if checkpoint_step(path) <= step]
    for path in older[:-total_limit] if total_limit else []:
        shutil.rmtree(path)


def load_checkpoint(accelerator: Accelerator, checkpoint: Path):
    """
    Load what [`save_checkpoint`] wrote. To be called by all processes.

    Pickles are read with `weights_only=True`, so that no code in them runs, but for the folders of DeepSpeed and of
    FSDP with sharded state dicts, which hold more than data.

    Raises:
        ValueError: if a pickle holds more than data, or the checkpoint is of other models or states.
    """
    for path in sorted(checkpoint.iterdir()):
        if path.suffix in _PICKLES:
            _check_pickle(path)
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    try:
        # Without it, accelerate reads `custom_checkpoint_*.pkl` as any pickle.
        with nullcontext() if is_deepspeed else patch_environment(torch_force_weights_only_load="1"):
            accelerator.load_state(str(checkpoint))
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{checkpoint} is not of a run like this one: give the flags it was trained with, or start anew with "
            f"`--resume_from_checkpoint none`. ({error})"
        ) from error


def read_record(checkpoint: Path) -> dict[str, Any]:
    """What is known of the run that wrote a checkpoint; empty if it is of an earlier version."""
    return read_json(checkpoint / _RECORD, dict) if (checkpoint / _RECORD).is_file() else {}


def _check_pickle(path: Path):
    # Beforehand, since accelerate passes over random states that it cannot read.
    try:
        load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(
            f"{path} is not read: it may hold code beside data, or is damaged. Resume from another checkpoint."
        ) from error


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files: missing, of another size or content than written; `None` if nothing."""
    try:
        digests = read_json(checkpoint / _MANIFEST, dict)
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (OSError, ValueError):
        return f"{_MANIFEST} cannot be read"
    if not digests:
        return f"{_MANIFEST} lists no files"
    for name, digest in digests.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if _digest(checkpoint / name) != digest:
            return f"{name} is not what was written"
    return None


def _write_manifest(folder: Path):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {str(path.relative_to(folder)): _digest(path) for path in files}
    (folder / _MANIFEST).write_text(json.dumps(digests, indent=2) + "\n")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def find_checkpoint(output_dir: str, resume_from: str | None) -> Path | None:
    """
    The checkpoint to resume from. `"latest"` passes over damaged ones, with a warning.

    Args:
        output_dir (`str`): Where the run writes.
        resume_from (`str`, *optional*): `"latest"`, the name of a checkpoint in `output_dir`, a path, or `"none"`.

    Returns:
        `Path`, or `None` if nothing was asked for or `"latest"` found none.

    Raises:
        FileNotFoundError: if a named checkpoint does not exist; the message lists those that do.
        ValueError: if a named checkpoint is damaged.
    """
    if resume_from in (None, "none"):
        return None
    existing = list_checkpoints(output_dir)
    if resume_from == "latest":
        return _newest_whole(existing, output_dir)
    for path in (Path(output_dir) / resume_from, Path(resume_from)):
        if path.is_dir() and _NAME.fullmatch(path.name):
            damage = find_damage(path)
            if damage:
                raise ValueError(f"`--resume_from_checkpoint {resume_from}` is damaged: {damage}.")
            return path
    names = ", ".join(path.name for path in existing) or "none"
    raise FileNotFoundError(
        f"`--resume_from_checkpoint {resume_from}` does not exist. Checkpoints in {output_dir}: {names}."
    )


def _newest_whole(checkpoints: list[Path], output_dir: str) -> Path | None:
    for path in reversed(checkpoints):
        damage = find_damage(path)
        if damage is None:
            return path
        logger.warning("%s is damaged (%s): trying the one before.", path, damage)
    logger.warning("No whole checkpoint in %s: starting a new run.", output_dir)
    return None
