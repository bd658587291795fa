"""What --compile compiles, with a backend that takes no time."""

import copy

import pytest
import torch
import torch.nn as nn
from conftest import tiny_config, tiny_unet

from diffusers_pq import PQModel
from diffusers_pq.training.run import compile_blocks


@pytest.fixture(autouse=True)
def counted():
    """Compilations, from none."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def gradients(model, images):
    model.zero_grad()
    (model.decode(model.encode(images).latents, quantize=False).sample * images.flip(3)).sum().backward()
    return [parameter.grad.clone() for name, parameter in model.named_parameters() if "quantizer" not in name]


def test_blocks_of_one_shape_are_compiled_once_and_learn_the_same(images):
    torch.manual_seed(0)
    model = PQModel(**tiny_config(layers_per_block=2)).train()
    expected = gradients(copy.deepcopy(model), images)
    blocks = compile_blocks(model, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(gradients(model, images), expected)
    assert len(blocks) == 19 and 5 <= graphs() < 19, "five shapes, some in two memory formats"
    with torch._dynamo.config.patch(error_on_recompile=True):
        gradients(model, images)


def test_the_full_size_autoencoder_has_few_shapes():
    with torch.device("meta"):
        model = PQModel.from_config(PQModel.load_config("model_cards/pqgan-f8")).train()
        images = torch.empty(1, 3, 256, 256)
    blocks = compile_blocks(model, backend="eager", fullgraph=True, dynamic=False)
    model.decode(model.encode(images).latents, quantize=False)
    assert (len(blocks), graphs()) == (24, 14), "docs/gpu.md has these numbers"


def test_a_denoiser_has_its_transformer_blocks_compiled_too():
    kinds = {type(module).__name__ for module in compile_blocks(tiny_unet(4))}
    assert kinds == {"ResnetBlock2D", "BasicTransformerBlock"}


def test_a_network_without_such_blocks_is_compiled_whole():
    model = nn.Sequential(nn.Linear(2, 2))
    assert compile_blocks(model) == [model]
