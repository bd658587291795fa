import pytest
import torch
from conftest import tiny_unet
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file

from diffusers_pq import widen_denoiser, widen_unet
from diffusers_pq.cli import main


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return tiny_unet(4)


def tiny_pixart():
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
        use_additional_conditions=False,
    )


def tiny_sd3():
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )


def predict_pixart(model, latents):
    ones = torch.ones(len(latents), 3, 16)
    return model(latents, ones, timestep=torch.tensor([5] * len(latents)), added_cond_kwargs={}).sample


def predict_sd3(model, latents):
    ones = torch.ones(len(latents), 3, 16)
    return model(latents, ones, torch.ones(len(latents), 16), torch.tensor([5] * len(latents))).sample


def predict_unet(model, latents):
    return model(latents, 5, torch.ones(len(latents), 3, 16)).sample


def test_new_channels_are_cyclic_copies_and_the_rest_is_untouched(unet):
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    widened = widen_unet(unet, 10)
    assert isinstance(widened, UNet2DConditionModel)
    assert (widened.config.in_channels, widened.config.out_channels) == (10, 10)
    after = widened.state_dict()
    for name, value in before.items():
        assert torch.equal(unet.state_dict()[name], value), "the source stays as it is"
        if name not in ("conv_in.weight", "conv_out.weight", "conv_out.bias"):
            assert torch.equal(after[name], value)
            assert after[name].data_ptr() != unet.state_dict()[name].data_ptr()
    for channel in range(10):
        assert torch.equal(after["conv_in.weight"][:, channel], before["conv_in.weight"][:, channel % 4])
        assert torch.equal(after["conv_out.weight"][channel], before["conv_out.weight"][channel % 4])
        assert after["conv_out.bias"][channel] == before["conv_out.bias"][channel % 4]
    assert unet.config.in_channels == 4


def test_widened_model_survives_a_round_trip_and_keeps_its_dtype(unet, tmp_path):
    widened = widen_unet(unet.to(torch.bfloat16), 8)
    assert {parameter.dtype for parameter in widened.parameters()} == {torch.bfloat16}
    widened.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    latents = torch.randn(1, 8, 8, 8, dtype=torch.bfloat16)
    text = torch.ones(1, 3, 16, dtype=torch.bfloat16)
    assert torch.equal(loaded(latents, 5, text).sample, widened(latents, 5, text).sample)


def test_widening_twice_is_widening_once(unet):
    twice, once = widen_unet(widen_unet(unet, 8), 24), widen_unet(unet, 24)
    assert all(torch.equal(a, b) for a, b in zip(twice.parameters(), once.parameters()))


def test_copy_scaled_keeps_the_variance_after_the_first_convolution(unet):
    torch.manual_seed(0)
    unet.conv_in.bias.data.zero_()
    reference = unet.conv_in(torch.randn(64, 4, 8, 8)).std().detach()
    latents = torch.randn(64, 30, 8, 8)
    scaled = widen_unet(unet, 30, init="copy_scaled").conv_in(latents).std().detach()
    plain = widen_unet(unet, 30).conv_in(latents).std().detach()
    assert float(scaled / reference) == pytest.approx(1, abs=0.03)
    assert float(plain / reference) == pytest.approx((30 / 4) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    "make, predict", [(lambda: tiny_unet(4), predict_unet), (tiny_pixart, predict_pixart), (tiny_sd3, predict_sd3)]
)
def test_zero_init_is_the_source_model_on_its_own_channels(make, predict):
    torch.manual_seed(0)
    source = make().eval()
    widened = widen_denoiser(source, 12, init="zero").eval()
    latents = torch.randn(2, 12, 8, 8)
    with torch.no_grad():
        expected, found = predict(source, latents[:, :4]), predict(widened, latents)
        copied = predict(widen_denoiser(source, 12), torch.cat([latents[:, :4], latents[:, 4:] * 0], dim=1))
    parts = expected.shape[1] // 4
    assert found.shape == (2, 12 * parts, 8, 8)
    expected, found, copied = (tensor.unflatten(1, (parts, -1)) for tensor in (expected, found, copied))
    torch.testing.assert_close(found[:, :, :4], expected)
    assert not found[:, :, 4:].any()
    torch.testing.assert_close(copied, expected.repeat(1, 1, 3, 1, 1))


def test_a_widened_denoiser_trains(unet):
    widened = widen_unet(unet.requires_grad_(True), 8)
    predict_unet(widened, torch.randn(1, 8, 8, 8)).square().mean().backward()
    assert widened.conv_in.weight.grad[:, 4:].any() and widened.conv_out.weight.grad[4:].any()


def test_bad_input_is_named(unet):
    with pytest.raises(ValueError, match="`latent_channels` must be at least 1, but is 0"):
        widen_unet(unet, 0)
    with pytest.raises(ValueError, match="but is 'random'"):
        widen_unet(unet, 8, init="random")
    with pytest.raises(TypeError, match="must be a UNet2DConditionModel, but is a PixArt"):
        widen_unet(tiny_pixart(), 8)
    with pytest.raises(TypeError, match="knows UNet2DConditionModel, PixArt.*but was given a Linear"):
        widen_denoiser(torch.nn.Linear(2, 2), 8)
    unet.register_to_config(in_channels=9)
    with pytest.raises(ValueError, match="takes 9 channels and predicts 4"):
        widen_unet(unet, 8)


def test_console_command(unet, tmp_path, capsys):
    unet.save_pretrained(tmp_path / "pipeline" / "unet")
    command = ["widen-unet", str(tmp_path / "pipeline"), "--subfolder", "unet", "--latent-channels", "8"]
    command += ["--dtype", "bfloat16", "--output", str(tmp_path / "wide")]
    assert main(command) == 0
    assert UNet2DConditionModel.from_pretrained(tmp_path / "wide").config.in_channels == 8
    stored = load_file(tmp_path / "wide" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert main(command) == 1
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert main([*command[:2], *command[4:-1], str(tmp_path / "other")]) == 1
    assert "name the denoiser: `--subfolder unet`" in capsys.readouterr().err
