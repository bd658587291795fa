import os
import pickle
from contextlib import suppress

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from diffusers_pq.training.checkpoints import (
    _write_manifest,
    find_checkpoint,
    find_damage,
    list_checkpoints,
    load_checkpoint,
    read_record,
    save_checkpoint,
)


def prepared(width=2):
    """An accelerator with a model, optimiser and scheduler, and the model's average."""
    accelerator = Accelerator(cpu=True)
    layer = torch.nn.Linear(width, 1)
    optimizer = torch.optim.AdamW(layer.parameters())
    accelerator.prepare(layer, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    ema = EMAModel(layer.parameters())
    accelerator.register_for_checkpointing(ema)
    return accelerator, layer, ema


@pytest.fixture
def folder(tmp_path):
    accelerator, layer, ema = prepared()
    for step, value in ((2, 2.0), (4, 4.0)):
        layer.weight.data.fill_(value)
        ema.shadow_params[0].fill_(-value)
        save_checkpoint(accelerator, str(tmp_path), step, None, {"step": step})
    return tmp_path


def test_a_checkpoint_gives_back_models_states_and_record(folder):
    accelerator, layer, ema = prepared()
    load_checkpoint(accelerator, folder / "checkpoint-4")
    assert (layer.weight == 4).all() and (ema.shadow_params[0] == -4).all()
    assert read_record(folder / "checkpoint-2") == {"step": 2}
    (folder / "checkpoint-2" / "run.json").unlink()
    assert read_record(folder / "checkpoint-2") == {}


@pytest.mark.parametrize(
    "content, damage",
    [
        (b"", "manifest.json cannot be read"),
        (b'{"model.safetensors": ', "manifest.json cannot be read"),
        (b"[]", "manifest.json cannot be read"),
        (b"\xff\xfe", "manifest.json cannot be read"),
        (b"{}", "manifest.json lists no files"),
        (b'{"model.safetensors": 1}', "model.safetensors is not what was written"),
        (None, "manifest.json is missing"),
    ],
)
def test_a_checkpoint_with_a_damaged_manifest_is_passed_over(folder, content, damage, caplog):
    manifest = folder / "checkpoint-4" / "manifest.json"
    manifest.unlink()
    if content is not None:
        manifest.write_bytes(content)
    assert find_damage(folder / "checkpoint-4") == damage
    assert find_checkpoint(str(folder), "latest") == folder / "checkpoint-2"
    assert f"is damaged ({damage}): trying the one before" in caplog.text
    with pytest.raises(ValueError, match=f"checkpoint-4` is damaged: {damage}"):
        find_checkpoint(str(folder), "checkpoint-4")


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


PICKLES = ("custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl", "scheduler.bin")


def poison(checkpoint, name, mark, save=torch.save):
    """Put code into a pickle, and let the manifest vouch for it."""
    with (checkpoint / name).open("wb") as file:
        save({"state": Hostile(mark)}, file)
    (checkpoint / "manifest.json").unlink()
    _write_manifest(checkpoint)
    assert find_damage(checkpoint) is None


@pytest.mark.parametrize("save", [torch.save, pickle.dump], ids=["zip", "pickle"])
@pytest.mark.parametrize("name", PICKLES)
def test_code_in_a_pickle_is_refused_and_not_run(folder, name, save, tmp_path):
    checkpoint, mark = folder / "checkpoint-4", tmp_path / "mark"
    assert sorted(path.name for path in checkpoint.iterdir() if path.suffix in (".bin", ".pkl")) == list(PICKLES)
    poison(checkpoint, name, mark, save)
    accelerator, layer, ema = prepared()
    with pytest.raises(ValueError, match=f"{name} is not read: it may hold code"):
        load_checkpoint(accelerator, checkpoint)
    assert not mark.exists() and not (layer.weight == 4).any()
    with suppress(RuntimeError):  # which torch raises after a bare pickle
        torch.load(checkpoint / name, weights_only=False)
    assert mark.exists(), "the file is hostile"


def test_a_checkpoint_of_other_models_or_states_is_one_line(folder):
    accelerator, _, _ = prepared(width=3)
    with pytest.raises(ValueError, match="checkpoint-4 is not of a run like this one: give the flags"):
        load_checkpoint(accelerator, folder / "checkpoint-4")
    accelerator, _, ema = prepared()
    accelerator.register_for_checkpointing(ema)
    with pytest.raises(ValueError, match="checkpoint-4 is not of a run like this one"):
        load_checkpoint(accelerator, folder / "checkpoint-4")


def test_the_limit_on_checkpoints_spares_the_one_just_written(tmp_path):
    (tmp_path / "checkpoint-6").mkdir()
    accelerator = Accelerator(cpu=True)
    for step in (3, 5):
        save_checkpoint(accelerator, str(tmp_path), step, total_limit=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-6"]
