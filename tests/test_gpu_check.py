"""The programs that `make gpu-check` runs, as far as they need no card."""

import argparse
import json
import os
import runpy
import sys
import tarfile
import time
from pathlib import Path

import PIL.Image
import pytest
from packaging.requirements import Requirement

from benchmarks import gpu_bundle, gpu_check
from diffusers_pq import devices
from diffusers_pq.files import read_json, write_json


ROOT = Path(__file__).parents[1]
SPEED = {"picture_seconds": 1.0, "speed_ratio": 1.0}


@pytest.mark.parametrize("small", [False, True], ids=["full", "small"])
@pytest.mark.parametrize("name", gpu_check.PARTS)
def test_every_part_is_a_command_that_its_program_takes(name, small, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(devices, "usable_device", str)
    args = gpu_check.parse_args(["--device", "cpu" if small else "cuda", *(["--small"] if small else [])])
    python, script, *flags = gpu_check.command_of(name, args, tmp_path)
    if script == "-m":
        assert flags[0] == "pytest" and all((ROOT / flag).exists() for flag in flags if flag.startswith("tests/"))
        return
    taken = runpy.run_path(str(ROOT / script))["parse_args"](flags)
    assert (taken.device, taken.output_dir) == (args.device, tmp_path)


def test_a_part_whose_time_is_over_is_ended_with_what_it_started(tmp_path, monkeypatch):
    program = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    program += f"; open({str(tmp_path / 'child')!r}, 'w').write(str(p.pid)); time.sleep(60)"
    monkeypatch.setattr(gpu_check, "SECONDS_TO_END", 1)
    started = time.monotonic()
    assert gpu_check.run([sys.executable, "-c", program], 4, tmp_path / "log") is None
    assert time.monotonic() - started < 5
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    pytest.fail(f"{child} still runs: {os.listdir('/proc')}")


class Clock:
    """Time that passes only in parts: each takes all that it is given, or `seconds`."""

    def __init__(self, seconds=float("inf")):
        self.now, self.seconds, self.given = 1000.0, seconds, []

    def monotonic(self):
        return self.now

    def run(self, command, seconds, log):
        Path(log).touch()
        self.given.append(seconds)
        self.now += min(seconds, self.seconds)
        return 0 if self.seconds < seconds else None


def parts_by_the_clock(clock, tmp_path, monkeypatch, *flags):
    monkeypatch.setattr(gpu_check, "run", clock.run)
    monkeypatch.setattr(gpu_check, "time", clock)
    record = {"parts": {}}
    gpu_check.run_parts(gpu_check.parse_args(["--device", "cpu", *flags]), tmp_path, record)
    return record["parts"]


def test_all_ends_in_time_even_if_no_part_does(tmp_path, monkeypatch):
    clock = Clock()
    parts = parts_by_the_clock(clock, tmp_path, monkeypatch)
    assert clock.now - 1000 <= 60 * 5.5
    worth = [name for name in parts if parts[name]["status"] == "out of time"]
    assert worth[:4] == ["tests", "quantizer_speed", "generation_speed", "training_speed"]
    assert {parts[name]["status"] for name in [*parts][len(worth) :]} == {"no time left"}
    assert parts.keys() == gpu_check.PARTS.keys() == read_json(tmp_path / "gpu_check.json")["parts"].keys()


def test_fast_parts_leave_their_time_to_others(tmp_path, monkeypatch):
    clock = Clock(seconds=15)
    parts = parts_by_the_clock(clock, tmp_path, monkeypatch)
    assert {part["status"] for part in parts.values()} == {0}
    shares = [part.seconds for part in gpu_check.PARTS.values()]
    assert clock.given == [min(share, 330 - 15 * number) for number, share in enumerate(shares)]


def test_a_part_alone_leaves_what_others_found(tmp_path, monkeypatch):
    write_json(tmp_path / "gpu_check.json", {"parts": {"tests": {"status": 0}}})
    monkeypatch.setattr(gpu_check, "run", lambda command, seconds, log: Path(log).touch())
    flags = ["--device", "cpu", "--output_dir", str(tmp_path)]
    assert gpu_check.main(gpu_check.parse_args([*flags, "--parts", "sdxl"])) == 1
    statuses = {name: part["status"] for name, part in read_json(tmp_path / "gpu_check.json")["parts"].items()}
    assert statuses == {"tests": 0, "sdxl": "out of time"}


def test_parts_are_saved_one_by_one_and_the_goals_come_last(tmp_path, monkeypatch, capsys):
    def run(command, seconds, log):
        Path(log).write_text("what it printed")
        if "quantizer_speed.py" in command[1]:
            assert "generation_speed" not in read_json(tmp_path / "gpu_check.json")["parts"]
            return None
        if "generation_speed.py" in command[1]:
            systems = {"SD 2.1": {"batches": {"1": {"eager": SPEED, "graphed": {"error": "no"}}}}}
            systems["PQSD-Quick"] = {"batches": {"1": {"eager": {"picture_seconds": 0.2, "speed_ratio": 5.0}}}}
            write_json(tmp_path / "generation_speed.json", {"systems": systems})
        else:
            case = '<testcase name="a"/><testcase name="b"><failure/></testcase>'
            case += '<testcase name="c"><skipped message="DeepSpeed is not installed"/></testcase>'
            counts = 'tests="3" failures="1" errors="0" skipped="1"'
            (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite {counts}>{case}</testsuite></testsuites>")
        return 0

    monkeypatch.setattr(gpu_check, "run", run)
    flags = ["--device", "cpu", "--output_dir", str(tmp_path)]
    parts = ["--parts", "tests", "quantizer_speed", "generation_speed"]
    assert gpu_check.main(gpu_check.parse_args([*flags, *parts])) == 1, "a part was out of time"
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    assert record["parts"]["quantizer_speed"]["status"] == "out of time"
    assert record["parts"]["quantizer_speed"]["end_of_log"] == "what it printed"
    assert record["parts"]["tests"]["result"]["failed"] == ["b"]
    verdicts = {goal["what"]: (goal["found"], goal["verdict"]) for goal in record["goals"]}
    assert verdicts["tests that failed"] == (1, "missed")
    assert verdicts["speed of PQSD-Quick over SD 2.1, 1 at once"] == (5.0, "met")
    assert verdicts["speed of PQSD-HR over SD 2.1, 1 at once"] == (None, "not measured")
    printed = capsys.readouterr().out
    assert "goal      4  found        5  met" in printed and "failed: b\n" in printed
    assert "not run: c: DeepSpeed is not installed" in printed


def test_goals_are_read_from_what_the_benchmarks_write(tmp_path, monkeypatch):
    row = {"eager": {"quantisation": 1e-4, "share": 0.005}}
    models = [{"model": gpu_check.F8, "batch_size": size, "modes": row} for size in (1, 16)]
    modes = {
        "ours": {"eager": {"seconds": 2e-4}, "graphed": {"seconds": 1e-4}},
        "flash-kmeans": {"eager": {"seconds": 4e-4}},
    }
    search = [{"N": 16384, "S": 64, "modes": modes}]
    steps = {"train_pqgan, PQ (S=64)": {"seconds": 0.2, "speed_ratio": 1.5}}
    steps["train_pqgan, PQ (S=64), channels_last"] = {"seconds": 0.16, "speed_ratio": 1.9}
    steps["train_pqgan, PQ (S=64), compiled"] = {"seconds": 0.1, "speed_ratio": 3.0, "first_seconds": 61}
    parts = {"quantizer_speed": {"result": {"models": models, "search": search}}}
    parts["training_speed"] = {"result": {"steps": steps, "batch_size": 20}}
    settings = {"graphed": 3.0, "graphed channels_last": 2.0, "compiled_graphed": 2.5}
    base = {name: {"picture_seconds": seconds, "speed_ratio": 1.0} for name, seconds in settings.items()}
    quick = {name: {"picture_seconds": 1.0, "speed_ratio": 4.0} for name in settings}
    quick["graphed channels_last"]["speed_ratio"] = 4.5
    systems = {"SD 2.1": {"batches": {"16": base}}, "PQSD-Quick": {"batches": {"16": quick}}}
    parts["generation_speed_16"] = {"result": {"systems": systems}}
    found = {what: (value, verdict) for what, _, value, verdict in gpu_check.judge(parts)}
    assert found["quantising one picture, F = 8, 256 px (ms)"] == (pytest.approx(0.1), "met")
    assert found["search in 16,384 latent pixels (ms)"] == (pytest.approx(0.1), "met")
    assert found["the same by flash-kmeans (ms)"] == (pytest.approx(0.4), "")
    assert found["quantisation in a reconstruction, 16 pictures"] == (0.005, "missed")
    assert found["training speed over diffusers' loop"] == (3.0, "met")
    assert found["training, pictures a second"] == (pytest.approx(200), "met")
    assert found["compiling the training, with its first step (s)"] == (61, "missed")
    assert found["channels_last, speed of training"] == (pytest.approx(1.25), "")
    assert found["channels_last, speed of SD 2.1, 16 at once"] == (pytest.approx(1.5), "")
    assert found["speed of PQSD-Quick over SD 2.1, 16 at once"] == (4.5, "met"), "where SD 2.1 is fastest"


def test_tests_that_were_all_skipped_say_nothing():
    def verdict(skipped):
        result = {"tests": 3, "skipped": skipped, "failures": 0, "errors": 0}
        (row,) = (row for row in gpu_check.judge({"tests": {"result": result}}) if row[0] == "tests that failed")
        return row[3]

    assert (verdict(3), verdict(2)) == ("not measured", "met")


def test_the_bundle_has_the_versions_that_are_installed_here():
    wanted = {requirement.name: requirement for requirement in map(Requirement, gpu_bundle.requirements())}
    assert {"diffusers", "datasets", "torch-fidelity", "importlib-metadata"} <= wanted.keys()
    assert (
        str(wanted["diffusers"].specifier).startswith("==0.42") and str(wanted["importlib-metadata"].specifier) == "<9"
    )


def test_deepspeed_is_built_without_compiled_operators(tmp_path, monkeypatch):
    calls = []

    def run(command, env):
        calls.append((command, env["DS_BUILD_OPS"]))
        return argparse.Namespace(returncode=int("deepspeed==0.19.8" in command))

    monkeypatch.setattr(gpu_bundle.subprocess, "run", run)
    with pytest.raises(OSError, match="could not fetch the wheels: .* wheel .*deepspeed"):
        gpu_bundle.download(tmp_path, "3.12")
    assert [operators for _, operators in calls] == ["0"] * 3 and "--platform" not in calls[2][0]
    assert "--no-deps" in calls[0][0] and "--no-deps" not in calls[1][0] and "pydantic" in calls[1][0]


def test_packed_pictures_are_small_and_keep_their_captions(tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    PIL.Image.linear_gradient("L").save(tmp_path / "data" / "train" / "a.png")
    line = json.dumps({"file_name": "a.png", "text": "a gradient"})
    (tmp_path / "data" / "train" / "metadata.jsonl").write_text(line + "\n")
    gpu_bundle.pack_pictures(tmp_path / "data", 32, tmp_path / "data.tar.gz")
    with tarfile.open(tmp_path / "data.tar.gz") as archive:
        archive.extractall(tmp_path / "there", filter="data")
    (row,) = (tmp_path / "there" / "train" / "metadata.jsonl").read_text().splitlines()
    assert json.loads(row) == {"file_name": "a.webp", "text": "a gradient"}
    with PIL.Image.open(tmp_path / "there" / "train" / "a.webp") as picture:
        assert picture.size == (32, 32)


def test_a_bundle_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_bundle, "download", lambda folder, version: (folder / "a.whl").write_bytes(b"0" * 10))
    monkeypatch.setattr(gpu_bundle, "MOST_BYTES", 5)
    with pytest.raises(ValueError, match="is more than"):
        gpu_bundle.main(gpu_bundle.parse_args(["--output_dir", str(tmp_path)]))
    with pytest.raises(ValueError, match="prepare-data"):
        gpu_bundle.main(gpu_bundle.parse_args(["--output_dir", str(tmp_path), "--data", str(tmp_path / "none")]))
