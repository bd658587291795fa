#!/usr/bin/env python
"""Draw a sweep of `sweep_pqgan.py` in the form of Figures 3 and 6, and check the paper's findings on it.

    python experiments/sweep_figures.py runs/sweep

Writes sweep.json, sweep_quality.png and sweep_utilisation.png, named after the sweep's folder, and prints tables. The
figures can be drawn while the sweep is running.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from sweep_report import check_findings, draw_quality, draw_utilisation, read_sweep, report

from diffusers_pq.console import one_line_errors


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep_dir", type=Path, help="output folder of the sweep")
    parser.add_argument("--evaluation", help="which one, if there are several, such as imagenet-1k-validation-256")
    parser.add_argument("--output_dir", type=Path, default=Path("experiments/results"))
    return parser.parse_args(argv)


def main(args):
    rows, results = read_sweep(args.sweep_dir, args.evaluation)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    name = args.sweep_dir.resolve().name
    draw_quality(rows, args.output_dir / f"{name}_quality.png")
    draw_utilisation(rows, args.output_dir / f"{name}_utilisation.png")
    print(f"{len(rows)} configurations, {args.output_dir / name}_quality.png and _utilisation.png")
    findings = check_findings(rows)
    last = max(results, key=lambda result: result["date"])
    record = {key: last[key] for key in ("date", "machine", "pictures", "settings", "unavailable")}
    del record["settings"]["weights_sha256"]
    record |= {"findings": list(map(asdict, findings)), "configurations": rows.to_dict("records")}
    (args.output_dir / f"{name}.json").write_text(json.dumps(record, indent=2, default=bool) + "\n")
    print(report(rows, findings))
    for metric, wanted in last["unavailable"].items():
        print(f"{metric}: unavailable, needs {wanted}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
