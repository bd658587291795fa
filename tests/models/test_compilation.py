"""PQModel is one graph for torch.compile, which CUDA graphs need."""

import pytest
import torch
from conftest import tiny_config

from diffusers_pq import PQModel


STATISTICS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def make(**config):
    torch.manual_seed(0)
    return PQModel(**tiny_config(**config)).eval()


def inputs_of(model):
    torch.manual_seed(1)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    latents = model.encode(images).latents
    return {"encode": images, "quantize": latents, "decode": latents, "decode_codes": model.encode_codes(images)}


@pytest.mark.parametrize(
    ("name", "config"),
    [("encode", STATISTICS), ("quantize", {}), ("decode", {}), ("decode", STATISTICS), ("decode_codes", {})],
    ids=str,
)
@torch.no_grad()
def test_a_method_is_one_graph_with_the_same_results(name, config):
    model = make(**config)
    given, method = inputs_of(model)[name], getattr(model, name)
    torch.compiler.reset()
    found = torch.compile(method, backend="eager", fullgraph=True)(given)
    for key, expected in method(given).items():
        torch.testing.assert_close(found[key], expected, msg=key)


@torch.no_grad()
def test_another_picture_of_the_same_size_compiles_nothing():
    model = make()
    torch.compiler.reset()
    decode = torch.compile(model.decode, backend="eager", fullgraph=True)
    latents = inputs_of(model)["decode"]
    decode(latents)
    with torch._dynamo.config.patch(error_on_recompile=True):
        decode(latents + 1)
        with pytest.raises(torch._dynamo.exc.RecompileError):
            decode(latents.double())
