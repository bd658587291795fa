import numpy as np
import pytest
import torch
from conftest import tiny_config
from diffusers import AutoencoderKL, DiffusionPipeline, EulerDiscreteScheduler

from diffusers_pq import LatentDiffusionPQPipeline, PQModel
from diffusers_pq.models.class_conditioning import create_class_conditional_denoiser
from diffusers_pq.training.noise import create_scheduler


NAMES = {0: "crane, bird", 1: "crane, machine", 2: "tench, Tinca tinca"}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
}
DIT = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}


def make(kind="unet", vae=None, names=NAMES):
    torch.manual_seed(0)
    vae = vae or PQModel(**tiny_config(latents_mean=[0.1] * 8, latents_std=[0.5] * 8))
    channels = vae.config.latent_channels
    if kind == "unet":
        parts = {"unet": create_class_conditional_denoiser(UNET, channels, 8, 3)}
        parts |= {"scheduler": create_scheduler("diffusion", "v_prediction")}
    else:
        transformer = create_class_conditional_denoiser(DIT, channels, 8, 3)
        torch.nn.init.normal_(transformer.proj_out_2.weight)  # begins with zeros
        parts = {"transformer": transformer, "scheduler": create_scheduler("flow_matching", shift=2.0)}
    pipeline = LatentDiffusionPQPipeline(vae, **parts, id2label=names)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.vae, pipeline.denoiser):
        part.eval()
    return pipeline


def generate(pipeline, labels=(0, 2), **kwargs):
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    return pipeline(list(labels), **options | kwargs).images


def test_a_whole_name_comes_before_a_synonym():
    names = {0: "crane, machine", 1: "crane", 2: "machine, crane"}
    pipeline = LatentDiffusionPQPipeline(**make().components, id2label=names)
    assert pipeline.get_label_ids("crane") == [1]
    with pytest.raises(ValueError, match=r"'machine' is a name of the classes \[0, 2\]; give the number"):
        pipeline.get_label_ids("machine")


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_saves_and_loads_and_paints_the_same(kind, tmp_path):
    pipeline = make(kind)
    before = generate(pipeline)
    assert before.shape == (2, 3, 32, 32)
    pipeline.save_pretrained(tmp_path)
    loaded = LatentDiffusionPQPipeline.from_pretrained(tmp_path)
    assert loaded.config.vae == ("diffusers_pq", "PQModel")
    assert loaded.get_label_ids(["bird", "tench", 1]) == [0, 2, 1]
    torch.testing.assert_close(generate(loaded), before)
    by_diffusers = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(by_diffusers) is LatentDiffusionPQPipeline
    torch.testing.assert_close(generate(by_diffusers), before)


def test_kl_latents_are_scaled_and_decoded(tmp_path):
    blocks = {name: tiny_config()[name] for name in ("down_block_types", "up_block_types", "block_out_channels")}
    vae = AutoencoderKL(**blocks, norm_num_groups=4, scaling_factor=0.5, shift_factor=0.25)
    pipeline = make(vae=vae)
    latents = generate(pipeline, output_type="latent")
    expected = (vae.decode(latents / 0.5 + 0.25).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(generate(pipeline), expected)
    pipeline.save_pretrained(tmp_path)
    assert not (tmp_path / "vae" / "diffusers_pq.py").exists()
    by_diffusers = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    torch.testing.assert_close(generate(by_diffusers), generate(pipeline))


def test_decodes_unscaled_snapped_latents():
    pipeline = make()
    latents = generate(pipeline, output_type="latent")
    expected = (pipeline.vae.decode(latents * 0.5 + 0.1).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(generate(pipeline), expected)
    assert not torch.allclose(generate(pipeline, quantize_latents=False), expected)


def test_each_generator_makes_a_picture_of_its_own():
    pipeline = make()
    together = generate(pipeline, generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)])
    alone = generate(pipeline, (2,), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_guidance_moves_away_from_no_class(kind):
    pipeline = make(kind)
    noise = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    one, two, three = (
        generate(pipeline, (1,), latents=noise, guidance_scale=scale, num_inference_steps=1, output_type="latent")
        for scale in (1.0, 2.0, 3.0)
    )
    assert not torch.allclose(one, two)
    torch.testing.assert_close(three - one, 2 * (two - one), atol=1e-4, rtol=1e-3)


def test_takes_other_schedulers_and_calls_back():
    pipeline = make()
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = generate(pipeline, callback_on_step_end=callback, output_type="latent")
    assert seen == [0, 1] and not latents.any()
    images = pipeline(0, num_inference_steps=2, output_type="np", return_dict=False)[0]
    assert np.isfinite(images).all()


def test_wrong_labels_are_named():
    pipeline = make()
    for labels, message in [
        (["carp"], "unknown class 'carp'; known names are crane, bird, "),
        (["crane"], r"'crane' is a name of the classes \[0, 1\]; give the number"),
        ([3], r"must be in 0 ... 2, but one is 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(pipeline, labels)
    with pytest.raises(ValueError, match="unknown class 'bird'; known names are none, since there is no `id2label`"):
        generate(make(names=None), ["bird"])


def test_classes_are_in_the_order_of_their_numbers_whatever_json_makes_of_it():
    pipeline = make(names={"2": "c", "0": "a", "1": "b"})
    assert list(pipeline.config.id2label.items()) == [(0, "a"), (1, "b"), (2, "c")]


def test_parts_that_do_not_fit_are_refused():
    pipeline = make()
    parts = {"vae": pipeline.vae, "scheduler": pipeline.scheduler}
    with pytest.raises(ValueError, match="exactly one of `unet` and `transformer`"):
        LatentDiffusionPQPipeline(**parts)
    with pytest.raises(ValueError, match="takes 4 latent channels, but the `vae` has 8"):
        LatentDiffusionPQPipeline(**parts, unet=create_class_conditional_denoiser(UNET, 4, 8, 3))
    with pytest.raises(ValueError, match="`id2label` names 2 classes, but the denoiser has 3: 0 ... 2"):
        LatentDiffusionPQPipeline(**parts, unet=pipeline.unet, id2label={0: "a", 1: "b"})
    with pytest.raises(ValueError, match="`latents` must have the shape"):
        generate(pipeline, latents=torch.zeros(1, 8, 8, 8))
    with pytest.raises(ValueError, match="`generator` has 1 entries for 2"):
        generate(pipeline, generator=[torch.Generator()])
