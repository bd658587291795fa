from argparse import Namespace
from pathlib import Path

import PIL.Image
import pytest
import torch
from accelerate.utils import LoggerType

from diffusers_pq.training.options import DataOptions, OptimisationOptions, RunOptions
from diffusers_pq.training.run import (
    build_lr_scheduler,
    create_accelerator,
    load_train_split,
    load_validation_split,
)


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup"])
def test_the_learning_rate_warms_up(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    args = Namespace(lr_scheduler=name, lr_warmup_steps=4, max_train_steps=8)
    scheduler = build_lr_scheduler(args, optimizer, num_processes=1)
    rates = []
    for _ in range(6):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert rates == [0, 0.25, 0.5, 0.75, 1, 1]


@pytest.fixture
def pictures(tmp_path):
    """120 grey pictures, each of another shade, without a `validation` split."""
    for number in range(120):
        PIL.Image.new("L", (8, 8), number).save(tmp_path / f"{number:03d}.png")
    return tmp_path


def shades(rows):
    return [int(Path(row["image"]["path"]).stem) for row in rows]


def test_a_share_of_the_pictures_is_held_back_where_there_is_no_validation_split(pictures):
    data = DataOptions(train_data_dir=str(pictures))
    held_back, rest = shades(load_validation_split(data)), shades(load_train_split(data))
    assert len(held_back) == 3 and sorted(held_back + rest) == list(range(120)) and rest == sorted(rest)
    assert shades(load_validation_split(data)) == held_back
    few = DataOptions(train_data_dir=str(pictures), max_train_samples=10)
    assert len(shades(load_train_split(few))) == 10 and shades(load_validation_split(few)) == held_back
    assert set(shades(load_train_split(few))) < set(rest) and shades(load_train_split(few)) == sorted(
        shades(load_train_split(few))
    )


def test_nothing_is_held_back_if_that_is_asked_for_or_there_is_a_split_or_a_stream(pictures):
    whole = DataOptions(train_data_dir=str(pictures), validation_share=0)
    assert load_validation_split(whole) is None and len(load_train_split(whole)) == 120
    stream = DataOptions(train_data_dir=str(pictures), streaming=True, max_train_samples=5)
    assert load_validation_split(stream) is None and shades(load_train_split(stream)) == list(range(5))
    (pictures / "validation").mkdir()
    PIL.Image.new("L", (8, 8)).save(pictures / "validation" / "7.png")
    data = DataOptions(train_data_dir=str(pictures))
    assert shades(load_validation_split(data)) == [7] and len(load_train_split(data)) == 120


@pytest.mark.parametrize(
    "report_to, message",
    [("wandb", "--report_to wandb: wandb is not installed"), ("tensorboard,paper", "--report_to paper is not known")],
)
def test_a_tracker_that_cannot_be_used_is_named(report_to, message, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_pq.training.run.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    with pytest.raises(ValueError, match=message):
        create_accelerator(OptimisationOptions(), RunOptions(output_dir=str(tmp_path), report_to=report_to))
