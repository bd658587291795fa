import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_pq import ProductQuantizer
from diffusers_pq.models import fused_quantization


pytest.importorskip("triton", reason="the kernel needs Triton")


def test_the_kernel_under_tritons_interpreter():
    # In a process of its own, since Triton looks for the variable when a kernel is defined.
    cases = Path(__file__).parent / "kernel_cases.py"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(cases)]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]


@pytest.mark.parametrize("dimension, dtype", [(1, "fp32"), (2, "bf16"), (7, "fp16"), (16, "fp32")])
def test_the_kernel_compiles_for_a_gpu_without_one(dimension, dtype):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from diffusers_pq.models.quantization_kernel import _PIXELS, _quantize_kernel

    pointers = {"latents": dtype, "codebooks": "fp32", "quantized": dtype, "codes": "i64", "losses": "fp32"}
    numbers = ("subspaces", "size", "pixels", "batch_stride", "channel_stride", "pixel_stride")
    constants = {"DIMENSION": dimension, "PIXELS": _PIXELS, "CODES_ONLY": False}
    signature = {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(numbers, "i32")
    signature |= dict.fromkeys(constants, "constexpr") | {"loss_scale": "fp32"}
    signature = {name: signature[name] for name in _quantize_kernel.arg_names}
    compiled = compile(ASTSource(_quantize_kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    # No spilling: registers hold the sub-vectors.
    assert ".local" not in compiled.asm["ptx"] and compiled.metadata.shared <= 1024


def test_on_a_cpu_the_kernel_is_not_used():
    assert not fused_quantization.is_fusable(torch.zeros(1, 4, 2), torch.zeros(2, 3, 2))


class Launches(TorchDispatchMode):
    """The operators that are called, but for those that only describe or reserve memory."""

    FREE = {
        "device",
        "view",
        "_unsafe_view",
        "reshape",
        "detach",
        "alias",
        "unsqueeze",
        "expand",
        "permute",
        "transpose",
        "t",
    }

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name not in self.FREE and not name.startswith(("empty", "new_empty")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def on_a_fake_gpu():
    """A quantiser and latents on a CUDA device that is not there: whatever needs a value of theirs raises an error."""
    with FakeTensorMode():
        with torch.device("cuda"):
            made = ProductQuantizer(8, 4, 16), torch.empty(2, 8, 5, 3, requires_grad=True)
        yield made


@pytest.mark.parametrize("is_training", [False, True], ids=["eval", "train"])
def test_on_a_gpu_quantising_is_one_operator_and_waits_for_no_value(is_training, on_a_fake_gpu):
    module, latents = on_a_fake_gpu
    with torch.no_grad(), Launches() as launches:
        output = module.train(is_training)(latents)
    assert launches.names == ["quantize"] and output.codes.shape == (2, 4, 5, 3)


@torch.no_grad()
def test_on_a_gpu_gradients_wait_for_no_value_and_come_without_one_hot_codes(on_a_fake_gpu):
    module, latents = on_a_fake_gpu
    latents = latents.flatten(2)
    codes = latents.new_empty((2, 4, 15), dtype=torch.long)
    # As autograd calls it, whose engine needs a device that is there.
    saved = SimpleNamespace(saved_tensors=(latents, module.codebooks, codes), commitment_beta=0.25)
    saved.needs_input_grad = (True, True, False)
    with Launches() as launches:
        gradients = fused_quantization._backward(saved, torch.empty_like(latents), None, latents.new_empty(()))
    assert [gradient.shape for gradient in gradients[:2]] == [latents.shape, module.codebooks.shape]
    assert launches.names.count("embedding_dense_backward") == 1
    assert not {"one_hot", "scatter_", "index_add_", "_local_scalar_dense", "nonzero"} & {*launches.names}


def test_what_waits_for_a_value_is_seen(on_a_fake_gpu):
    module, latents = on_a_fake_gpu
    with pytest.raises(DataDependentOutputException):
        module.eval().lookup(module(latents).codes)
