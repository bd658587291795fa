import json

import diffusers
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL

from diffusers_pq import PQModel, QuantizedAutoencoder, product_quantize
from diffusers_pq.autoencoders import downsampling_factor, load_autoencoder, scale_latents
from diffusers_pq.models.kmeans import as_latents, fit_rotation, kmeans_codebooks
from diffusers_pq.models.product_quantization import RotatedProductQuantizer
from diffusers_pq.models.quantizer import ProductQuantizer


LEVELS = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def tiny_kl(**overrides):
    return AutoencoderKL(**LEVELS, **BLOCKS, latent_channels=8, **overrides)


def tiny_flux2():
    return diffusers.AutoencoderKLFlux2(**LEVELS, **BLOCKS, latent_channels=8)


def tiny_qwen():
    statistics = {"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4}
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], **statistics
    )


def tiny_dc():
    ends = {"encoder_block_out_channels": (8, 16), "decoder_block_out_channels": (8, 16), "attention_head_dim": 8}
    layers = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
    scales = {"encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ())}
    types = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    return diffusers.AutoencoderDC(latent_channels=8, **ends, **layers, **scales, **types)


def tiny_rae():
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    encoder = {"encoder_type": "mae", "encoder_hidden_size": 64, "encoder_num_hidden_layers": 1}
    sizes = {"encoder_patch_size": 8, "patch_size": 8, "encoder_input_size": 32, "decoder_intermediate_size": 16}
    return diffusers.AutoencoderRAE(**encoder, **decoder, **sizes)


AUTOENCODERS = {"KL": tiny_kl, "Flux 2": tiny_flux2, "Qwen-Image": tiny_qwen, "DC": tiny_dc, "RAE": tiny_rae}
FACTORS = {"KL": 2, "Flux 2": 2, "Qwen-Image": 2, "DC": 2, "RAE": 8}


@pytest.fixture
def pictures():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return tiny_kl(shift_factor=0.25, scaling_factor=0.5)


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_any_autoencoder_gets_codes_and_survives_a_round_trip(kind, pictures, tmp_path):
    torch.manual_seed(0)
    vae = AUTOENCODERS[kind]().eval()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    model = product_quantize(vae, [pictures], num_subspaces=4, codebook_size=8)
    channels, factor = model.config.latent_channels, FACTORS[kind]
    assert isinstance(model, PQModel) and downsampling_factor(model) == factor
    assert all(torch.equal(value, before[name]) for name, value in model.autoencoder.state_dict().items())
    with torch.no_grad():
        codes, latents = model.encode_codes(pictures), model.encode(pictures).latents
        assert codes.shape == (4, 4, 32 // factor, 32 // factor) and latents.shape[1] == channels
        quantized = model.quantize(latents).latents
        torch.testing.assert_close(model.quantizer.lookup(codes), quantized)
        sample = model.decode_codes(codes).sample
        torch.testing.assert_close(model.decode(latents).sample, sample)
    assert sample.shape == pictures.shape
    model.save_pretrained(tmp_path)
    loaded = load_autoencoder(str(tmp_path))
    assert isinstance(loaded, QuantizedAutoencoder) and torch.equal(loaded.encode_codes(pictures), codes)
    torch.testing.assert_close(loaded.decode_codes(codes).sample, sample)


def test_without_quantisation_it_is_the_autoencoder(vae, pictures):
    model = product_quantize(vae, [pictures], num_subspaces=2, codebook_size=16)
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mode()
        assert torch.equal(model.encode(pictures).latents, latents)
        assert torch.equal(model.decode(latents, quantize=False).sample, vae.decode(latents).sample)
    torch.testing.assert_close(model.scale_latents(latents), scale_latents(vae, latents))
    torch.testing.assert_close(model.unscale_latents(model.scale_latents(latents)), latents)


def test_a_rae_takes_pictures_between_minus_one_and_one(pictures):
    torch.manual_seed(0)
    vae = tiny_rae().eval()
    model = product_quantize(vae, [pictures], num_subspaces=4, codebook_size=8)
    with torch.no_grad():
        latents = vae.encode((pictures + 1) / 2).latent
        torch.testing.assert_close(model.encode(pictures).latents, latents)
        torch.testing.assert_close(model.decode(latents, quantize=False).sample, 2 * vae.decode(latents).sample - 1)


def test_a_learned_rotation_quantises_correlated_latents_better():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    vectors = torch.randn(4000, 8, generator=generator) * torch.logspace(0, -1, 8) @ mixing.T
    errors = {}
    plain, rotated = ProductQuantizer(8, 4, 16).eval(), RotatedProductQuantizer(8, 4, 16).eval()
    rotated.rotation.copy_(fit_rotation(plain, vectors))
    for name, quantizer, points in (("plain", plain, vectors), ("rotated", rotated, vectors @ rotated.rotation)):
        kmeans_codebooks(quantizer, as_latents(points))
        errors[name] = (quantizer(as_latents(vectors)).latents - as_latents(vectors)).square().mean().item()
    torch.testing.assert_close(rotated.rotation @ rotated.rotation.T, torch.eye(8), rtol=0, atol=1e-5)
    assert errors["rotated"] < 0.8 * errors["plain"]


def test_more_entries_are_closer_and_the_fit_is_reproducible(vae, pictures):
    latents = vae.eval().encode(pictures).latent_dist.mode().detach()

    def error(size):
        model = product_quantize(vae, [pictures], 4, size)
        return (model.quantize(latents).latents - latents).square().mean().item()

    assert error(64) < error(8)
    assert error(8) == error(8)


def test_pictures_come_as_rows_pictures_or_tensors(vae, pictures):
    picture = PIL.Image.effect_noise((33, 40), 50)
    for dataset in ([{"image": picture}], [picture], pictures):
        assert product_quantize(vae, dataset, 2, 4).config.codebook_size == 4
    with pytest.raises(TypeError, match="`dataset` must hold pictures .* holds a str"):
        product_quantize(vae, ["photo.png"], 2, 4)


def test_half_precision_keeps_codebooks_and_rotation_exact(vae, pictures, tmp_path):
    model = product_quantize(vae, [pictures], 2, 4)
    model.save_pretrained(tmp_path)
    half = QuantizedAutoencoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.quantizer.codebooks, model.quantizer.codebooks)
    assert torch.equal(half.quantizer.rotation, model.quantizer.rotation)
    assert half(pictures.bfloat16()).sample.dtype == torch.bfloat16
    assert half.decode_codes(half.encode_codes(pictures.bfloat16())).sample.dtype == torch.bfloat16


def test_bad_input_is_named(vae, pictures, model, tmp_path):
    with pytest.raises(TypeError, match="without a quantiser, but is of class PQModel"):
        product_quantize(model, [pictures], 2, 4)
    with pytest.raises(TypeError, match="must be an autoencoder of RGB pictures, but is of class UNet"):
        product_quantize(diffusers.UNet1DModel(block_out_channels=(32, 32, 64)), [pictures], 2, 4)
    with pytest.raises(ValueError, match="8 is not divisible by 3"):
        product_quantize(vae, [pictures], 3, 4)
    with pytest.raises(ValueError, match="gave 256 latent pixels, fewer than codebook_size = 512"):
        product_quantize(vae, [pictures[0]], 2, 512)
    product_quantize(vae, [pictures], 2, 4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"autoencoder_class": "AutoPipelineForText2Image"}))
    with pytest.raises(ValueError, match="must name an autoencoder of diffusers"):
        QuantizedAutoencoder.from_pretrained(tmp_path)
