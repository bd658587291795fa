#!/usr/bin/env python
"""Validation and training loss against steps of several runs of train_pqsd.py: a plot and a JSON file.

    python experiments/adaptation.py --runs copy=runs/pqsd-mini random=runs/pqsd-mini-random

Reads the runs' tensorboard logs. Losses can be compared between runs on the same autoencoder only.
"""

import datetime
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_pq.console import one_line_errors
from diffusers_pq.files import read_json, replacing, write_json
from diffusers_pq.flags import FlagParser, named, output_folder


# What the plot shows: the logs' name, a title, and over how many logged values it is averaged.
CURVES = {
    "validation/loss": ("held-out pictures and captions", 1),
    "loss": ("training pictures (running mean of 10 values)", 10),
}


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument(
        "--runs",
        nargs="+",
        required=True,
        type=named,
        metavar="NAME=FOLDER",
        help="output folders of train_pqsd.py, with names for the plot",
    )
    parser.add_argument(
        "--output_dir", type=output_folder, default=Path("experiments/results"), help="folder of the results"
    )
    return parser.parse_args(argv)


def read_logs(folder):
    """All values in the tensorboard logs of a run."""
    return EventAccumulator(str(folder / "logs" / "diffusers_pq"), size_guidance={"scalars": 0}).Reload()


def read_curves(folder):
    """Steps and values of each curve; of a step that a resumed run took twice, the later one."""
    logs = read_logs(folder)
    if missing := set(CURVES) - set(logs.Tags()["scalars"]):
        raise ValueError(f"--runs: {folder} has no {', '.join(sorted(missing))} in its tensorboard logs.")
    curves = {name: {event.step: event.value for event in logs.Scalars(name)} for name in CURVES}
    return {name: sorted(curve.items()) for name, curve in curves.items()}


def plot(runs, path):
    figure, axes = plt.subplots(1, len(CURVES), figsize=(10, 3.8), layout="constrained")
    for axis, (name, (title, width)) in zip(axes, CURVES.items()):
        for label, run in runs.items():
            steps, values = np.array(run[name]).T
            axis.plot(steps[width - 1 :], np.convolve(values, np.ones(width) / width, "valid"), label=label)
        axis.set(title=title, xlabel="steps", ylabel="denoising loss", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main(args):
    runs = {}
    for label, folder in args.runs:
        config = read_json(Path(folder, "training_config.json"))
        runs[label] = {"config": config, **read_curves(Path(folder))}
        step, loss = min(runs[label]["validation/loss"], key=lambda entry: entry[1])
        print(f"{label}: lowest validation loss {loss:.4f} at step {step}")
    with replacing(args.output_dir / "adaptation.png") as unfinished:
        plot(runs, unfinished)
    write_json(args.output_dir / "adaptation.json", {"date": datetime.date.today().isoformat(), "runs": runs})


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
