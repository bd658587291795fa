"""Training checkpoints: folders `checkpoint-<step>` that exist either whole or not at all."""

import logging
import os
import re
import shutil
from pathlib import Path

from accelerate import Accelerator


logger = logging.getLogger(__name__)

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
    shutil.rmtree(final, ignore_errors=True)
    os.replace(unfinished, final)
    for old in list_checkpoints(output_dir)[:-total_limit] if total_limit else []:
        shutil.rmtree(old)


def find_checkpoint(output_dir: str, resume_from: str | None) -> Path | None:
    """
    The checkpoint to resume from.

    Args:
        output_dir (`str`): Where the run writes.
        resume_from (`str`, *optional*): `"latest"`, the name of a checkpoint in `output_dir`, or a path.

    Returns:
        `Path`, or `None` if nothing was asked for or `"latest"` found none.

    Raises:
        FileNotFoundError: if a named checkpoint does not exist; the message lists those that do.
    """
    if resume_from is None:
        return None
    existing = list_checkpoints(output_dir)
    if resume_from == "latest":
        if not existing:
            logger.warning("No checkpoint in %s: starting a new run.", output_dir)
        return existing[-1] if existing else None
    for path in (Path(output_dir) / resume_from, Path(resume_from)):
        if path.is_dir() and _NAME.fullmatch(path.name):
            return path
    names = ", ".join(path.name for path in existing) or "none"
    raise FileNotFoundError(
        f"`--resume_from_checkpoint {resume_from}` does not exist. Checkpoints in {output_dir}: {names}."
    )
