import pytest
import torch
import torch.nn as nn
from conftest import tiny_config

from diffusers_pq import PQModel
from diffusers_pq.training.norms import SingleGroupNorm, with_single_group_norms
from diffusers_pq.training.options import OptimisationOptions
from diffusers_pq.training.run import prepare_model


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (3, 6, 4)])
def test_values_and_gradients_are_those_of_torchs_norm(shape, affine):
    torch.manual_seed(0)
    norm = nn.GroupNorm(1, 6, affine=affine)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    found = []
    x, weight = 3 * torch.randn(shape) + 5, torch.randn(shape)
    for function in (norm, SingleGroupNorm(norm).by_reductions):
        inputs = x.clone().requires_grad_()
        norm.zero_grad()
        output = function(inputs)
        (output * weight).sum().backward()
        found.append([output.detach(), inputs.grad, *(parameter.grad.clone() for parameter in norm.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_under_autocast_it_is_float32_as_torchs_is_on_a_gpu():
    norm = nn.GroupNorm(1, 4)
    x = torch.randn(2, 4, 3, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = SingleGroupNorm(norm).by_reductions(x)
    torch.testing.assert_close(found, norm(x.float()), rtol=1e-4, atol=1e-5)
    assert SingleGroupNorm(norm.bfloat16()).by_reductions(x).dtype == torch.bfloat16


def test_a_training_replaces_norms_of_one_group_and_saves_the_same_weights(images):
    torch.manual_seed(0)
    model = PQModel(**tiny_config(norm_num_groups=1)).eval()
    before, expected = {name: value.clone() for name, value in model.state_dict().items()}, model(images).sample
    prepare_model(OptimisationOptions(), model)
    assert not [module for module in model.modules() if type(module) is nn.GroupNorm]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    torch.testing.assert_close(model.eval()(images).sample, expected)


def test_norms_of_several_groups_stay():
    model = with_single_group_norms(PQModel(**tiny_config()))
    assert not [module for module in model.modules() if isinstance(module, SingleGroupNorm)]
