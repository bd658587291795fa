import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_unet
from diffusers import DDIMScheduler

from diffusers_pq import PQModel, StableDiffusionPQPipeline


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    vae = PQModel(**tiny_config(latents_mean=[0.1] * 8, latents_std=[0.5] * 8))
    pipeline = StableDiffusionPQPipeline(
        vae, None, None, tiny_unet(8), DDIMScheduler(), None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, **kwargs):
    prompt = {"prompt_embeds": torch.ones(2, 4, 16), "negative_prompt_embeds": torch.zeros(2, 4, 16)}
    generator = torch.Generator().manual_seed(0)
    return pipeline(**prompt, num_inference_steps=2, generator=generator, **kwargs)


def test_default_size_comes_from_the_downsampling_factor(pipeline):
    images = generate(pipeline, output_type="np").images
    assert images.shape == (2, 32, 32, 3)
    assert generate(pipeline, height=16, width=40).images[0].size == (40, 16)


def test_decodes_unscaled_snapped_latents(pipeline):
    latents = generate(pipeline, output_type="latent").images
    snapped = pipeline.vae.decode(latents * 0.5 + 0.1).sample
    expected = (snapped / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(generate(pipeline, output_type="pt").images, expected)
    raw = generate(pipeline, output_type="pt", quantize_latents=False).images
    assert not torch.allclose(raw, expected)


def test_saves_under_the_short_library_name_and_loads_again(pipeline, tmp_path):
    before = generate(pipeline, output_type="np", return_dict=False)[0]
    pipeline.save_pretrained(tmp_path)
    assert pipeline.config["vae"] == ("diffusers_pq", "PQModel")
    missing = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    loaded = StableDiffusionPQPipeline.from_pretrained(tmp_path, **missing)
    loaded.set_progress_bar_config(disable=True)
    assert np.abs(generate(loaded, output_type="np").images - before).max() < 1e-5


def test_callbacks_reach_the_parent(pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].shape)
        return tensors

    generate(pipeline, callback_on_step_end=callback)
    assert seen == [(2, 8, 8, 8)] * 2


def test_wrong_sizes_and_channels_are_refused(pipeline):
    with pytest.raises(ValueError, match="multiples of the downsampling factor F = 4, but are 30 and 32"):
        generate(pipeline, height=30, width=32)
    with pytest.raises(ValueError, match="`unet` takes 4 latent channels, but the `vae` has 8"):
        StableDiffusionPQPipeline(
            pipeline.vae, None, None, tiny_unet(4), DDIMScheduler(), None, None, requires_safety_checker=False
        )
