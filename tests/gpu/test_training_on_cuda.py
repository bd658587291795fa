"""Five real training steps on CUDA in every precision and way to compute, beside the same steps in float32."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file
from steps import assert_steps_agree, five_steps
from test_train_ldm import SCRIPTS, arguments, workspace  # noqa: F401

from diffusers_pq.training.norms import SingleGroupNorm


pytestmark = pytest.mark.gpu
CONFIGS = SCRIPTS / "accelerate_configs"
BUNDLED_DEEPSPEED = SCRIPTS.parent / "build" / "deepspeed"  # where `make gpu-check BARE=1` installs it


@pytest.fixture(scope="module")
def plain():
    return five_steps("cuda")


@pytest.mark.parametrize(
    ("flags", "bounds"),
    [
        ({"gradient_checkpointing": True}, (1e-3, 1e-2)),
        ({"channels_last": True}, (2e-3, 5e-2)),
        ({"compile": True}, (2e-3, 5e-2)),
        ({"mixed_precision": "bf16"}, (2e-2, 0.2)),
        ({"mixed_precision": "bf16", "compile": True, "channels_last": True}, (2e-2, 0.2)),
        ({"mixed_precision": "bf16", "gradient_checkpointing": True}, (2e-2, 0.2)),
    ],
    ids=str,
)
def test_five_steps_agree_with_those_in_float32(flags, bounds, plain):
    assert_steps_agree(five_steps("cuda", **flags), plain, *bounds)


def test_five_steps_in_fp16_with_a_gradient_scaler_agree_with_those_in_float32(plain):
    found = five_steps("cuda", mixed_precision="fp16")
    # The scaler begins with a scale that may be too large, and lowers it by leaving steps of either optimiser out.
    assert found["skipped"] <= 5 and found["pixel_loss"].isfinite().all()
    if not found["skipped"]:
        assert_steps_agree(found, plain, 1e-2, 0.1)


def test_a_gpu_takes_the_steps_of_a_cpu(plain):
    assert_steps_agree(plain, five_steps("cpu"), 2e-3, 5e-2)


def test_fused_adam_takes_the_steps_of_the_plain_one(plain, monkeypatch):
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **options: adamw(*args, **options))
    assert_steps_agree(plain, five_steps("cuda"), 2e-3, 5e-2)


def test_norms_of_one_group_have_the_values_and_gradients_of_torchs():
    torch.manual_seed(0)
    norm = nn.GroupNorm(1, 32).cuda()
    x = torch.randn(8, 32, 64, 64, device="cuda", requires_grad=True)
    outputs = norm(x), SingleGroupNorm(norm)(x)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad((output * x.detach()).sum(), x)[0] for output in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def train(folder, output, *launch_flags, script_flags=(), search_path=()):
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch_flags, SCRIPTS / "train_ldm.py"]
    flags = [*arguments(folder, output), "--max_train_steps", 5, "--learning_rate", 1e-3, "--report_to", "none"]
    path = os.pathsep.join([*map(str, search_path), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    environment = os.environ | {"PYTHONPATH": path}
    subprocess.run([*map(str, command), *map(str, flags), *script_flags], check=True, timeout=180, env=environment)
    return load_file(Path(folder, output, "unet", "diffusion_pytorch_model.safetensors"))


@pytest.fixture(scope="module")
def plain_denoiser(workspace):  # noqa: F811
    return train(workspace, "plain", "--num_processes", "1", script_flags=["--mixed_precision", "no"])


@pytest.mark.parametrize("name", ["fsdp", "deepspeed_zero2"])
def test_a_sharded_denoiser_learns_what_a_whole_one_does(name, workspace, plain_denoiser):  # noqa: F811
    search_path = [BUNDLED_DEEPSPEED] if name.startswith("deepspeed") else []
    if search_path and not (importlib.util.find_spec("deepspeed") or (BUNDLED_DEEPSPEED / "deepspeed").is_dir()):
        pytest.skip("DeepSpeed is not installed")
    launch = ["--config_file", CONFIGS / f"{name}.yaml", "--num_machines", 1, "--num_processes", 1]
    found = train(workspace, name, *launch, search_path=search_path)
    for key, expected in plain_denoiser.items():
        # Adam's steps are about as large as the learning rate: five of each bound the difference.
        assert float((found[key].float() - expected).abs().max()) <= 2 * 5 * 1e-3, key
    moved = [float((found[key] - expected).norm() / expected.norm()) for key, expected in plain_denoiser.items()]
    assert sorted(moved)[len(moved) // 2] < 0.05
