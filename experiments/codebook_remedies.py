#!/usr/bin/env python
"""What the remedies against unused codebook entries do, in short runs that differ in nothing else.

    python experiments/codebook_remedies.py          # about twenty minutes on 2 cores; resumes after an interruption

Each run is `train_pqgan.py` with the recipe of the mini models, for VQ (one codebook) and PQ (32). Validation scores
at the last step go to codebook_remedies.json. Flags after `--` go to all runs.
"""

import datetime
import json
import subprocess
import sys
from pathlib import Path

from diffusers_pq.console import one_line_errors
from diffusers_pq.files import read_json, write_json
from diffusers_pq.flags import COUNT, FlagParser, output_folder
from diffusers_pq.measuring import describe_machine


ROOT = Path(__file__).parent.parent
REMEDIES = {
    "none (the paper)": (),
    "k-means start": ("--codebook_init", "kmeans"),
    "EMA codebooks": ("--codebook_ema_decay", "0.99"),
    "re-seeding": ("--reseed_dead_entries", "50"),
    "cosine distance": ("--codebook_distance", "cosine"),
    "rotation trick": ("--gradient_estimator", "rotation"),
}


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["vq", "pq"], help="mini models that are trained")
    parser.add_argument("--steps", type=COUNT, default=300, help="steps of each training")
    parser.add_argument("--resolution", type=COUNT, default=64, help="side of the pictures, in pixels")
    parser.add_argument("--train_batch_size", type=COUNT, default=8, help="pictures of a training step")
    parser.add_argument(
        "--runs_dir", type=Path, default=ROOT / "runs" / "codebook_remedies", help="folder of the trainings"
    )
    parser.add_argument(
        "--output_dir", type=output_folder, default=ROOT / "experiments" / "results", help="folder of the results"
    )
    parser.add_argument("flags", nargs="*", help="further flags of train_pqgan.py")
    return parser.parse_args(argv)


def train(model, flags, folder, args):
    command = [sys.executable, ROOT / "training_scripts" / "train_pqgan.py"]
    command += ["--config", ROOT / "training_scripts" / "recipes" / "pqgan-mini.yaml", "--codebook_init", "normal"]
    command += ["--model_config_name_or_path", ROOT / "model_cards" / f"pqgan-mini-f8-{model}" / "config.json"]
    command += ["--train_data_dir", ROOT / "data" / "debian-tiles", "--output_dir", folder]
    command += ["--resolution", args.resolution, "--train_batch_size", args.train_batch_size]
    command += ["--max_train_steps", args.steps, "--validation_steps", args.steps, *flags, *args.flags]
    subprocess.run([str(part) for part in command], check=True)


def main(args):
    rows = []
    for model in args.models:
        for name, flags in REMEDIES.items():
            folder = args.runs_dir / f"{model}-{name.split()[0]}-{args.steps}"
            scores = folder / "best" / "validation.json"
            if not scores.is_file():
                train(model, flags, folder, args)
            rows.append({"model": model, "remedy": name} | read_json(scores))
            print(json.dumps(rows[-1]), flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine("cpu"),
        "steps": args.steps,
        "resolution": args.resolution,
        "batch_size": args.train_batch_size,
        "runs": rows,
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "codebook_remedies.json", record)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
