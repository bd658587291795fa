from argparse import Namespace

import pytest
import torch
from accelerate.utils import LoggerType

from diffusers_pq.training.options import OptimisationOptions, RunOptions
from diffusers_pq.training.run import build_lr_scheduler, create_accelerator


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


@pytest.mark.parametrize(
    "report_to, message",
    [("wandb", "--report_to wandb: wandb is not installed"), ("tensorboard,paper", "--report_to paper is not known")],
)
def test_a_tracker_that_cannot_be_used_is_named(report_to, message, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_pq.training.run.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    with pytest.raises(ValueError, match=message):
        create_accelerator(OptimisationOptions(), RunOptions(output_dir=str(tmp_path), report_to=report_to))
