import diffusers
import pytest
import torch
from conftest import tiny_unet
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from diffusers_pq import widen_denoiser, widen_unet
from diffusers_pq.cli import main
from diffusers_pq.models.widening import ENDS, DenoiserEnds, outer_layers


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return tiny_unet(4)


TEXT, WIDTH = 3, 16  # tokens of a prompt, and of the hidden states
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
PACKED = {"num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (2, 2, 4)} | HEADS


def text(latents, width=WIDTH):
    return torch.linspace(-1, 1, TEXT * width).view(1, TEXT, width).repeat(len(latents), 1, 1)


def times(latents, value=5):
    return torch.full((len(latents),), value)


def tiny_dit():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "norm_num_groups": 4}
    return diffusers.DiTTransformer2DModel(
        in_channels=4, out_channels=8, sample_size=8, num_embeds_ada_norm=10, **sizes
    )


def tiny_pixart():
    sizes = {"num_layers": 1, "cross_attention_dim": WIDTH, "sample_size": 8, "caption_channels": WIDTH}
    return diffusers.PixArtTransformer2DModel(
        in_channels=4, out_channels=8, use_additional_conditions=False, **sizes, **HEADS
    )


def tiny_hunyuan():
    sizes = {"num_layers": 2, "cross_attention_dim": WIDTH, "cross_attention_dim_t5": WIDTH, "hidden_size": 16}
    sizes |= {"pooled_projection_dim": 4, "text_len": TEXT, "text_len_t5": TEXT, "sample_size": 8, "mlp_ratio": 2.0}
    return diffusers.HunyuanDiT2DModel(
        in_channels=4,
        patch_size=2,
        activation_fn="gelu-approximate",
        use_style_cond_and_image_meta_size=False,
        **sizes,
        **HEADS,
    )


def tiny_sd3():
    sizes = {"num_layers": 1, "caption_projection_dim": WIDTH, "joint_attention_dim": WIDTH}
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
        **sizes,
        **HEADS,
    )


def tiny_sana():
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": WIDTH}
    return diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, caption_channels=WIDTH, sample_size=8, **cross, **HEADS
    )


def tiny_auraflow():
    sizes = {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "caption_projection_dim": WIDTH}
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=WIDTH,
        pos_embed_max_size=64,
        **sizes,
        **HEADS,
    )


def tiny_flux():
    return diffusers.FluxTransformer2DModel(
        in_channels=16, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=False, **PACKED
    )


def tiny_chroma():
    approximator = {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1}
    return diffusers.ChromaTransformer2DModel(in_channels=16, joint_attention_dim=WIDTH, **PACKED, **approximator)


def tiny_flux2():
    sizes = PACKED | {"axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 16}
    return diffusers.Flux2Transformer2DModel(in_channels=16, joint_attention_dim=WIDTH, guidance_embeds=False, **sizes)


def tiny_qwen():
    sizes = {"num_layers": 1, "joint_attention_dim": WIDTH, "axes_dims_rope": (2, 2, 4)}
    return diffusers.QwenImageTransformer2DModel(in_channels=16, out_channels=4, **sizes, **HEADS)


def tiny_lumina2():
    sizes = {"hidden_size": 24, "num_layers": 1, "num_refiner_layers": 1, "num_kv_heads": 2, "cap_feat_dim": WIDTH}
    return diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, num_attention_heads=2, axes_dim_rope=(4, 4, 4), **sizes
    )


def tiny_z_image():
    sizes = {"dim": 24, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": WIDTH}
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        all_patch_size=(2, 4),
        all_f_patch_size=(1, 1),
        axes_dims=[4, 4, 4],
        axes_lens=[64, 8, 8],
        **sizes,
    )


def predict_unet(model, latents):
    return model(latents, 5, torch.ones(len(latents), 3, 16)).sample


def predict_dit(model, latents):
    return model(latents, times(latents), class_labels=times(latents, 3)).sample


def predict_pixart(model, latents):
    return model(latents, text(latents), timestep=times(latents), added_cond_kwargs={}).sample


def predict_hunyuan(model, latents):
    ones = torch.ones(len(latents), TEXT)
    rotary = torch.ones(16, 8), torch.zeros(16, 8)
    return model(
        latents, times(latents, 5.0), encoder_hidden_states=text(latents), text_embedding_mask=ones,
        encoder_hidden_states_t5=text(latents), text_embedding_mask_t5=ones, image_rotary_emb=rotary,
    ).sample  # fmt: skip


def predict_sd3(model, latents):
    return model(latents, text(latents), text(latents)[:, 0], times(latents)).sample


def predict_sana(model, latents):
    return model(latents, text(latents), times(latents)).sample


def predict_auraflow(model, latents):
    return model(latents, text(latents), times(latents, 0.5)).sample


def predict_lumina2(model, latents):
    mask = torch.ones(len(latents), TEXT, dtype=torch.bool)
    return model(latents, times(latents, 0.5), text(latents), mask).sample


def predict_z_image(model, latents):
    predicted = model(list(latents.unsqueeze(2)), times(latents, 0.5), list(text(latents))).sample
    return torch.stack(predicted).squeeze(2)


def through_flux_packing(forward):
    """The latents packed and unpacked by diffusers' own pipeline."""

    def predict(model, latents):
        batch_size, channels, height, width = latents.shape
        tokens = diffusers.FluxPipeline._pack_latents(latents, batch_size, channels, height, width)
        return diffusers.FluxPipeline._unpack_latents(forward(model, tokens, height, width), height, width, 1)

    return predict


def image_ids(height, width):
    return diffusers.FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)


@through_flux_packing
def predict_flux(model, tokens, height, width):
    ids = {"img_ids": image_ids(height, width), "txt_ids": torch.zeros(TEXT, 3)}
    return model(tokens, text(tokens), text(tokens)[:, 0], times(tokens, 0.5), **ids).sample


@through_flux_packing
def predict_chroma(model, tokens, height, width):
    ids = {"img_ids": image_ids(height, width), "txt_ids": torch.zeros(TEXT, 3)}
    return model(tokens, text(tokens), times(tokens, 0.5), **ids).sample


@through_flux_packing
def predict_qwen(model, tokens, height, width):
    shapes = [[(1, height // 2, width // 2)]] * len(tokens)
    mask = torch.ones(len(tokens), TEXT, dtype=torch.bool)
    return model(
        tokens, encoder_hidden_states=text(tokens), encoder_hidden_states_mask=mask, timestep=times(tokens, 0.5),
        img_shapes=shapes,
    ).sample  # fmt: skip


def predict_flux2(model, latents):
    pipeline = diffusers.Flux2Pipeline
    patches = pipeline._patchify_latents(latents)
    ids = pipeline._prepare_latent_ids(patches)
    predicted = model(
        pipeline._pack_latents(patches), text(latents), times(latents, 0.5), img_ids=ids,
        txt_ids=pipeline._prepare_text_ids(text(latents)), guidance=None,
    ).sample  # fmt: skip
    return pipeline._unpatchify_latents(torch.stack(list(pipeline._unpack_latents_with_ids(predicted, ids))))


FAMILIES = {
    "UNet2DConditionModel": (lambda: tiny_unet(4), predict_unet),
    "DiTTransformer2DModel": (tiny_dit, predict_dit),
    "PixArtTransformer2DModel": (tiny_pixart, predict_pixart),
    "HunyuanDiT2DModel": (tiny_hunyuan, predict_hunyuan),
    "SD3Transformer2DModel": (tiny_sd3, predict_sd3),
    "SanaTransformer2DModel": (tiny_sana, predict_sana),
    "AuraFlowTransformer2DModel": (tiny_auraflow, predict_auraflow),
    "FluxTransformer2DModel": (tiny_flux, predict_flux),
    "Flux2Transformer2DModel": (tiny_flux2, predict_flux2),
    "ChromaTransformer2DModel": (tiny_chroma, predict_chroma),
    "QwenImageTransformer2DModel": (tiny_qwen, predict_qwen),
    "Lumina2Transformer2DModel": (tiny_lumina2, predict_lumina2),
    "ZImageTransformer2DModel": (tiny_z_image, predict_z_image),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    """A denoiser of 4 channels with random weights, also where they start from zero, and how it is called."""
    make, predict = FAMILIES[request.param]
    torch.manual_seed(0)
    source = make().eval()
    assert type(source).__name__ == request.param
    for parameter in source.parameters():
        if not parameter.any() or (parameter == 1).all():
            torch.nn.init.normal_(parameter, std=0.3)
    return source, torch.no_grad()(predict)


def parted(prediction, channels):
    """`[B, parts, channels, H, W]`: a prediction, and a variance where there is one."""
    return prediction.unflatten(1, (-1, channels))


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
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
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


def test_every_family_of_the_table_is_tested():
    assert set(FAMILIES) == set(ENDS)


def test_zero_init_is_the_source_model_on_its_own_channels(family):
    source, predict = family
    latents = torch.randn(2, 12, 8, 8)
    widened = widen_denoiser(source, 12, init="zero")
    expected, found = parted(predict(source, latents[:, :4]), 4), parted(predict(widened, latents), 12)
    assert expected.std() > 1e-3 and found.shape == (2, expected.shape[1], 12, 8, 8)
    torch.testing.assert_close(found[:, :, :4], expected)
    assert not found[:, :, 4:].any()


@pytest.mark.parametrize("init, share", [("copy", 1 / 3), ("copy_scaled", 1 / 3**0.5)])
def test_copies_of_the_channels_give_copies_of_the_prediction(family, init, share):
    """Three copies add up after the first layer: to the source's input, if each has its share of it."""
    source, predict = family
    latents = torch.randn(2, 4, 8, 8)
    expected = parted(predict(source, latents), 4)
    found = parted(predict(widen_denoiser(source, 12, init), share * latents.repeat(1, 3, 1, 1)), 12)
    torch.testing.assert_close(found, expected.repeat(1, 1, 3, 1, 1), rtol=1e-3, atol=1e-4)


def test_only_the_outer_layers_change_and_the_config_says_so(family, tmp_path):
    source, predict = family
    before = {name: value.clone() for name, value in source.state_dict().items()}
    widened = widen_denoiser(source, 6)
    after, outer = widened.state_dict(), tuple(outer_layers(source))
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(source.state_dict()[name], value), "the source stays as it is"
        if not name.startswith(outer):
            assert torch.equal(after[name], value)
    assert sum(after[name].shape != value.shape for name, value in before.items()) >= 2
    widened.save_pretrained(tmp_path)
    latents = torch.randn(1, 6, 8, 8)
    loaded = type(source).from_pretrained(tmp_path)
    torch.testing.assert_close(predict(loaded, latents), predict(widened, latents))


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
    with pytest.raises(TypeError, match="knows UNet2DConditionModel, DiT.*given a Linear.*pass `ends="):
        widen_denoiser(torch.nn.Linear(2, 2), 8)
    unet.register_to_config(in_channels=9)
    with pytest.raises(ValueError, match="takes 9 channels and predicts 4"):
        widen_unet(unet, 8)


def test_a_class_outside_the_table_is_widened_where_it_says(unet):
    class Pair(diffusers.ModelMixin, diffusers.ConfigMixin):
        config_name = "config.json"

        @diffusers.configuration_utils.register_to_config
        def __init__(self, in_channels=4):
            super().__init__()
            self.enter, self.leave = torch.nn.Linear(4, 5), torch.nn.Linear(5, 4)

    widened = widen_denoiser(Pair(), 6, ends=DenoiserEnds("enter", "leave"))
    assert (widened.enter.in_features, widened.leave.out_features, widened.config.in_channels) == (6, 6, 6)


def test_a_quantised_layer_is_refused(unet):
    class Int8(torch.nn.Conv2d):
        pass

    unet.conv_in = Int8(4, 8, 3)
    with pytest.raises(TypeError, match="`conv_in` must be a convolution .* is a Int8: widen the denoiser before"):
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
