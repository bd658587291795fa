import json
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from conftest import tiny_config, tiny_unet
from diffusers import AutoModel, DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from diffusers_pq import PQModel
from diffusers_pq.autoencoders import load_autoencoder, weights_digest
from diffusers_pq.measuring import measure_peak_bytes
from diffusers_pq.models.tiling import blend_tiles


MODEL_CARDS = Path(__file__).parents[2] / "model_cards"


def test_shapes_and_agreement_of_the_api(model, images):
    latents = model.encode(images).latents
    assert model.downsampling_factor == 4 and latents.shape == (2, 8, 8, 12)
    quantized = model.quantize(latents)
    assert quantized.latents.shape == latents.shape and quantized.codes.shape == (2, 4, 8, 12)
    assert quantized.codes.dtype == torch.long and quantized.loss.ndim == 0
    output = model(images)
    assert output.sample.shape == images.shape
    assert torch.equal(output.codes, model.encode_codes(images))
    torch.testing.assert_close(output.sample, model.decode(latents).sample)
    torch.testing.assert_close(output.sample, model.decode_codes(output.codes).sample)
    unquantized = model.decode(latents, quantize=False).sample
    assert not torch.allclose(unquantized, output.sample)


def test_decoding_is_idempotent_in_the_codebooks(model, images):
    quantized = model.quantize(model.encode(images).latents)
    assert torch.equal(model.quantize(quantized.latents).codes, quantized.codes)


def test_tuples_equal_output_classes(model, images):
    output = model(images)
    for value, expected in zip(model(images, return_dict=False), output.to_tuple(), strict=True):
        torch.testing.assert_close(value, expected)
    latents = model.encode(images, return_dict=False)[0]
    torch.testing.assert_close(latents, model.encode(images).latents)
    torch.testing.assert_close(model.decode(latents, return_dict=False)[0], output.sample)


def test_forward_is_deterministic(model, images):
    assert torch.equal(model(images).sample, model(images).sample)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_save_and_load_round_trip(model, images, tmp_path, variant):
    model.save_pretrained(tmp_path, variant=variant)
    loaded = PQModel.from_pretrained(tmp_path, variant=variant).eval()
    saved, read = (json.loads(m.to_json_string()) for m in (model, loaded))
    assert {**read, "_name_or_path": ""} == {**saved, "_name_or_path": ""}
    assert torch.equal(loaded(images).sample, model(images).sample)
    assert not list(tmp_path.glob("*.bin"))


def test_auto_model_loads_a_saved_model(model, images, tmp_path, caplog):
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path), trust_remote_code=True)
    assert type(loaded) is PQModel and torch.equal(loaded(images).sample, model(images).sample)
    assert "not expected" not in caplog.text
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_pretrained(str(tmp_path))


def test_half_precision_loading_keeps_the_codebooks_exact(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    half = PQModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.encoder.conv_in.weight.dtype == torch.bfloat16
    assert torch.equal(half.quantizer.codebooks, model.quantizer.codebooks)
    output = half(images.bfloat16())
    assert output.sample.dtype == torch.bfloat16
    assert half.decode_codes(output.codes).sample.dtype == torch.bfloat16


def test_layerwise_casting_leaves_the_codebooks_alone(model, images):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.quantizer.codebooks.dtype == torch.float32
    assert model.encoder.conv_in.weight.dtype == torch.float8_e4m3fn
    assert model(images).sample.isfinite().all()


@torch.no_grad()
def test_codes_decode_under_layerwise_casting(model, images):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    quantized = model.quantize(model.encode(images).latents)
    sample = model.decode_codes(quantized.codes).sample
    assert torch.equal(sample, model.decode(quantized.latents, quantize=False).sample)


OFFLOADS = {
    "sequential": lambda model: cpu_offload(model, torch.device("cpu")),
    "model": lambda model: cpu_offload_with_hook(model, "cpu"),
    "leaf_level": lambda model: model.enable_group_offload("cpu", "cpu", "leaf_level"),
    "block_level": lambda model: model.enable_group_offload("cpu", "cpu", "block_level", 1),
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS.keys())
@torch.no_grad()
def test_codes_decode_when_the_model_is_offloaded(offload, model, images):
    codes = model.encode_codes(images)
    expected = model.decode_codes(codes).sample
    moved = []
    offload(model)
    if "forward" in vars(model.quantizer):  # of hooks on the parts
        forward = model.quantizer.forward
        model.quantizer.forward = lambda *args, **kwargs: moved.append(1) or forward(*args, **kwargs)
    else:
        model._hf_hook.pre_forward = lambda module: moved.append(1)
    torch.testing.assert_close(model.decode_codes(codes).sample, expected)
    assert moved, "the codebooks would have stayed where they are"


@torch.no_grad()
def test_attention_processors_can_be_replaced_and_put_back(model, images):
    before = model.encode(images).latents
    model.set_attn_processor(lambda attention, hidden_states, **_: torch.zeros_like(hidden_states))
    assert not torch.allclose(model.encode(images).latents, before)
    model.set_default_attn_processor()
    assert {type(processor) for processor in model.attn_processors.values()} == {AttnProcessor}
    torch.testing.assert_close(model.encode(images).latents, before)


def test_moves_between_dtypes_and_devices(model, images):
    half = model.to(torch.float16)
    assert half.dtype == torch.float16
    assert model.to("meta").device.type == "meta"


def test_training_reaches_every_parameter(model, images):
    model.train()
    output = model(images)
    (output.sample.mean() + output.loss).backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing


def test_ema_follows_the_model(model, images):
    ema = EMAModel(model.parameters(), decay=0.5)
    before = model.quantizer.codebooks.detach().clone()
    with torch.no_grad():
        model.quantizer.codebooks.add_(1.0)
    ema.step(model.parameters())
    ema.copy_to(model.parameters())
    difference = model.quantizer.codebooks - before
    assert 0 < float(difference.mean()) < 1.01


def test_gradient_checkpointing_changes_nothing(images):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = PQModel(**tiny_config()).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
            assert model.is_gradient_checkpointing
        output = model(images)
        (output.sample.square().mean() + output.loss).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


STATISTICS = {"image_mean": [0.1, 0.5, 0.7], "image_std": [0.2, 0.3, 0.4]}


def normalized_pair(model):
    """The model with a normalisation of pictures, and the functions that do by hand what it does inside."""
    inside = PQModel(**tiny_config(**STATISTICS)).eval()
    inside.load_state_dict(model.state_dict())
    mean, std = (torch.tensor(STATISTICS[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    return inside, lambda x: ((x + 1) / 2 - mean) / std, lambda x: (x * std + mean) * 2 - 1


@pytest.mark.parametrize("tiling", [False, True])
@torch.no_grad()
def test_pictures_are_normalised_inside(model, tiling, images):
    inside, normalize, restore = normalized_pair(model)
    for one in (model, inside):
        one.enable_slicing()
        one.use_tiling = tiling
        one.tile_sample_min_size, one.tile_latent_min_size = 16, 4
    latents = model.encode(normalize(images)).latents
    torch.testing.assert_close(inside.encode(images).latents, latents)
    torch.testing.assert_close(inside.decode(latents).sample, restore(model.decode(latents).sample))
    # The zeros that the convolutions pad with are the mean colour, not grey.
    mean = torch.tensor(STATISTICS["image_mean"]).view(3, 1, 1).expand(1, 3, 32, 32) * 2 - 1
    constant = inside.encode(mean).latents
    torch.testing.assert_close(constant, model.encode(torch.zeros(1, 3, 32, 32)).latents)


@torch.no_grad()
def test_the_normalisation_of_pictures_survives_saving_and_half_precision(model, images, tmp_path):
    inside, _, restore = normalized_pair(model)
    inside.save_pretrained(tmp_path)
    loaded = PQModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(images).sample, inside(images).sample)
    half = PQModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    sample = half.decode_codes(inside.encode_codes(images)).sample
    assert sample.dtype == torch.bfloat16
    torch.testing.assert_close(sample.float(), inside(images).sample, atol=0.05, rtol=0)


def test_a_digest_tells_models_apart_that_normalise_pictures_differently(model):
    inside, *_ = normalized_pair(model)
    assert weights_digest(inside) != weights_digest(model)


@pytest.mark.parametrize(
    "statistics, message",
    [
        ({"image_mean": [0.5] * 3}, "must be given together, but are .* and None"),
        ({"image_mean": [0.5] * 2, "image_std": [0.5] * 2}, "for each of the 3 colour channels, but has 2"),
        ({"image_mean": [0.5] * 3, "image_std": [0.5, 0.0, 0.5]}, "`image_std` must be positive"),
    ],
)
def test_a_bad_normalisation_of_pictures_is_named(statistics, message):
    with pytest.raises(ValueError, match=message):
        PQModel(**tiny_config(**statistics))


def test_slicing_changes_nothing(model, images):
    expected = model(images).sample
    model.enable_slicing()
    torch.testing.assert_close(model(images).sample, expected)
    model.disable_slicing()
    assert not model.use_slicing


def test_tiling_runs_the_whole_picture_in_tiles(images):
    torch.manual_seed(0)
    model = PQModel(**tiny_config(sample_size=16, mid_block_add_attention=False)).eval()
    latents = model.encode(images).latents
    whole = model.decode(latents, quantize=False).sample
    model.enable_tiling()
    tiled = model.decode(latents, quantize=False).sample
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    assert model.encode(images).latents.shape == latents.shape
    model.disable_tiling()
    assert torch.equal(model.decode(latents, quantize=False).sample, whole)


@pytest.mark.parametrize("size", [(8, 8), (40, 24), (17, 33), (64, 9)])
@pytest.mark.parametrize("scale", [1, 2, 0.5])
def test_blending_reproduces_a_local_function(size, scale):
    x = torch.randn(1, 2, *(side * (2 if scale < 1 else 1) for side in size))

    def function(tile):
        if scale < 1:
            return tile[..., ::2, ::2]
        return tile.repeat_interleave(scale, -1).repeat_interleave(scale, -2)

    torch.testing.assert_close(blend_tiles(function, x, 16, 0.25, scale), function(x))


def test_statistics_scale_and_unscale_latents(images):
    mean, std = [0.5] * 8, [2.0] * 8
    model = PQModel(**tiny_config(latents_mean=mean, latents_std=std, scaling_factor=3.0)).eval()
    latents = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(model.scale_latents(latents), (latents - 0.5) / 2 * 3)
    torch.testing.assert_close(model.unscale_latents(model.scale_latents(latents)), latents)


def test_compile_matches_eager(model, images):
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(images)
    torch.testing.assert_close(compiled.sample, model(images).sample, atol=1e-4, rtol=1e-4)


def test_is_a_vae_of_the_stock_pipeline(tmp_path):
    torch.manual_seed(0)
    vae = PQModel(**tiny_config(scaling_factor=0.5))
    pipeline = StableDiffusionPipeline(
        vae, None, None, tiny_unet(8), DDIMScheduler(), None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    prompt = {"prompt_embeds": torch.randn(1, 4, 16), "negative_prompt_embeds": torch.randn(1, 4, 16)}
    images = pipeline(**prompt, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    "name, factor, d, s, k, parameters",
    [
        ("pqgan-f8", 8, 128, 64, 512, 70_105_859),
        ("pqgan-f16", 16, 128, 64, 128, 71_830_275),
        ("pqgan-f16-d256", 16, 256, 128, 128, 71_912_323),
        ("pqgan-f32", 32, 256, 64, 256, 100_273_027),
    ],
)
def test_paper_configurations_at_full_size(name, factor, d, s, k, parameters):
    config = json.loads((MODEL_CARDS / name / "config.json").read_text())
    with torch.device("meta"):
        model = PQModel.from_config(config)
        latents = model.encode(torch.zeros(1, 3, 256, 256)).latents
        sample = model.train().decode(latents, quantize=False).sample
    assert sample.shape == (1, 3, 256, 256)
    assert model.downsampling_factor == factor
    assert latents.shape == (1, d, 256 // factor, 256 // factor)
    assert model.quantizer.codebooks.shape == (s, k, d // s)
    assert model.config.z_channels == 256
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_sides_that_are_no_multiple_of_f_are_refused(model):
    with pytest.raises(ValueError, match="downsampling factor F = 4, but are 32 x 30"):
        model.encode(torch.zeros(1, 3, 32, 30))
    with pytest.raises(ValueError, match="in_channels = 3"):
        model(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="latent_channels = 8"):
        model.decode(torch.zeros(1, 4, 8, 8))


def test_configurations_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="`down_block_types` must have one entry"):
        PQModel(**tiny_config(down_block_types=("DownEncoderBlock2D",)))
    with pytest.raises(ValueError, match="`latents_mean` must have one value for each of the 8"):
        PQModel(**tiny_config(latents_mean=[0.0]))
    with pytest.raises(ValueError, match="`latents_std` must be positive"):
        PQModel(**tiny_config(latents_std=[0.0] * 8))
    with pytest.raises(ValueError, match="8 is not divisible by 3"):
        PQModel(**tiny_config(num_subspaces=3))
    for name, value in (
        ("z_channels", 10**9),
        ("layers_per_block", "1"),
        ("norm_num_groups", 0),
        ("codebook_size", 0.5),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be a whole number from 1 to"):
            PQModel(**tiny_config(**{name: value}))
    with pytest.raises(ValueError, match="`block_out_channels` must be a whole number"):
        PQModel(**tiny_config(block_out_channels=(8, 8, None)))
    with pytest.raises(ValueError, match="`act_fn` must be the name"):
        PQModel(**tiny_config(act_fn=7))


def test_a_truncated_checkpoint_is_an_error(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="Unable to load weights from checkpoint file"):
        load_autoencoder(str(tmp_path))


def test_weights_that_do_not_fit_are_an_error(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    codebooks = tensors.pop("quantizer.codebooks")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing .*quantizer.codebooks"):
        load_autoencoder(str(tmp_path))
    save_file(tensors | {"quantizer.codebooks": codebooks[:1].clone()}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="quantizer.codebooks expected shape"):
        load_autoencoder(str(tmp_path))


def test_attention_in_the_middle_builds_no_square_matrix():
    # At 1536 px and F=8 it would be 5 GiB.
    torch.manual_seed(0)
    middle = PQModel(**tiny_config(block_out_channels=(8, 8, 32), layers_per_block=1)).eval().decoder.mid_block
    pixels = 64 * 64
    latents = torch.randn(1, 32, 64, 64)
    with torch.no_grad():
        peak = measure_peak_bytes(lambda: middle(latents), "cpu")
    assert peak < 12 * latents.numel() * 4 < pixels**2
