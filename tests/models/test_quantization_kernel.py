import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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

    pointers = {"latents": dtype, "codebooks": "fp32", "quantized": dtype, "codes": "i64", "errors": "fp32"}
    numbers = ("subspaces", "size", "pixels", "batch_stride", "channel_stride", "pixel_stride")
    constants = {"DIMENSION": dimension, "PIXELS": _PIXELS, "CODES_ONLY": False}
    signature = {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(numbers, "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    compiled = compile(ASTSource(_quantize_kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    # No spilling: registers hold the sub-vectors.
    assert ".local" not in compiled.asm["ptx"] and compiled.metadata.shared <= 1024


def test_on_a_cpu_the_kernel_is_not_used():
    assert not fused_quantization.is_fusable(torch.zeros(1, 4, 2), torch.zeros(2, 3, 2))
