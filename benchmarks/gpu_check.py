#!/usr/bin/env python
"""Tests and benchmarks on a GPU within a few minutes: first whether it is right, then how fast it is.

    make gpu-check                                         # no more than six minutes on one card
    python benchmarks/gpu_check.py --parts sdxl            # a part again, or one that no time was left for
    python benchmarks/gpu_check.py --device cpu --small    # the same commands in small, to try them

Parts stand in order of their worth. Each is a process of its own, which is ended after its share of the time, or after
what is left of --minutes. Benchmarks save as they go; gpu_check.json holds the results of all parts. A table of the
goals comes last.
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
SECONDS_TO_END = 5  # that a part has to write what it found once it is interrupted
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
        seconds (`float`): That it may take at most, of those that are left.
        result (`str`): Name of the JSON file that it writes.
    """

    script: str
    flags: str
    small: str
    seconds: float
    result: str | None = None


SPEED_FLAGS = "--dtype float16 --steps 5 --most_seconds 0.5"
ONE_AND_FOUR = f"{SPEED_FLAGS} --batch_sizes 1 4 --systems PQSD-Quick PQSD-Precise PQSD-HR"
SIXTEEN = f"{SPEED_FLAGS} --batch_sizes 16 --systems PQSD-Quick PQSD-Precise PQSD-HR"
LAYOUTS = "--layouts default channels_last"
PARTS = {
    "tests": Part("pytest", "tests/gpu", "tests/gpu/test_quantization_on_cuda.py", 100),
    # In float32, in which the goals for the quantiser's share were set.
    "quantizer_speed": Part(
        "benchmarks/quantizer_speed.py",
        f"--sizes 1024 16384 --batch_sizes 1 16 --modes eager graphed --repeats 50 --models {F8} {F16}",
        f"--small --sizes 16 --pixels 32 --repeats 1 --models {F8}",
        45,
        "quantizer_speed",
    ),
    "generation_speed": Part(
        "benchmarks/generation_speed.py",
        f"{ONE_AND_FOUR} --modes eager graphed compiled_graphed {LAYOUTS}",
        f"--small --steps 1 --systems PQSD-Quick {LAYOUTS}",
        110,
        "generation_speed",
    ),
    "training_speed": Part(
        "experiments/training_speed.py",
        f"--config {F8}/config.json --resolution 256 --batch_size 20 --mixed_precision bf16 "
        "--variants plain channels_last compiled compiled_channels_last",
        f"--config {MINI}/config.json --resolution 32 --batch_size 1 --repeats 1 --variants plain channels_last",
        80,
        "training_speed",
    ),
    "generation_speed_16": Part(
        "benchmarks/generation_speed.py",
        f"{SIXTEEN} --modes graphed compiled_graphed {LAYOUTS}",
        "--small --steps 1 --systems PQSD-Quick --batch_sizes 16",
        90,
        "generation_speed",
    ),
    "mini_training_speed": Part(
        "experiments/training_speed.py",
        f"--config {MINI}/config.json --resolution 256 --batch_size 32 --mixed_precision bf16",
        f"--config {MINI}/config.json --resolution 32 --batch_size 1 --repeats 1",
        20,
        "training_speed",
    ),
    "model_speed": Part(
        "benchmarks/model_speed.py",
        f"--dtype float16 --models {F8} --pixels 768 --batch_sizes 1 16 {LAYOUTS} --modes eager graphed --repeats 10",
        f"--small --models {F8} --pixels 32 --repeats 1 --tiling_pixels 264",
        35,
        "model_speed",
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
        35,
        "loader_speed",
    ),
    "quantisation_overhead": Part(
        "experiments/quantisation_overhead.py",
        "--repeats 100 --latent_channels 32 128 256 --codebook_size 512 16384 --modes eager graphed",
        f"--small --model {F8} --pixels 32 --repeats 1 --latent_channels 8 --codebook_size 16",
        40,
        "quantisation_overhead",
    ),
    "photographs": Part(
        "benchmarks/reconstruct_photographs.py",
        f"--models PQ={MINI} KL=model_cards/pqgan-mini-f8-kl --batch_sizes 1 16 --repeats 20",
        f"--small --models PQ={MINI} --repeats 1",
        40,
        "photographs",
    ),
    "sdxl": Part(
        "benchmarks/generation_speed.py",
        f"{SPEED_FLAGS} --modes graphed --systems SDXL-PQ-Quick SDXL-PQ-Precise SDXL-PQ-HR {LAYOUTS}",
        "--small --steps 1 --systems SDXL",
        90,
        "generation_speed",
    ),
}


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument("--device", type=device, default="cuda", help="device to check")
    parser.add_argument("--small", action="store_true", help="tiny networks and few tests, to try the commands")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        help="parts to run, in this order; what others found earlier stays; default: all, anew",
    )
    parser.add_argument(
        "--minutes",
        type=number(float, above=0),
        default=5.5,
        help="for all parts together, after which the last has ended; half a minute less than what is promised, for "
        "installing and imports",
    )
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
    ended, with those that it started. All that takes no longer than `seconds`.
    """
    with open(log, "w") as output:
        streams = {"stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams)
        try:
            return process.wait(timeout=seconds - SECONDS_TO_END)
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
    """Numbers of tests in a JUnit file, the names of those that failed, and why others were not run."""
    suite = next(ElementTree.parse(path).iter("testsuite"))
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    found = {kind: {} for kind in ("failure", "error", "skipped")}
    for case in suite.iter("testcase"):
        for kind in found.keys() & {entry.tag for entry in case}:
            found[kind][case.get("name")] = case.find(kind).get("message")
    return counts | {"failed": [*found["failure"], *found["error"]], "not_run": found["skipped"]}


def run_part(name, seconds, args, folder):
    """What happened in a part, with its result if it wrote one."""
    part = PARTS[name]
    own = folder if part.result in (None, name) else folder / name  # another file of the same name
    own.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    log = own / f"{name}.log"
    status = run(command_of(name, args, own), seconds, log)
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


def _batches(parts, system, batch_size):
    """What was found for so many pictures at once, in whichever part."""
    for name in ("generation_speed", "generation_speed_16"):
        systems = parts.get(name, {}).get("result", {}).get("systems", {})
        if found := systems.get(system, {}).get("batches", {}).get(str(batch_size)):
            return found
    raise KeyError(system)


def _speed(parts, system, batch_size):
    """Over SD 2.1 under the same settings: in those in which that is fastest."""
    own, base = (_batches(parts, name, batch_size) for name in (system, "SD 2.1"))
    times = {name: one["picture_seconds"] for name, one in base.items() if "error" not in one}
    return own[min(times, key=times.get)]["speed_ratio"]


def _channels_last_generation(parts, batch_size):
    """Time of SD 2.1 as it is over that with channels_last, as CUDA graphs."""
    found = _batches(parts, "SD 2.1", batch_size)
    return found["graphed"]["picture_seconds"] / found["graphed channels_last"]["picture_seconds"]


def _training(parts, key):
    record = parts["training_speed"]["result"]
    rows = [row for name, row in record["steps"].items() if name.startswith("train_pqgan, PQ")]
    return max(row["speed_ratio"] if key == "ratio" else record["batch_size"] / row["seconds"] for row in rows)


def _variant(parts, name):
    """The row of a way to train a product-quantised model."""
    steps = parts["training_speed"]["result"]["steps"]
    return next(row for title, row in steps.items() if title.startswith("train_pqgan, PQ") and title.endswith(name))


def _channels_last_training(parts):
    return _variant(parts, ")")["seconds"] / _variant(parts, "), channels_last")["seconds"]


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
    "compiling the training, with its first step (s)": (
        60,
        lambda p: _variant(p, "), compiled")["first_seconds"],
        True,
    ),
    "channels_last, speed of SD 2.1, 1 at once": (None, lambda p: _channels_last_generation(p, 1), False),
    "channels_last, speed of SD 2.1, 16 at once": (None, lambda p: _channels_last_generation(p, 16), False),
    "channels_last, speed of training": (None, _channels_last_training, False),
}


def judge(parts):
    """`(what, goal, found, verdict)` of each of the `GOALS`; what was not measured is `None`."""
    for what, (goal, read, less_is_better) in GOALS.items():
        try:
            found = read(parts)
        except (KeyError, ValueError, IndexError, StopIteration):
            yield what, goal, None, "not measured"
            continue
        met = goal is None or (found <= goal if less_is_better else found >= goal)
        yield what, goal, found, "" if goal is None else "met" if met else "missed"


def table(rows):
    width = max(len(what) for what, *_ in rows)
    for what, goal, found, verdict in rows:
        cells = ["-" if value is None else f"{value:.4g}" for value in (goal, found)]
        yield f"{what:<{width}}  goal {cells[0]:>6}  found {cells[1]:>8}  {verdict}"


def run_parts(args, folder, record):
    """All parts, each in what is left of the time; the record is saved after each."""
    ends = time.monotonic() + 60 * args.minutes
    for name in args.parts or PARTS:
        seconds = min(PARTS[name].seconds, ends - time.monotonic())
        if seconds <= SECONDS_TO_END:
            record["parts"][name] = {"status": "no time left"}
        else:
            print(f"{name} ...", flush=True)
            record["parts"][name] = run_part(name, seconds, args, folder)
        write_json(folder / "gpu_check.json", record)


def earlier_parts(args, path):
    """What other parts found in an earlier run, if only some are run."""
    return read_json(path)["parts"] if args.parts and path.is_file() else {}


def report(record, goals):
    """A line for each part, the tests that failed or were not run, and the table of goals."""
    for name, part in record["parts"].items():
        yield f"{name}: status {part['status']}, {part.get('seconds', 0)} s"
    tests = record["parts"].get("tests", {}).get("result", {"failed": [], "not_run": {}})
    yield from (f"failed: {name}" for name in tests["failed"])
    yield from (f"not run: {name}: {why}" for name, why in tests["not_run"].items())
    yield from table(goals)


def main(args):
    folder = (args.output_dir or results_folder("benchmarks/results", args.device, args.small)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "gpu_check.json"
    record = {"date": datetime.date.today().isoformat(), "machine": describe_machine(args.device)}
    record["parts"] = earlier_parts(args, path)
    run_parts(args, folder, record)
    goals = [*judge(record["parts"])]
    record["goals"] = [dict(zip(("what", "goal", "found", "verdict"), row)) for row in goals]
    write_json(path, record)
    print(*report(record, goals), sep="\n")
    print(json.dumps({"gpu_check": str(path)}))
    return int(any(record["parts"][name]["status"] != 0 for name in args.parts or PARTS))


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(parse_args()))
