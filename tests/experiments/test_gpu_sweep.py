"""The sweep and the training that are prepared for a card, in small on a CPU."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator

from diffusers_pq.metrics import pooled_psnr


EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A captioned imagefolder of 6 + 3 pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 3)):
        (folder / split).mkdir()
        lines = []
        for number in range(count):
            small = PIL.Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            small.resize((40, 40), PIL.Image.Resampling.BICUBIC).save(folder / split / f"{number}.png")
            lines.append(json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def load(name):
    return runpy.run_path(str(EXPERIMENTS / f"{name}.py"))


def test_the_sweep_saves_each_training_goes_on_where_it_was_and_ends_with_a_table(pictures, tmp_path, capsys):
    script = load("gpu_sweep")
    flags = ["--device", "cpu", "--small", "--mixed_precision", "no"]
    flags += ["--data_dir", str(pictures), "--output_dir", str(tmp_path)]
    args = script["parse_args"](flags)
    script["main"](args)
    record = json.loads((tmp_path / "gpu_sweep.json").read_text())
    kinds = [(run["d"], run["S"], run["start"]) for run in record["runs"]]
    assert kinds == [(8, 1, "normal"), (8, 4, "normal"), (8, 8, "normal"), (8, 1, "kmeans, re-seeded")]
    for run in record["runs"]:
        assert run["interval"][0] <= run["psnr_pooled"] <= run["interval"][1] and run["pictures"] == 3
    assert "| 8 | 4 | normal |" in capsys.readouterr().out
    kept = record["runs"][1:]
    (tmp_path / "gpu_sweep.json").write_text(json.dumps(record | {"runs": kept}))
    script["main"](args)
    again = json.loads((tmp_path / "gpu_sweep.json").read_text())["runs"]
    assert again[:3] == kept and again[3]["psnr_pooled"] == record["runs"][0]["psnr_pooled"]
    with pytest.raises(ValueError, match="other settings"):
        script["main"](script["parse_args"]([*flags, "--learning_rate", "0.1"]))


def test_the_full_sweep_compares_the_starts_of_vector_quantisation(pictures):
    script = load("gpu_sweep")
    found = [*script["configurations"](script["parse_args"](["--device", "cpu"]))]
    assert len(found) == 2 * 3 * 4 and [one["seed"] for one in found] == sorted(one["seed"] for one in found)
    assert {(one["d"], one["S"]) for one in found if one["d"] == 128} == {(128, 1), (128, 64), (128, 128)}


def test_the_steps_are_those_that_the_time_is_enough_for(pictures):
    script = load("gpu_sweep")
    args = script["parse_args"](["--device", "cpu", "--small", "--data_dir", str(pictures), "--minutes", "3"])
    clock = iter([100.0, 105.0])  # half a second a step
    crops, affordable_steps = script["load_crops"](args, "train", 32), script["affordable_steps"]
    affordable_steps.__globals__["time"] = SimpleNamespace(perf_counter=lambda: next(clock))
    steps = affordable_steps(crops, 9, args, Accelerator(cpu=True))
    assert steps == int(0.85 * 180 / 9 / 0.5)


def test_batches_are_crops_that_may_be_mirrored():
    script = load("gpu_sweep")
    args = script["parse_args"](["--device", "cpu", "--resolution", "4", "--batch_size", "50"])
    # Each value says where it was.
    whole = torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).view(2, 3, 8, 8)
    batch = script["draw_batch"](whole, args, torch.Generator().manual_seed(0))
    levels = ((batch + 1) * 127.5).round().to(torch.uint8)
    windows = whole.unfold(2, 4, 1).unfold(3, 4, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    plain = (levels[:, None] == windows).flatten(2).all(2).any(1)
    mirrored = (levels.flip(3)[:, None] == windows).flatten(2).all(2).any(1)
    assert (plain ^ mirrored).all() and 10 < int(mirrored.sum()) < 40


def test_the_interval_is_of_the_pooled_error():
    script = load("gpu_sweep")
    decibels = [20.0, 30.0, 40.0] * 10
    low, high = script["bootstrap"](decibels)
    assert low < pooled_psnr(decibels, [1] * 30) < high and high - low < 5
    assert script["bootstrap"]([25.0] * 5) == pytest.approx([25.0, 25.0])
