#!/usr/bin/env python
"""Tests and benchmarks on a GPU within a few minutes: first whether it is right, then how fast it is.

    make gpu-check                                         # some six minutes on one card
    python benchmarks/gpu_check.py --device cpu --small    # the same commands in small, to try them

Each part is a process of its own with its own share of the time; what it measures is saved at once, also in
gpu_check.json, which holds the results of all parts. A table of the goals comes last.
"""

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from diffusers_pq.console import one_line_errors
from diffusers_pq.files import read_json, write_json
from diffusers_pq.flags import FlagParser, device, number, output_folder
from diffusers_pq.measuring import describe_machine, results_folder


ROOT = Path(__file__).parent.parent
SECONDS_TO_END = 10
F8 = "model_cards/pqgan-f8"
F16 = "model_cards/pqgan-f16-d256"
MINI = "model_cards/pqgan-mini-f8-pq"


@dataclass
class Part:
    """
    Args:
        script (`str`): In the repository; or `pytest`.
        flags (`str`): On a card.
        small (`str`): In their place with `--small`.
        seconds (`float`): After which it is ended.
        result (`str`): Name of the JSON file that it writes.
    """

    script: str
    flags: str
    small: str
    seconds: float
    result: str | None = None


PARTS = {
    "tests": Part("pytest", "tests/gpu", "tests/gpu/test_quantization_on_cuda.py", 110),
    "quantizer_speed": Part(
        "benchmarks/quantizer_speed.py",
        f"--sizes 1024 9216 16384 --batch_sizes 1 16 --dtype float16 --repeats 50 --models {F8} {F16}",
        f"--small --sizes 16 --pixels 32 --repeats 1 --models {F8}",
        60,
        "quantizer_speed",
    ),
    "generation_speed": Part(
        "benchmarks/generation_speed.py",
        "--dtype float16 --batch_sizes 1 4 16 --steps 5",
        "--small --steps 1 --systems PQSD-Quick",
        130,
        "generation_speed",
    ),
    "training_speed": Part(
        "experiments/training_speed.py",
        f"--config {F8}/config.json --resolution 256 --batch_size 20 --mixed_precision bf16 --variants plain compiled",
        f"--config {MINI}/config.json --resolution 32 --batch_size 1 --repeats 1",
        75,
        "training_speed",
    ),
    "mini_training_speed": Part(
        "experiments/training_speed.py",
        f"--config {MINI}/config.json --resolution 256 --batch_size 32 --mixed_precision bf16",
        f"--config {MINI}/config.json --resolution 32 --batch_size 1 --repeats 1",
        20,
        "training_speed",
    ),
    "training_profile": Part(
        "experiments/training_profile.py",
        f"--config {F8}/config.json --resolution 256 --batch_size 20 --mixed_precision bf16",
        f"--config {MINI}/config.json --resolution 32 --batch_size 1",
        30,
        "training_profile",
    ),
    "loader_speed": Part(
        "experiments/loader_speed.py",
        f"--config {F8}/config.json --mixed_precision bf16 --num_workers 0 4 12",
        f"--config {MINI}/config.json --resolution 32 --batch_size 2 --batches 2 --num_workers 0",
        30,
        "loader_speed",
    ),
    "model_speed": Part(
        "benchmarks/model_speed.py",
        f"--dtype float16 --models {F8} --pixels 256 768 --batch_sizes 1 16 --layouts default channels_last "
        "--repeats 10",
        f"--small --models {F8} --pixels 32 --repeats 1 --tiling_pixels 264",
        45,
        "model_speed",
    ),
    "sdxl": Part(
        "benchmarks/generation_speed.py",
        "--dtype float16 --steps 5 --systems SDXL SDXL-PQ-HR SDXL-PQ-Precise SDXL-PQ-Quick",
        "--small --steps 1 --systems SDXL",
        90,
        "generation_speed",
    ),
}


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument("--device", type=device, default="cuda", help="device to check")
    parser.add_argument("--small", action="store_true", help="tiny networks and few tests, to try the commands")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run, in this order")
    parser.add_argument("--minutes", type=number(float, above=0), default=6, help="after which no more is measured")
    parser.add_argument(
        "--output_dir", type=output_folder, help="folder of the results; default: benchmarks/results/ and the device"
    )
    return parser.parse_args(argv)


def command_of(name, args, folder):
    part = PARTS[name]
    flags = (part.small if args.small else part.flags).split()
    if part.script == "pytest":
        return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *flags] + [
            *("--numprocesses", "2" if args.small else "8", f"--junitxml={folder / 'tests.xml'}")
        ]
    return [sys.executable, part.script, *flags, "--device", args.device, "--output_dir", str(folder)]


def run(command, seconds, log):
    """
    The exit status of a process or, if its time is over, `None`: it is then interrupted and, if that does not help,
    ended, with those that it started.
    """
    with open(log, "w") as output:
        streams = {"stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams)
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            return None


def _end(process):
    os.killpg(process.pid, signal.SIGINT)  # after which pytest still writes what it found
    try:
        process.wait(timeout=SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tests_of(path):
    """Numbers of tests in a JUnit file, and the names of those that failed."""
    suite = next(ElementTree.parse(path).iter("testsuite"))
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None]
    return counts | {"failed": failed}


def run_part(name, seconds, args, folder):
    """What happened in a part, with its result if it wrote one."""
    part = PARTS[name]
    own = folder if part.result in (None, name) else folder / name  # another file of the same name
    own.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    log = own / f"{name}.log"
    status = run(command_of(name, args, own), min(seconds, part.seconds), log)
    found = {"seconds": round(time.monotonic() - started, 1), "status": "out of time" if status is None else status}
    path = own / ("tests.xml" if part.script == "pytest" else f"{part.result}.json")
    if path.is_file():
        found["result"] = tests_of(path) if part.script == "pytest" else read_json(path)
    if status != 0:
        found["end_of_log"] = log.read_text(errors="replace")[-1500:]
    return found


def _failures(parts):
    found = parts["tests"]["result"]
    if found["skipped"] == found["tests"]:
        raise ValueError("no test was run")
    return found["failures"] + found["errors"]


def _model_share(parts, batch_size):
    models = parts["quantizer_speed"]["result"]["models"]
    (row,) = (row for row in models if row["model"] == F8 and row["batch_size"] == batch_size)
    return row["modes"]


def _search(parts, name):
    (row,) = (row for row in parts["quantizer_speed"]["result"]["search"] if (row["N"], row["S"]) == (16384, 64))
    return 1e3 * min(one["seconds"] for one in row["modes"][name].values() if "seconds" in one)


def _speed(parts, system, batch_size):
    """Over SD 2.1 under the same settings: in the mode in which that is fastest."""
    systems = parts["generation_speed"]["result"]["systems"]
    own, base = (systems[name]["batches"][str(batch_size)] for name in (system, "SD 2.1"))
    mode = min((name for name in base if "error" not in base[name]), key=lambda name: base[name]["picture_seconds"])
    return own[mode]["speed_ratio"]


def _training(parts, key):
    record = parts["training_speed"]["result"]
    rows = [row for name, row in record["steps"].items() if name.startswith("train_pqgan, PQ")]
    return max(row["speed_ratio"] if key == "ratio" else record["batch_size"] / row["seconds"] for row in rows)


# What is measured: the goal, how it is read from the results of all parts, and whether less is better.
GOALS = {
    "tests that failed": (0, _failures, True),
    "quantising one picture, F = 8, 256 px (ms)": (
        0.15,
        lambda p: 1e3 * _model_share(p, 1)["eager"]["quantisation"],
        True,
    ),
    "search in 16,384 latent pixels (ms)": (0.15, lambda p: _search(p, "ours"), True),
    "the same by flash-kmeans (ms)": (None, lambda p: _search(p, "flash-kmeans"), True),
    "quantisation in a reconstruction, 1 picture": (0.01, lambda p: _model_share(p, 1)["eager"]["share"], True),
    "quantisation in a reconstruction, 16 pictures": (0.003, lambda p: _model_share(p, 16)["eager"]["share"], True),
    **{
        f"speed of {system} over SD 2.1, {size} at once": (goal, lambda p, a=system, b=size: _speed(p, a, b), False)
        for size in (1, 4, 16)
        for system, goal in (("PQSD-Quick", 4.0), ("PQSD-HR", 0.97), ("PQSD-Precise", 0.97))
    },
    "training speed over diffusers' loop": (2.0, lambda p: _training(p, "ratio"), False),
    "training, pictures a second": (110, lambda p: _training(p, "pictures"), False),
}


def judge(parts):
    """`(what, goal, found, verdict)` of each of the `GOALS`; what was not measured is `None`."""
    for what, (goal, read, less_is_better) in GOALS.items():
        try:
            found = read(parts)
        except (KeyError, ValueError, IndexError):
            yield what, goal, None, "not measured"
            continue
        met = goal is None or (found <= goal if less_is_better else found >= goal)
        yield what, goal, found, "" if goal is None else "met" if met else "missed"


def table(rows):
    width = max(len(what) for what, *_ in rows)
    for what, goal, found, verdict in rows:
        cells = ["-" if value is None else f"{value:.4g}" for value in (goal, found)]
        yield f"{what:<{width}}  goal {cells[0]:>6}  found {cells[1]:>8}  {verdict}"


def main(args):
    folder = (args.output_dir or results_folder("benchmarks/results", args.device, args.small)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    record = {"date": datetime.date.today().isoformat(), "machine": describe_machine(args.device), "parts": {}}
    ends = time.monotonic() + 60 * args.minutes
    for name in args.parts:
        left = ends - time.monotonic()
        if left <= 0:
            record["parts"][name] = {"status": "no time left"}
        else:
            print(f"{name} ...", flush=True)
            record["parts"][name] = run_part(name, left, args, folder)
        write_json(folder / "gpu_check.json", record)
    for name, part in record["parts"].items():
        print(f"{name}: status {part['status']}, {part.get('seconds', 0)} s")
    failed = record["parts"].get("tests", {}).get("result", {}).get("failed", [])
    print(*failed, sep="\n", end="\n" if failed else "")
    rows = [*judge(record["parts"])]
    print(*table(rows), sep="\n")
    record["goals"] = [dict(zip(("what", "goal", "found", "verdict"), row)) for row in rows]
    write_json(folder / "gpu_check.json", record)
    print(json.dumps({"gpu_check": str(folder / "gpu_check.json")}))
    return int(any(part["status"] != 0 for part in record["parts"].values()))


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(parse_args()))
