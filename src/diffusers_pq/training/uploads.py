"""Trained models on disk and, in the background, on the Hub."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi

from ..files import read_json
from ..hub.push import NOT_UPLOADED


logger = logging.getLogger(__name__)


def replace_folder(unfinished: Path, final: Path):
    """Put a complete folder in the place of another, which is renamed to `old-...` until that is done."""
    old = _old(final)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(unfinished, final)
    shutil.rmtree(old, ignore_errors=True)


class BestModel:
    """
    Keeps the model with the highest validation score in `<output_dir>/best`, beside its scores in `validation.json`.

    Args:
        output_dir (`str`): Of the run.
        metric (`str`): Name of the score, of which more is better unless `lower_is_better`.
        lower_is_better (`bool`)
    """

    def __init__(self, output_dir: str, metric: str = "psnr", lower_is_better: bool = False):
        self.folder = Path(output_dir) / "best"
        self.metric = metric
        self.sign = -1 if lower_is_better else 1
        self.best = None

    def restore(self) -> float | None:
        """The score of the model that is kept in the folder, if there is one; put it into `best` to go on from it."""
        scores = self.folder / "validation.json"
        if not self.folder.exists() and _old(self.folder).exists():  # killed while the two changed places
            os.replace(_old(self.folder), self.folder)
        return read_json(scores, dict).get(self.metric) if scores.is_file() else None

    def offer(
        self, save: Callable[[Path], object], scores: dict[str, float], step: int, is_main_process: bool = True
    ) -> bool:
        """
        Keep a model if it beats the one that is kept. To be called by all processes.

        Args:
            save: Writes the model into the folder that it is given; called by all processes.
            scores (`dict[str, float]`): Of the validation, the same in all processes.
            step (`int`): Of the run.
            is_main_process (`bool`): Only this one touches the folders.

        Returns:
            `bool`: Whether the model is kept.
        """
        score = scores[self.metric]
        if self.best is not None and self.sign * score <= self.sign * self.best:
            return False
        unfinished = self.folder.with_name("unfinished-best")
        save(unfinished)
        self.best = score
        if not is_main_process:
            return True
        (unfinished / "validation.json").write_text(json.dumps({"step": step} | scores, indent=2) + "\n")
        replace_folder(unfinished, self.folder)
        return True


class HubUploads:
    """
    Uploads folders to one repository of the Hub while training goes on. A failed upload is a warning, never the end of
    a run, and the folder stays.

    Args:
        repo_id (`str`): Created if it does not exist.
        output_dir (`str`): Of the run, for the snapshots that are being uploaded.
        token (`str`, *optional*): Default: the one that `hf auth login` has stored.

    Raises:
        ValueError or `huggingface_hub.errors.HfHubHTTPError`: if the repository cannot be created. It is asked for at
            once, so that a wrong name or token shows before the training.
    """

    def __init__(self, repo_id: str, output_dir: str, token: str | None = None):
        self.api = HfApi(token=token)
        self.repo_id = self.api.create_repo(repo_id, exist_ok=True).repo_id
        self.output_dir = output_dir
        self._running: Future | None = None
        self._snapshot: tempfile.TemporaryDirectory | None = None

    def start(self, folder: Path, message: str):
        """Upload a folder in the background, unless the upload before is still running: then leave this one out."""
        if self._running is not None and not self._running.done():
            logger.warning("Not uploaded, since the upload before is still running: %s", message)
            return
        self._finish()
        # Links instead of copies: the folder may be replaced during the upload without harm to these files.
        self._snapshot = tempfile.TemporaryDirectory(dir=self.output_dir, prefix="upload-")
        copy = Path(self._snapshot.name) / folder.name
        shutil.copytree(folder, copy, copy_function=_link, ignore=shutil.ignore_patterns(*NOT_UPLOADED))
        self._running = self.api.upload_folder(
            repo_id=self.repo_id, folder_path=copy, commit_message=message, run_as_future=True
        )

    def upload(self, folder: Path, message: str) -> bool:
        """Wait for the upload before, then upload a folder and wait for it. Returns whether that worked."""
        self._finish()
        self.start(folder, message)
        return self._finish()

    def _finish(self) -> bool:
        if self._running is None:
            return True
        error = self._running.exception()
        if error is not None:
            logger.warning("The upload to %s failed, nothing local is lost: %s", self.repo_id, error)
        self._running = None
        self._snapshot.cleanup()
        return error is None


def _old(folder: Path) -> Path:
    return folder.with_name(f"old-{folder.name}")


def _link(source: str, target: str):
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
