"""Autoencoders and pipelines on CUDA against the same on a CPU, in each precision, eager, compiled and as a graph."""

import copy

import pytest
import torch
from conftest import tiny_config
from test_compiled_pipelines import CASES

from diffusers_pq import PQModel
from diffusers_pq.measuring import graphed


pytestmark = pytest.mark.gpu

# Norm of the difference over that of what is expected.
BOUNDS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.compiler.reset()


def difference(found, expected):
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def model():
    torch.manual_seed(0)
    return PQModel(**tiny_config()).eval()


def run_graphed(function):
    found = []
    graphed(lambda: found.append(function()), "cuda")()
    return found[-1]


def run_compiled(function):
    return torch.compile(function, fullgraph=True)()


WAYS = {"eager": lambda function: function(), "compiled": run_compiled, "graphed": run_graphed}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@torch.no_grad()
def test_an_autoencoder_encodes_and_decodes_as_on_a_cpu(dtype, layout, way, model, images):
    latents = model.encode(images).latents
    codes = model.quantize(latents).codes
    expected = model.decode_codes(codes).sample
    on_cuda = copy.deepcopy(model).to("cuda", dtype).to(memory_format=layout)
    codes, images = codes.cuda(), images.to("cuda", dtype)
    assert difference(WAYS[way](lambda: on_cuda.encode(images).latents), latents) < BOUNDS[dtype]
    # Codes are checked for their range unless the model is compiled, which waits for them.
    z = on_cuda.quantizer.lookup(codes).to(dtype)
    assert difference(WAYS[way](lambda: on_cuda.decode(z).sample), expected) < BOUNDS[dtype]
    assert torch.equal(WAYS[way](lambda: on_cuda.quantize(z).codes), codes)


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case != "MaskedPQPipeline"])
def test_a_pipeline_makes_the_latents_of_a_cpu(case, dtype, is_compiled):
    make, argument = CASES[case]
    pipeline, _ = make(argument)
    expected = latents_of(pipeline)
    pipeline.to("cuda", dtype)
    if is_compiled:
        denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
        denoiser.compile(mode="reduce-overhead", fullgraph=True)
    assert difference(latents_of(pipeline), expected) < 10 * BOUNDS[dtype]


def latents_of(pipeline, steps=3):
    options = {"num_inference_steps": steps, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    if type(pipeline).__name__ == "LatentDiffusionPQPipeline":
        return pipeline([0, 2], **options).images
    options |= {"max_sequence_length": 12} if hasattr(pipeline, "transformer") else {}
    return pipeline("a red apple", height=32, width=32, **options).images


@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_paints(case):
    make, argument = CASES[case]
    pipeline, _ = make(argument)
    pipeline.to("cuda")
    options = {"num_inference_steps": 2, "generator": torch.Generator("cuda").manual_seed(0), "output_type": "pt"}
    if case == "MaskedPQPipeline":
        images = pipeline(class_labels=["apple", 2], **options).images
    elif case.startswith("LatentDiffusion"):
        images = pipeline([0, 2], **options).images
    else:
        options |= {"max_sequence_length": 12} if hasattr(pipeline, "transformer") else {}
        images = pipeline("a red apple", height=32, width=32, **options).images
    assert images.is_cuda and images.isfinite().all() and float(images.std()) > 0
