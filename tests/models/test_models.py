"""What diffusers' models promise, asked of all of this package's."""

import copy
import inspect
import json

import pytest
import torch
from conftest import tiny_config
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from diffusers_pq import PatchDiscriminator, PQMaskedTransformer, PQModel


MASKED = {"num_subspaces": 4, "codebook_size": 8, "sample_size": 4, "code_embed_dim": 8, "num_layers": 2}
MASKED |= {"num_attention_heads": 2, "attention_head_dim": 8}
GENERATOR = torch.Generator().manual_seed(0)
PICTURES = torch.rand(2, 3, 32, 32, generator=GENERATOR) * 2 - 1
CODES = torch.randint(8, (2, 4, 4, 4), generator=GENERATOR)
MASKS = torch.rand(CODES.shape, generator=GENERATOR) < 0.5

# name -> class, config, inputs of its forward
MODELS = {
    "pq": (PQModel, tiny_config(), {"sample": PICTURES}),
    "vq": (PQModel, tiny_config(num_subspaces=1, mid_block_add_attention=False), {"sample": PICTURES}),
    "masked": (
        PQMaskedTransformer,
        MASKED | {"num_classes": 3},
        {"codes": CODES, "mask": MASKS, "class_labels": torch.tensor([0, 3])},
    ),
    "masked-text": (
        PQMaskedTransformer,
        MASKED | {"num_classes": None, "cross_attention_dim": 6},
        {"codes": CODES, "mask": MASKS, "encoder_hidden_states": torch.randn(2, 5, 6, generator=GENERATOR)},
    ),
    "discriminator": (PatchDiscriminator, {"base_channels": 4}, {"image": PICTURES}),
}


@pytest.fixture(params=MODELS)
def case(request):
    """A model in eval mode, and the inputs of its forward."""
    model_class, config, inputs = MODELS[request.param]
    torch.manual_seed(0)
    model = model_class(**config).eval()
    for parameter in model.parameters():  # the zeros that some layers start with hide what is not wired
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model, inputs


@torch.no_grad()
def output(model, inputs):
    """The first tensor that a model returns."""
    found = model(**inputs)
    return found if torch.is_tensor(found) else found[0]


def test_a_model_is_deterministic_and_a_copy_is_the_same(case):
    model, inputs = case
    expected = output(model, inputs)
    assert expected.isfinite().all() and torch.equal(output(model, inputs), expected)
    assert torch.equal(output(copy.deepcopy(model), inputs), expected)


def test_tuples_hold_what_the_outputs_hold(case):
    model, inputs = case
    if "return_dict" not in inspect.signature(model.forward).parameters:
        pytest.skip("returns a tensor")
    with torch.no_grad():
        named, plain = model(**inputs), model(**inputs, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == len(named.to_tuple())
    assert all(torch.equal(left, right) for left, right in zip(plain, named.to_tuple()))


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard_size", ["10GB", "10KB"])
def test_a_saved_model_is_the_same(case, variant, shard_size, tmp_path):
    model, inputs = case
    model.save_pretrained(tmp_path, variant=variant, max_shard_size=shard_size)
    names = {path.name for path in tmp_path.iterdir()}
    weights = names - {"config.json", "diffusers_pq.py"}  # the latter is the code that `auto_map` names
    assert all(name.endswith((".json", ".safetensors")) for name in weights)
    assert all(variant in name for name in weights if variant)
    if shard_size == "10KB":
        assert len(weights) > 2, "not sharded"
    # diffusers does not let a model that keeps modules in float32 do without.
    for low_memory in (True,) if model._keep_in_fp32_modules else (True, False):
        loaded, info = type(model).from_pretrained(
            tmp_path, variant=variant, low_cpu_mem_usage=low_memory, output_loading_info=True
        )
        assert not any(info.values()) and not loaded.training
        assert torch.equal(output(loaded, inputs), output(model, inputs))


def test_a_config_makes_the_same_model_and_survives_json(case, tmp_path):
    model, _ = case
    model.save_config(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["_class_name"] == type(model).__name__
    again = type(model).from_config(type(model).load_config(tmp_path))
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in again.state_dict().items()} == shapes
    signature = set(inspect.signature(type(model).__init__).parameters) - {"self"}
    assert {name for name in again.config if not name.startswith("_")} == signature


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_loads_in_half_precision(case, dtype, tmp_path):
    model, inputs = case
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    kept = tuple(type(model)._keep_in_fp32_modules or ())
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if kept and name.startswith(kept) else dtype), name
    assert loaded.dtype == dtype
    cast = {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    found = output(loaded, cast)
    # Codes can turn out otherwise near a border between two entries: most of the output stays near.
    far = (found.float() - output(model, inputs)).abs() > 0.2
    assert found.dtype == dtype and far.float().mean() < 0.1


def test_gradients_are_the_same_with_checkpointing_and_reach_every_parameter(case):
    model, inputs = case
    if not model._supports_gradient_checkpointing:
        with pytest.raises(ValueError, match="does not support gradient checkpointing"):
            model.enable_gradient_checkpointing()
        return
    gradients = []
    for enabled in (False, True):
        (model.enable_gradient_checkpointing if enabled else model.disable_gradient_checkpointing)()
        assert model.is_gradient_checkpointing == enabled
        model.train().zero_grad()
        found = model(**inputs)
        (found[0].square().mean() + (found.loss if "loss" in found else 0)).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.isfinite().all(), name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_layerwise_casting_stores_small_and_computes_near(case):
    model, inputs = case
    expected = output(model, inputs)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    small = [parameter for parameter in model.parameters() if parameter.dtype == torch.float8_e4m3fn]
    assert sum(parameter.numel() for parameter in small) > 0.3 * model.num_parameters()
    found = output(model, inputs)
    assert found.dtype == torch.float32 and found.isfinite().all()
    far = (found - expected).abs() > 0.5
    assert far.float().mean() < 0.2


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading_changes_nothing(case, kind, tmp_path):
    model, inputs = case
    if not model._supports_group_offloading:
        pytest.skip("says that it does not support it")
    expected = output(model, inputs)
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    cpu = torch.device("cpu")
    model.enable_group_offload(cpu, cpu, kind, offload_to_disk_path=str(tmp_path), **options)
    torch.testing.assert_close(output(model, inputs), expected)


def test_averages_are_saved_and_go_on(case, tmp_path):
    model, inputs = case
    ema = EMAModel(model.parameters(), decay=0.5, model_cls=type(model), model_config=model.config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.step(model.parameters())
    ema.save_pretrained(tmp_path)
    again = EMAModel.from_pretrained(tmp_path, type(model))
    assert again.optimization_step == ema.optimization_step and again.decay == ema.decay
    assert all(torch.equal(left, right) for left, right in zip(again.shadow_params, ema.shadow_params))


def test_weights_are_plain_tensors_of_their_own(case, tmp_path):
    """Nothing shared, nothing that only one version of torch could read."""
    model, _ = case
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in stored.items())
