"""
Cases of the Triton kernel: test_quantization_kernel.py runs them under Triton's interpreter on a CPU,
test_quantization_on_cuda.py on a GPU.
"""

import os

import pytest
import torch

from diffusers_pq import ProductQuantizer
from diffusers_pq.models import fused_quantization, quantization_kernel, quantizer


INTERPRETED = "TRITON_INTERPRET" in os.environ
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def with_the_kernel(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(quantizer, "is_fusable", lambda latents, codebooks: True)


def reference(module):
    """The same quantiser by the operations that need no kernel."""
    module._is_fusable = lambda latents: False
    return module


def make(channels, subspaces, size, shape=(2, 7, 19), dtype=torch.float32, layout=torch.contiguous_format):
    torch.manual_seed(0)
    module = ProductQuantizer(channels, subspaces, size)
    latents = torch.randn(shape[0], channels, *shape[1:]).to(DEVICE, dtype).contiguous(memory_format=layout)
    return module.to(DEVICE), latents


def brute_force(latents, codebooks):
    vectors = latents.double().flatten(2).unflatten(1, (len(codebooks), -1))
    distances = vectors[:, :, None] - codebooks.detach().double()[None, :, :, :, None]
    return distances.square().sum(3).argmin(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels, subspaces, size", [(6, 6, 5), (8, 4, 17), (9, 3, 32), (14, 2, 33), (16, 1, 7)])
def test_codes_equal_float64_brute_force(channels, subspaces, size, dtype):
    module, latents = make(channels, subspaces, size, dtype=dtype)
    output = module(latents)
    assert output.codes.dtype == torch.long and output.latents.dtype == dtype
    assert torch.equal(output.codes.flatten(2), brute_force(latents, module.codebooks))
    assert torch.equal(fused_quantization.find_codes(latents.flatten(2), module.codebooks), output.codes.flatten(2))
    # The interpreter cuts where a GPU rounds to bfloat16.
    rounding = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0
    torch.testing.assert_close(output.latents, module.lookup(output.codes).to(dtype), rtol=rounding, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_loss_and_gradients_are_those_without_the_kernel(layout):
    module, latents = make(12, 4, 9, layout=layout)
    weight, results = torch.randn_like(latents), []
    for quantize in (module, reference(ProductQuantizer(12, 4, 9).to(DEVICE))):
        quantize.codebooks.data.copy_(module.codebooks.data)
        inputs = latents.clone().requires_grad_()
        output = quantize(inputs)
        ((output.latents * weight).sum() + 3 * output.loss).backward()
        results.append((output.latents.detach(), output.codes, output.loss, inputs.grad, quantize.codebooks.grad))
    torch.testing.assert_close(*results, **({} if INTERPRETED else {"rtol": 1e-4, "atol": 1e-5}))
    assert results[0][0].is_contiguous(memory_format=layout)


class Counted:
    """A kernel that notes its launches."""

    def __init__(self, kernel):
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize("of_codes_alone", [False, True])
@torch.no_grad()
def test_a_call_is_one_launch_of_the_kernel(of_codes_alone, monkeypatch):
    counted = Counted(quantization_kernel._quantize_kernel)
    monkeypatch.setattr(quantization_kernel, "_quantize_kernel", counted)
    module, latents = make(8, 4, 5, shape=(2, 9, 15))
    if of_codes_alone:
        fused_quantization.find_codes(latents.flatten(2), module.codebooks)
    else:
        module(latents)
    assert counted.grids == [(2 * 4 * 2,)], "135 pixels are two programs of each picture and subspace"


def test_of_equally_near_entries_the_first_is_taken():
    module, latents = make(4, 2, 6)
    module.codebooks.data[:, 3:] = module.codebooks.data[:, :3]
    assert int(module(latents).codes.max()) <= 2


def test_a_far_origin_does_not_cost_precision():
    module, latents = make(4, 2, 16)
    module.codebooks.data += 1000
    assert torch.equal(module(latents + 1000).codes.flatten(2), brute_force(latents + 1000, module.codebooks))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_latents_stay_visible_and_their_codes_are_valid(bad):
    module, latents = make(4, 2, 5)
    latents[0, 0, 0, 0] = bad
    output = module(latents)
    assert output.latents[0, :2, 0, 0].isnan().all() and output.loss.isnan()
    assert output.latents.isnan().sum() == 2 and 0 <= int(output.codes.min()) and int(output.codes.max()) < 5


def test_no_latents_have_no_codes():
    module, _ = make(4, 2, 5)
    assert module(torch.zeros(0, 4, 3, 3, device=DEVICE)).codes.shape == (0, 2, 3, 3)


def test_it_traces_as_one_graph_with_gradients():
    module, latents = make(8, 4, 5)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    inputs = latents.clone().requires_grad_()
    output = compiled(inputs)
    output.loss.backward()
    expected = module(latents)
    assert torch.equal(output.codes, expected.codes) and torch.equal(output.latents, expected.latents)
    assert inputs.grad.abs().sum() > 0 and module.codebooks.grad.abs().sum() > 0


def test_the_operator_keeps_what_torch_asks_of_operators():
    module, latents = make(4, 2, 5, shape=(1, 3, 3))
    arguments = (latents.flatten(2).requires_grad_(), module.codebooks, 0.25)
    torch.library.opcheck(fused_quantization.quantize, arguments)
