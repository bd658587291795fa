"""The quantiser on CUDA: the cases of the kernel, the shapes of the paper, and what it must not do."""

import pytest
import torch
from kernel_cases import *  # noqa: F403
from kernel_cases import brute_force, make, reference

from diffusers_pq import ProductQuantizer
from diffusers_pq.measuring import graphed
from diffusers_pq.models.fused_quantization import is_fusable


pytestmark = pytest.mark.gpu

# (d, S, K) of the paper's models and around them; the last is too long for the kernel.
SHAPES = [(128, 64, 512), (256, 128, 128), (256, 64, 256), (128, 8, 512), (128, 128, 512), (64, 1, 1024)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def of_the_paper(shape, dtype=torch.float32, side=24):
    module, latents = make(*shape, shape=(2, side, side), dtype=dtype)
    return module.eval(), latents


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_codes_of_the_papers_shapes_equal_float64_brute_force(shape, dtype, is_compiled):
    module, latents = of_the_paper(shape, dtype)
    assert is_fusable(latents.flatten(2), module.codebooks) == (shape[0] // shape[1] <= 16)
    torch.compiler.reset()
    output = (torch.compile(module, fullgraph=True) if is_compiled else module)(latents)
    expected = brute_force_by_picture(latents, module.codebooks)
    unlike = (output.codes.flatten(2) != expected).double().mean()
    # float32 has ties where float64 has none.
    assert unlike <= 1e-3, f"{float(unlike):.2e} of the codes"
    torch.testing.assert_close(output.latents, module.lookup(output.codes).to(dtype), rtol=0, atol=0)


def brute_force_by_picture(latents, codebooks):
    """In parts, since a float64 difference for each entry and pixel is large."""
    parts = latents.flatten(2).split(64, dim=2)
    return torch.cat([brute_force(part, codebooks) for part in parts], dim=2)


def gradients(module, latents):
    inputs = latents.clone().requires_grad_()
    module.zero_grad()
    output = module(inputs)
    ((output.latents * latents.flip(2)).sum() + 3 * output.loss).backward()
    return inputs.grad, module.codebooks.grad.clone()


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_gradients_are_autograds_and_the_same_again(shape):
    module, latents = of_the_paper(shape)
    module.train()
    ours, again = gradients(module, latents), gradients(module, latents)
    assert all(torch.equal(*pair) for pair in zip(ours, again))
    torch.testing.assert_close(ours, gradients(reference(module), latents), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantising_does_not_wait_for_the_device(dtype):
    module, latents = of_the_paper(SHAPES[0], dtype)
    module.train()
    gradients(module, latents)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(module, latents)
        with torch.no_grad():
            module.eval()(latents)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_quantising_is_one_kernel_and_the_sum_of_its_loss():
    module, latents = of_the_paper(SHAPES[0])
    module(latents)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        module(latents)
        torch.cuda.synchronize()
    kernels = [event.key for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    # Clearing what the sum counts its blocks with may be one more.
    assert any("_quantize_kernel" in name for name in kernels) and len(kernels) <= 3, kernels


@torch.no_grad()
def test_a_cuda_graph_quantises_what_is_in_its_input():
    module, latents = of_the_paper(SHAPES[0])
    found = []
    replay = graphed(lambda: found.append(module(latents)), "cuda")
    latents.copy_(torch.randn_like(latents))
    replay()
    expected = module(latents)
    assert torch.equal(found[-1].codes, expected.codes) and torch.equal(found[-1].latents, expected.latents)


@torch.no_grad()
def test_a_stream_of_its_own_gives_the_same():
    module, latents = of_the_paper(SHAPES[1])
    expected = module(latents).codes
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = module(latents).codes
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


@torch.no_grad()
def test_cpu_and_gpu_agree():
    module, latents = of_the_paper(SHAPES[0])
    on_cpu = ProductQuantizer(*SHAPES[0]).eval()
    on_cpu.load_state_dict(module.state_dict())
    unlike = (on_cpu(latents.cpu()).codes != module(latents).codes.cpu()).double().mean()
    assert unlike <= 1e-4
