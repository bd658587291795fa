"""The JSON file of an experiment of many runs, each of which is written as soon as it is measured."""

import datetime
from collections.abc import Callable
from pathlib import Path

from diffusers_pq.files import read_json, write_json
from diffusers_pq.measuring import describe_machine


def open_record(path: Path, settings: dict) -> dict:
    """
    What a file holds of an interrupted experiment, or a record without runs.

    Raises:
        ValueError: if its runs had other settings.
    """
    record = read_json(path, dict) if path.is_file() else {"settings": settings, "runs": []}
    if record["settings"] != settings:
        raise ValueError(f"{path} has other settings, {record['settings']}: use the same, or another --output_dir.")
    return record


def is_measured(record: dict, combination: dict) -> bool:
    """Whether there is a run of these values, such as a seed."""
    return any(combination.items() <= run.items() for run in record["runs"])


def add_run(path: Path, record: dict, run: dict, order: Callable | None = None):
    """Write the record with another run, in the order of a sort key, and where and when it was measured."""
    record["runs"].append(run)
    if order is not None:
        record["runs"].sort(key=order)
    record |= {"date": datetime.date.today().isoformat(), "machine": describe_machine("cpu")}
    write_json(path, record)
