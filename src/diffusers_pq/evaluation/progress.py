"""What an evaluation has counted so far, so that one that was stopped goes on."""

import json
import logging
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torchmetrics import MetricCollection

from ..files import replacing
from .data import DATA_DEFAULTS, resize_mode


logger = logging.getLogger(__name__)

# Of settings: see `EvaluationData.fingerprint`.
_FINGERPRINTS = {"rows_sha256", "files_sha256"}


class EvaluationProgress:
    """
    What one process has counted so far, kept in a file (`evaluation-<process>.safetensors`) for a later run to go on.

    Args:
        folder (`Path`): Where the file is.
        process_index (`int`): Of this process.
        settings (`dict`): What must be the same for a run to go on, as JSON values.
    """

    def __init__(self, folder: Path, process_index: int, settings: dict):
        self.path = folder / f"evaluation-{process_index:05}.safetensors"
        self.settings = settings

    def save(self, metrics: MetricCollection, batches: int, pictures: int):
        """Write the state after so many batches, whole or not at all."""
        states = {
            f"{name}.{key}": torch.cat(state) if isinstance(state, list) else state
            for name, metric in metrics.items()
            for key, state in metric.metric_state.items()
            if not isinstance(state, list) or state
        }
        record = {"batches": batches, "pictures": pictures, "settings": self.settings}
        with replacing(self.path) as unfinished:
            save_file(states, unfinished, metadata={"progress": json.dumps(record)})

    def restore(self, metrics: MetricCollection) -> tuple[int, int]:
        """
        Add the state to fresh metrics.

        Returns:
            `tuple`: the batches and pictures in it, 0 if there is no file.

        Raises:
            ValueError: if the file comes from a run with other settings.
        """
        if not self.path.is_file():
            return 0, 0
        with safe_open(self.path, "pt") as file:
            record = json.loads(file.metadata()["progress"])
            check_settings(record["settings"], self.settings, self.path.parent)
            states = {key: file.get_tensor(key) for key in file.keys()}
        for name, metric in metrics.items():
            saved = {}
            for key, fresh in metric.metric_state.items():
                state = states.get(f"{name}.{key}")
                state = None if state is None else state.to(metric.device)
                saved[key] = ([] if state is None else [state]) if isinstance(fresh, list) else state
            metric.merge_state(saved)
        return record["batches"], record["pictures"]

    def remove(self):
        self.path.unlink(missing_ok=True)


def check_settings(found: dict, wanted: dict, folder: Path):
    """
    Raise a `ValueError` that names what differs between two evaluations' settings. A fingerprint of the pictures is
    compared if both have it.
    """
    # Settings of the data that an earlier version did not know had their defaults.
    found = {key: value for key, value in DATA_DEFAULTS.items() if key in wanted} | found
    if "resize_mode" in found:
        found["resize_mode"] = resize_mode(found["resize_mode"])
    one_sided = _FINGERPRINTS & (found.keys() ^ wanted.keys())
    if one_sided:
        logger.warning("%s does not say which pictures it is of; they are taken for these.", folder)
    found, wanted = ({key: settings[key] for key in settings.keys() - one_sided} for settings in (found, wanted))
    differences = [
        f"{key} {found.get(key)!r} there, {wanted.get(key)!r} now"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if differences:
        pictures = "of other pictures or " if _FINGERPRINTS & {text.split()[0] for text in differences} else ""
        raise ValueError(
            f"{folder} holds an evaluation {pictures}with other settings ({'; '.join(differences)}). Use the same, "
            "choose another `--output_dir`, or remove the folder."
        )
