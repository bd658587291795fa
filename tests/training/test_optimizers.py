import sys
from types import SimpleNamespace

import pytest
import torch

from diffusers_pq.data.loaders import build_train_loader
from diffusers_pq.training.optimizers import build_optimizer
from diffusers_pq.training.options import DataOptions, OptimisationOptions


def parameters():
    return [torch.nn.Parameter(torch.ones(2))]


class Recorded(torch.optim.SGD):
    """Stands in for the optimiser of a package."""

    def __init__(self, params, lr, **options):
        super().__init__(params, lr)
        self.options = options


def test_adamw_without_weight_decay_is_adam():
    ours, adam = ([torch.nn.Parameter(torch.ones(2))] for _ in range(2))
    optimizers = (
        build_optimizer(OptimisationOptions(adam_beta1=0.5), ours, 0.1),
        torch.optim.Adam(adam, 0.1, (0.5, 0.999)),
    )
    for _ in range(3):
        for (parameter,), optimizer in zip((ours, adam), optimizers):
            parameter.grad = parameter.detach() ** 2 - 0.3
            optimizer.step()
    torch.testing.assert_close(ours[0], adam[0])


def test_adam_in_8_bits_and_prodigy_are_those_of_their_packages(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace(AdamW8bit=Recorded)))
    monkeypatch.setitem(sys.modules, "prodigyopt", SimpleNamespace(Prodigy=Recorded))
    optimizer = build_optimizer(OptimisationOptions(use_8bit_adam=True), parameters(), 0.1, 0.01)
    assert optimizer.options == {"betas": (0.9, 0.999), "weight_decay": 0.01}
    optimizer = build_optimizer(OptimisationOptions(optimizer="prodigy"), parameters(), 1.0)
    assert optimizer.options["decouple"] and optimizer.options["safeguard_warmup"] and not caplog.text
    build_optimizer(OptimisationOptions(optimizer="prodigy"), parameters(), 1e-4)
    assert "Prodigy finds the learning rate itself" in caplog.text


@pytest.mark.parametrize(
    ("options", "package"), [({"use_8bit_adam": True}, "bitsandbytes"), ({"optimizer": "prodigy"}, "prodigyopt")]
)
def test_a_missing_package_is_named(options, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs the package {package}, which is not installed: `pip install"):
        build_optimizer(OptimisationOptions(**options), parameters(), 1.0)


def test_options_that_contradict_each_other_are_named():
    with pytest.raises(ValueError, match="--use_8bit_adam is of adamw: leave it out with --optimizer prodigy"):
        OptimisationOptions(use_8bit_adam=True, optimizer="prodigy")
    with pytest.raises(ValueError, match="--dataloader_prefetch needs --dataloader_num_workers"):
        DataOptions(dataloader_prefetch=4)


def test_workers_read_as_far_ahead_as_they_are_told(monkeypatch):
    from accelerate import Accelerator
    from datasets import Dataset

    loader = build_train_loader(
        Dataset.from_dict({"a": [1]}),
        lambda row, _: row["a"],
        Accelerator(cpu=True),
        1,
        num_workers=1,
        prefetch_factor=5,
    )
    assert loader.prefetch_factor == 5
