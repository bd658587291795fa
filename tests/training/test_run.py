from argparse import Namespace

import pytest
import torch

from diffusers_pq.training.run import build_lr_scheduler


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
