import json
import time

import pytest
from scripts import start_script

from diffusers_pq.training import output_folder
from diffusers_pq.training.output_folder import OutputFolder


HOLD = """
import os, sys, time
from pathlib import Path
from diffusers_pq.training.output_folder import OutputFolder

folder = OutputFolder(sys.argv[1])
folder.lock()
if os.fork() == 0:  # as the workers of a loader
    time.sleep(5)
    os._exit(0)
Path(sys.argv[1], "locked").touch()
time.sleep(60)
"""


def test_a_second_run_is_kept_out_until_the_first_ends_or_dies(tmp_path, monkeypatch):
    monkeypatch.setattr(output_folder, "_PATIENCE", 0.1)
    (tmp_path / "hold.py").write_text(HOLD)
    run = tmp_path / "run"
    first = start_script(tmp_path / "hold.py", run)
    while not (run / "locked").exists():
        time.sleep(0.01)
    folder = OutputFolder(str(run))
    try:
        with pytest.raises(ValueError, match=r"--output_dir .*run: another run is writing there"):
            folder.lock()
    finally:
        first.kill()
        first.join()
    folder.lock()
    OutputFolder(str(run)).lock()  # after an error the same process may try again
    folder.unlock()


@pytest.mark.parametrize("name", ["training_config.json", "config.json", "a.safetensors", "checkpoint-2/", "best/"])
def test_a_folder_with_a_run_or_a_model_is_in_use(tmp_path, name):
    folder = OutputFolder(str(tmp_path))
    (tmp_path / "notes.txt").touch()
    (tmp_path / "logs").mkdir()
    folder.check_unused()
    (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="is in use: go on with `--resume_from_checkpoint latest`, start anew with"):
        folder.check_unused()


@pytest.fixture
def used(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10", "unet", "vae", "best", "logs", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "best" / "validation.json").write_text(json.dumps({"step": 10}))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "P", "unet": [], "vae": []}))
    (tmp_path / "notes.txt").touch()
    return tmp_path


def names(folder):
    return {path.name for path in folder.iterdir()}


NOT_OURS = {"logs", "mine", "notes.txt"}
MODEL = {"model_index.json", "unet", "vae"}


def test_a_new_start_sets_the_run_before_aside(used, caplog):
    OutputFolder(str(used)).make_room(None)
    assert names(used) == NOT_OURS | {"old-run-1"}
    assert names(used / "old-run-1") == MODEL | {"checkpoint-2", "checkpoint-10", "best"}
    assert "Set aside in" in caplog.text and "checkpoint-10" in caplog.text
    (used / "vae").mkdir()
    OutputFolder(str(used)).make_room(None)
    assert names(used) == NOT_OURS | {"old-run-1", "vae"}, "a run that was stopped at once leaves nothing to keep"
    (used / "checkpoint-5").mkdir()
    OutputFolder(str(used)).make_room(used / "old-run-1" / "checkpoint-2")
    assert names(used / "old-run-2") == {"checkpoint-5", "vae"}


@pytest.mark.parametrize("keep_best", [False, True])
@pytest.mark.parametrize("step", [2, 10])
def test_going_back_sets_aside_what_came_later(used, step, keep_best):
    OutputFolder(str(used)).make_room(used / f"checkpoint-{step}", keep_best)
    later = {2: {"checkpoint-10"} if keep_best else {"checkpoint-10", "best"}, 10: set()}[step]
    assert (names(used / "old-run-1") if later else set()) == later
    assert not (used / "old-run-1").exists() or names(used / "old-run-1") == later
    assert names(used) >= {"checkpoint-2"} | MODEL | NOT_OURS
