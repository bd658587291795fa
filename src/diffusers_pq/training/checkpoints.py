"""Training checkpoints: folders `checkpoint-<step>` that exist either whole or not at all."""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

from accelerate import Accelerator


logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(output_dir: str) -> list[Path]:
    """The checkpoints in a folder, oldest first; unfinished ones carry another name and are not listed."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The number of optimisation steps a checkpoint was written after."""
    return int(_NAME.fullmatch(path.name).group(1))


def save_checkpoint(accelerator: Accelerator, output_dir: str, step: int, total_limit: int | None):
    """Write `checkpoint-<step>` under another name, rename it when complete, and drop the oldest beyond the limit."""
    final = Path(output_dir) / f"checkpoint-{step}"
    unfinished = Path(output_dir) / f"unfinished-{final.name}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    _write_manifest(unfinished)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(unfinished, final)
    older = [path for path in list_checkpoints(output_dir) if checkpoint_step(path) <= step]
    for path in older[:-total_limit] if total_limit else []:
        shutil.rmtree(path)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files: missing, of another size or content than written; `None` if nothing."""
    manifest = checkpoint / _MANIFEST
    if not manifest.is_file():
        return f"{_MANIFEST} is missing"
    for name, digest in json.loads(manifest.read_text()).items():
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
