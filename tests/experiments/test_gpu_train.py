"""What `make gpu-train` runs, without its trainings, which `test_training.py` and others have."""

import json
import runpy
import tarfile
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file, save_file


ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    return runpy.run_path(str(ROOT / "experiments" / "gpu_train.py"))


def start(script, tmp_path, *flags):
    given = ["--device", "cpu", "--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), *flags]
    return script["parse_args"](given)


def programs(commands):
    """The script and the values of its flags, of commands of accelerate or of Python alone."""
    for command in commands:
        path, flags = command[1], command[2:]
        if path == "-m":
            launch = launch_command_parser().parse_args(command[3:])
            path, flags = launch.training_script, launch.training_script_args
        program = runpy.run_path(path)
        yield Path(path).name, program["parse_args"](flags)


def stand_in(script, folder, ran):
    """Takes the place of processes: a dry run says half a second a step; a training leaves a model."""

    def run_together(commands, logs):
        for (name, options), log in zip(programs(commands), logs):
            ran.append((name, options))
            log.parent.mkdir(parents=True, exist_ok=True)
            if getattr(options, "dry_run", False):
                log.write_text("time: 0.5 s a step, 1 hours for 1000 steps\n")
                continue
            output = Path(options.output_dir)
            output.mkdir(parents=True, exist_ok=True)
            weights = {"weight": torch.ones(4), "quantizer.codebooks": torch.ones(3)}
            save_file(weights, output / "diffusion_pytorch_model.safetensors")
            (output / "model_index.json").write_text("{}")

    script["main"].__globals__["run_together"] = run_together


def test_all_stages_are_planned_run_and_packed(script, tmp_path):
    ran = []
    stand_in(script, tmp_path, ran)
    args = start(script, tmp_path, "--minutes", "10")
    (tmp_path / "data").mkdir()
    script["main"](args)
    names = [(name, getattr(options, "dry_run", False)) for name, options in ran]
    pqgan, pqsd = "train_pqgan.py", "train_pqsd.py"
    assert names == [
        *((pqgan, True), (pqgan, True), (pqgan, False), (pqgan, False)),
        *(("create_stable_diffusion.py", False), (pqsd, True), (pqsd, False)),
        *(("encode_dataset.py", False), (pqsd, True), (pqsd, True), (pqsd, False), (pqsd, False)),
    ]
    trained = [options for (name, options), (_, is_dry) in zip(ran, names) if name in (pqgan, pqsd) and not is_dry]
    # Half a second a step: 3 of 10 minutes are 360 steps, one minute is 120.
    assert trained[0].max_train_steps == 360 and trained[0].checkpointing_steps == 120
    assert trained[0].resume_from_checkpoint == "latest"
    with tarfile.open(tmp_path / "out" / "weights.tar.000") as archive:
        archive.extractall(tmp_path / "there", filter="data")
    weights = load_file(tmp_path / "there" / "copy" / "diffusion_pytorch_model.safetensors")
    assert weights["weight"].dtype == torch.float16 and weights["quantizer.codebooks"].dtype == torch.float32
    assert not (tmp_path / "there" / "random" / "diffusion_pytorch_model.safetensors").exists()
    assert (tmp_path / "there" / "random" / "model_index.json").exists()


def test_it_goes_on_with_what_is_not_done_by_the_same_plan(script, tmp_path):
    ran = []
    stand_in(script, tmp_path, ran)
    args = start(script, tmp_path)
    (tmp_path / "data").mkdir()
    script["main"](args)
    state = json.loads((tmp_path / "out" / "gpu_train.json").read_text())
    (tmp_path / "out" / "copy" / "model_index.json").unlink()
    (tmp_path / "out" / "codes").mkdir(exist_ok=True)
    ran.clear()
    script["main"](args)
    (again,) = ran
    assert again[0] == "train_pqsd.py" and str(again[1].output_dir).endswith("copy")
    assert json.loads((tmp_path / "out" / "gpu_train.json").read_text())["plans"] == state["plans"]
    with pytest.raises(ValueError, match="other settings"):
        script["main"](start(script, tmp_path, "--minutes", "3"))


def test_a_training_that_fails_is_named_once_all_have_ended(script, tmp_path):
    logs = [tmp_path / "good.txt", tmp_path / "bad.txt"]
    commands = [["sh", "-c", "sleep 0.2; echo good"], ["sh", "-c", "echo broken; exit 3"]]
    with pytest.raises(OSError, match="bad.txt"):
        script["run_together"](commands, logs)
    assert [log.read_text() for log in logs] == ["good\n", "broken\n"]
    with pytest.raises(ValueError, match="does not say how long"):
        script["seconds_a_step"](logs[0])
