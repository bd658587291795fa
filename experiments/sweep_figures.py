#!/usr/bin/env python
"""Draw sweeps of `sweep_pqgan.py` in the form of Figures 3 and 6, and check the paper's findings on them.

    python experiments/sweep_figures.py runs/sweep-seed0 runs/sweep-seed1 runs/sweep-seed2

Sweeps that differ in their `--seed` alone are runs of one: tables give mean and spread, and a finding is seen if every
run shows it. Writes sweep.json, sweep_quality.png and sweep_utilisation.png, named after the first folder, and prints
tables. The figures can be drawn while the sweeps are running.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sweep_report import draw_quality, draw_utilisation, judge, mean_of_runs, read_sweeps, report

from diffusers_pq.console import one_line_errors
from diffusers_pq.files import read_json, write_json
from diffusers_pq.flags import FlagParser, output_folder


# What of the trainings the results are read with.
TRAINING = ("weight_init", "codebook_init", "max_train_steps", "train_batch_size", "resolution", "learning_rate")
TRAINING += ("perceptual_weight", "discriminator_weight")


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument("sweep_dirs", type=Path, nargs="+", help="output folders of one sweep, a seed each")
    parser.add_argument(
        "--evaluation", help="name of the one to draw, if there are several, such as imagenet-1k-validation-256"
    )
    parser.add_argument(
        "--output_dir", type=output_folder, default=Path("experiments/results"), help="folder of the results"
    )
    return parser.parse_args(argv)


def trainings(sweep_dirs: Sequence[Path]) -> dict:
    """How the models were trained, in all sweeps alike but for the seeds; of one model each, which stands for all."""
    configs = [read_json(next(folder.glob("d*-s*-k*/training_config.json"))) for folder in sweep_dirs]
    alike = [{name: config[name] for name in TRAINING} for config in configs]
    if any(one != alike[0] for one in alike):
        raise ValueError(f"{', '.join(map(str, sweep_dirs))} must differ in their seed alone, but are {alike}.")
    return alike[0] | {"seeds": [config["seed"] for config in configs]}


def main(args):
    rows, results = read_sweeps(args.sweep_dirs, args.evaluation)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[-_]seed\d+$", "", args.sweep_dirs[0].resolve().name)
    means = mean_of_runs(rows)
    draw_quality(means, args.output_dir / f"{name}_quality.png")
    draw_utilisation(means, args.output_dir / f"{name}_utilisation.png")
    print(f"{len(means)} configurations in {len(args.sweep_dirs)} runs: {args.output_dir / name}_*.png")
    findings = judge(rows)
    last = max(results, key=lambda result: result["date"])
    record = {key: last[key] for key in ("date", "machine", "pictures", "settings", "unavailable")}
    del record["settings"]["weights_sha256"]
    record |= {
        "training": trainings(args.sweep_dirs),
        "findings": list(map(asdict, findings)),
        "configurations": rows.to_dict("records"),
    }
    write_json(args.output_dir / f"{name}.json", record)
    print(report(rows, findings))
    for metric, wanted in last["unavailable"].items():
        print(f"{metric}: unavailable, needs {wanted}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
