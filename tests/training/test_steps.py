"""Precisions and ways to compute a training step, on a CPU; tests/gpu/test_training_on_cuda.py has more of them."""

import pytest
import torch
from steps import assert_steps_agree, five_steps


@pytest.fixture(scope="module")
def plain():
    return five_steps("cpu")


@pytest.mark.parametrize(
    ("flags", "bounds"),
    [
        ({"gradient_checkpointing": True}, (1e-5, 1e-4)),
        ({"channels_last": True}, (1e-4, 1e-3)),
        ({"mixed_precision": "bf16"}, (2e-2, 0.2)),
    ],
    ids=str,
)
def test_five_steps_agree_with_those_in_float32(flags, bounds, plain):
    assert_steps_agree(five_steps("cpu", **flags), plain, *bounds)


def test_the_steps_learn_and_others_do_not_agree(plain):
    assert plain["pixel_loss"][-1] < 0.97 * plain["pixel_loss"][0]
    stuck = plain | {"pixel_loss": torch.full_like(plain["pixel_loss"], float(plain["pixel_loss"][0]))}
    with pytest.raises(AssertionError, match="pixel_loss"):
        assert_steps_agree(stuck, plain, 2e-2, 0.2)
