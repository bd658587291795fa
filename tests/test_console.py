"""How commands and scripts end on errors that users can cause, and on those that they cannot."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffusers_pq import __version__, cli, console
from diffusers_pq.console import one_line_errors, progress_on_terminals, report
from diffusers_pq.devices import usable_device


ROOT = Path(__file__).parents[1]
SCRIPTS = [
    path
    for folder in ("training_scripts", "experiments", "benchmarks")
    for path in sorted(ROOT.glob(f"{folder}/*.py"))
    if "__main__" in path.read_text()
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_reports_expected_errors_in_one_line(script):
    end = script.read_text().partition('if __name__ == "__main__":\n')[2]
    assert end.startswith("    with one_line_errors():\n") and len(end.splitlines()) == 2


EXPECTED = [
    ValueError("`--resolution` must be\n  at least 1"),
    FileNotFoundError(2, "No such file or directory", "absent"),
    TypeError("no codes"),
    ModuleNotFoundError("No module named 'wandb'"),
    FloatingPointError("The gradient was not finite"),
    StrictDataclassError("hidden_size must be positive"),
    subprocess.CalledProcessError(1, ["train_pqgan.py"]),
    json.JSONDecodeError("Expecting value", "{", 1),
    DatasetGenerationError("An error occurred while generating the dataset"),
    SafetensorError("Error while deserializing header"),
    huggingface_hub.utils.httpx.ConnectError("Name or service not known"),
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("Found no NVIDIA driver on your system."),
    AssertionError("Torch not compiled with CUDA enabled"),
]


@pytest.mark.parametrize("error", EXPECTED, ids=repr)
def test_an_expected_error_is_one_line_that_says_something(error, capsys):
    assert report(error, "program") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("program: ") and len(line) > len("program: ") + 5


def test_an_error_in_a_worker_of_a_loader_is_that_error(capsys):
    loader = DataLoader([0, 1], collate_fn=_bad_caption, num_workers=1)
    with pytest.raises(ValueError) as error:
        next(iter(loader))
    report(error.value, "program")
    assert capsys.readouterr().err == "program: one is: 7\n"


def _bad_caption(batch):
    raise ValueError("one is: 7")


@pytest.mark.parametrize("error", [KeyError("key"), AttributeError("no"), RuntimeError("size mismatch")], ids=repr)
def test_a_fault_of_the_program_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        report(error, "program")


def test_running_out_of_memory_says_what_helps(capsys):
    report(torch.OutOfMemoryError("CUDA out of memory."), "program")
    assert "smaller pictures or batches" in capsys.readouterr().err


def test_the_environment_brings_the_traceback_back(monkeypatch):
    monkeypatch.setenv("DIFFUSERS_PQ_TRACEBACK", "1")
    with pytest.raises(ValueError, match="bad"), one_line_errors():
        raise ValueError("bad")


def test_of_several_processes_the_main_one_speaks_first(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(console.time, "sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        report(ValueError("bad"), "program")
    assert capsys.readouterr().err == "program: bad\nprogram (process 1): bad\n"
    assert len(waited) == 1 and waited[0] > 1


def test_an_interrupt_ends_quietly(capsys):
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise KeyboardInterrupt
    assert end.value.code == 130 and capsys.readouterr().err == ""


BARS = ["tqdm", "tqdm.auto", "datasets.utils", "diffusers.utils.logging", "huggingface_hub.utils", "torch.hub"]
BARS += ["transformers.utils.logging"]


@pytest.mark.parametrize("module", BARS)
def test_progress_bars_of_all_libraries_stay_out_of_files(module, capsys):
    bar = importlib.import_module(module).tqdm
    with progress_on_terminals():
        list(bar(range(3), disable=False))
    assert capsys.readouterr().err == ""
    list(bar(range(3)))
    assert "3/3" in capsys.readouterr().err, "elsewhere they are as their libraries have them"


def test_a_dataset_is_read_into_a_file_without_a_bar(capsys):
    rows = Dataset.from_dict({"number": [1, 2]})
    with progress_on_terminals():
        rows.map(lambda row: {"double": 2 * row["number"]})
    assert capsys.readouterr().err == ""


def test_progress_bars_are_shown_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_on_terminals():
        list(tqdm(range(3)))
    assert "3/3" in capsys.readouterr().err


def test_scripts_and_the_command_hide_progress_bars_in_files(monkeypatch, capsys):
    with one_line_errors():
        list(tqdm(range(3)))
    monkeypatch.setattr(cli, "_push", lambda args: list(tqdm(range(3))))
    assert cli.main(["push", "folder", "me/model"]) == 0
    assert capsys.readouterr().err == ""


def test_an_error_has_a_line_of_its_own_beside_an_unfinished_progress_bar(capsys):
    for _ in tqdm(range(3)):
        report(ValueError("bad"), "program")
        break
    assert "program: bad" in capsys.readouterr().err.replace("\r", "\n").splitlines()


def test_a_script_under_accelerate_launch_ends_with_its_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from diffusers_pq.console import one_line_errors\nwith one_line_errors():\n    raise ValueError('bad')\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes=1"]
    result = subprocess.run([*launch, str(script)], capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == "script.py: bad"


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "meta", "mps" if sys.platform == "linux" else "xpu"])
def test_a_device_that_cannot_be_used_is_named(name):
    with pytest.raises(ValueError, match=f"device '{name}'"):
        usable_device(name)


def test_a_device_that_can_be_used_is_returned():
    assert usable_device("cpu") == "cpu"


@pytest.mark.parametrize("command", ["reconstruct", "compress", "decompress"])
def test_a_command_names_a_bad_device_before_anything_else(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "absent.png", "--model", "absent", "--output", "new.png", "--device", "gpu"])
    assert end.value.code == 2 and "--device: There is no device 'gpu'" in capsys.readouterr().err


def test_the_command_says_its_version():
    code = "import sys; from diffusers_pq.cli import main; sys.exit(main(['--version']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"diffusers-pq {__version__}\n")
