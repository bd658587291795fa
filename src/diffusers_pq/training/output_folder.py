"""The folder that a run writes to: one run at a time, and nothing of one run taken for another's."""

import logging
import os
from collections.abc import Iterable
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import read_json
from ..models.auto_class import CODE_FILE
from .checkpoints import checkpoint_step, list_checkpoints


logger = logging.getLogger(__name__)

SETTINGS = "training_config.json"
_LOCK = ".lock"
_PATIENCE = 10.0  # seconds; the workers of a run that was killed end within them
_BEST = ("best", "old-best")  # the second for a moment, while the first is replaced
_MODEL = ("config.json", "model_index.json", CODE_FILE, "discriminator", "scheduler", "vae")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


class OutputFolder:
    """
    Args:
        path (`str`): Made when it is locked.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        # One object per process and path: a run that ended with an error does not lock out the next in its process.
        self._lock = FileLock(self.path / _LOCK, is_singleton=True)

    def lock(self):
        """
        Keep other runs out until [`unlock`] or the end of the process, however it ends.

        Raises:
            ValueError: if another run is writing there.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=_PATIENCE)
        except Timeout:
            raise ValueError(
                f"--output_dir {self.path}: another run is writing there. Wait for its end, or give another folder."
            ) from None

    def unlock(self):
        """Let other runs in."""
        self._lock.release(force=True)

    def check_unused(self):
        """Raise a `ValueError` if a run has written there, or a model is there that the run would overwrite."""
        if (self.path / SETTINGS).is_file() or self._results():
            raise ValueError(
                f"--output_dir {self.path} is in use: go on with `--resume_from_checkpoint latest`, start anew with "
                "`--overwrite_output_dir`, or give another folder."
            )

    def make_room(self, checkpoint: Path | None, keep_best: bool = False):
        """
        Set aside what does not belong to a run that starts anew or goes on from a checkpoint: of the same folder, the
        later checkpoints and a best model of a later step; of another folder, or without one, all there is.

        Args:
            checkpoint (`Path`, *optional*)
            keep_best (`bool`): Whether a best model of a later step stays, since the run will make the same again.
        """
        if checkpoint is None or checkpoint.parent.resolve() != self.path.resolve():
            self._set_aside(self._results())
            return
        step = checkpoint_step(checkpoint)
        later = [path for path in list_checkpoints(self.path) if checkpoint_step(path) > step]
        if not keep_best:
            later += [path for path in self._present(_BEST) if _step_of(path) > step]
        self._set_aside(later)

    def _results(self) -> list[Path]:
        """Checkpoints and models; those of a run that was stopped before its first are nothing but its autoencoder."""
        index = self.path / "model_index.json"
        parts = read_json(index, dict).keys() if index.is_file() else ()
        models = self._present(dict.fromkeys((*_MODEL, *parts)))
        weights = [path for pattern in _WEIGHTS for path in self.path.glob(pattern)]
        found = [*list_checkpoints(self.path), *self._present(_BEST), *models, *weights]
        return [] if found == [self.path / "vae"] else found

    def _present(self, names: Iterable[str]) -> list[Path]:
        return [path for name in names if (path := self.path / name).exists()]

    def _set_aside(self, paths: list[Path]):
        if not paths:
            return
        folder = next(path for number in count(1) if not (path := self.path / f"old-run-{number}").exists())
        folder.mkdir()
        for path in reversed(paths):  # the newest first: what is left after a kill is older than what is gone
            os.replace(path, folder / path.name)
        names = ", ".join(path.name for path in paths)
        logger.warning("Set aside in %s, since they are not of this run: %s. Delete them at will.", folder, names)


def _step_of(best: Path) -> int:
    scores = best / "validation.json"
    return read_json(scores, dict).get("step", 0) if scores.is_file() else 0
