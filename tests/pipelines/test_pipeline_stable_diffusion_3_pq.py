import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_config
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from tiny_pipelines import stable_diffusion, stable_diffusion_3, tiny_kl
from transformers import CLIPTokenizer

from diffusers_pq import PQModel, StableDiffusion3PQImg2ImgPipeline, StableDiffusion3PQPipeline
from diffusers_pq.hub.modular import to_modular
from diffusers_pq.training.noise import create_scheduler


PROMPT = {"prompt": ["a red ladybug", "a big blue bus"]}


@pytest.fixture
def components():
    torch.manual_seed(0)
    vae = PQModel(**tiny_config(latents_mean=[0.1] * 8, latents_std=[0.5] * 8)).eval()
    return stable_diffusion_3(vae, 8)


@pytest.fixture
def pipeline(components):
    return quiet(StableDiffusion3PQPipeline(**components))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return pipeline(**PROMPT | {"num_inference_steps": 2, "generator": generator, "output_type": "np"} | kwargs).images


def test_decodes_unscaled_snapped_latents_of_the_default_size(pipeline):
    latents = generate(pipeline, output_type="latent")
    assert latents.shape == (2, 8, 8, 8)
    expected = (pipeline.vae.decode(latents * 0.5 + 0.1).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(generate(pipeline, output_type="pt"), expected)
    assert not torch.allclose(generate(pipeline, output_type="pt", quantize_latents=False), expected)
    assert generate(pipeline, height=24, width=40).shape == (2, 24, 40, 3)


def test_each_prompt_matters(pipeline):
    plain = generate(pipeline, quantize_latents=False)
    for name in ("prompt_2", "prompt_3"):
        changed = generate(pipeline, quantize_latents=False, **{name: ["a leaf", "a bus"]})
        assert np.abs(changed - plain).max() > 1e-5, name


def test_works_without_its_third_text_encoder(components):
    without = quiet(StableDiffusion3PQPipeline(**components | {"text_encoder_3": None, "tokenizer_3": None}))
    assert np.isfinite(generate(without)).all()


def test_starts_from_stable_diffusion_3(pipeline, tmp_path):
    source = StableDiffusion3Pipeline(**stable_diffusion_3(tiny_kl(), 4))
    source.save_pretrained(tmp_path / "sd3")
    started = quiet(StableDiffusion3PQPipeline.from_stable_diffusion_3(tmp_path / "sd3", vae=pipeline.vae))
    assert started.vae is pipeline.vae and started.transformer.config.in_channels == 8
    assert torch.equal(started.transformer.pos_embed.proj.weight[:, 4:], source.transformer.pos_embed.proj.weight)
    assert generate(started).shape == (2, 32, 32, 3)
    options = {"text_encoder_3": None, "tokenizer_3": None, "dtype": torch.bfloat16}
    small = StableDiffusion3PQPipeline.from_stable_diffusion_3(tmp_path / "sd3", vae=pipeline.vae, **options)
    assert small.text_encoder_3 is None and small.vae.dtype == torch.bfloat16

    StableDiffusionPipeline(**stable_diffusion(tiny_kl(), 4)).save_pretrained(tmp_path / "sd")
    with pytest.raises(ValueError, match="starts from a StableDiffusion3Pipeline .* holds a StableDiffusionPipeline"):
        StableDiffusion3PQPipeline.from_stable_diffusion_3(tmp_path / "sd", vae=pipeline.vae)


def test_what_does_not_fit_is_refused(pipeline, components):
    with pytest.raises(ValueError, match="have to be divisible by 8 but are 28 and 32"):
        generate(pipeline, height=28, width=32)
    with pytest.raises(ValueError, match="`transformer` takes 4 latent channels, but the `vae` has 8.*widen_denoiser"):
        StableDiffusion3PQPipeline(**components | {"transformer": stable_diffusion_3(None, 4)["transformer"]})
    with pytest.raises(TypeError, match="by `StableDiffusion3PQPipeline.from_stable_diffusion_3"):
        StableDiffusion3PQPipeline(**components | {"vae": tiny_kl(8)})
    limited = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3}, merges=[])
    limited.model_max_length = 12
    pipeline.tokenizer_2 = limited
    with pytest.raises(ValueError, match="no tokens for a part of `prompt` 'a red ladybug'"):
        generate(pipeline)


def test_img2img_takes_pictures_and_latents_and_starts_from_them(pipeline):
    img2img = quiet(StableDiffusion3PQImg2ImgPipeline.from_pipe(pipeline))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(pixels).resize((32, 32))
    options = {"strength": 0.01, "num_inference_steps": 100}
    images = generate(img2img, image=picture, **options)
    latents = img2img._encode_vae_image(img2img.image_processor.preprocess(picture))
    np.testing.assert_allclose(generate(img2img, image=latents, **options), images, atol=1e-5)
    expected = pipeline.vae(img2img.image_processor.preprocess(picture)).sample / 2 + 0.5
    expected = expected.clamp(0, 1).permute(0, 2, 3, 1).detach().numpy()
    assert np.abs(images - expected).mean() < 0.5 * np.abs(images - expected[:, ::-1]).mean()


@pytest.mark.parametrize("scheduler_class", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_a_transformer_that_predicts_latents_ends_at_them(pipeline, scheduler_class):
    latents = torch.randn(1, 8, 8, 8)
    pipeline.transformer.forward = lambda hidden_states, **_: (latents.expand_as(hidden_states),)
    scheduler = scheduler_class.from_config(create_scheduler("flow_matching", "sample", shift=2.0).config)
    pipeline.scheduler = scheduler
    torch.testing.assert_close(generate(pipeline, output_type="latent"), latents.expand(2, -1, -1, -1))
    assert "step" not in vars(scheduler), "the scheduler is left as it was"
    if scheduler_class is FlowMatchEulerDiscreteScheduler:
        modular = to_modular(pipeline)
        options = {"prompt": "a leaf", "negative_prompt": "", "num_inference_steps": 3, "output_type": "latent"}
        torch.testing.assert_close(modular(**options, output="images"), latents)
