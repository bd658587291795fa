import runpy
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_config, tiny_unet
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

from diffusers_pq import (
    PQModel,
    StableDiffusionPQImg2ImgPipeline,
    StableDiffusionPQInpaintPipeline,
    StableDiffusionPQPipeline,
)
from diffusers_pq.training.stable_diffusion import create_stable_diffusion, train_clip_tokenizer


PICTURES = Path(__file__).parents[2] / "benchmarks" / "generate_pictures.py"
SCHEDULER = {"scheduler": DDIMScheduler(), "requires_safety_checker": False}
NOTHING_ELSE = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}


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
    return pipeline(**prompt, **{"num_inference_steps": 2, "generator": generator} | kwargs)


def noise_picture(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).resize((width, height))


def test_default_size_comes_from_the_downsampling_factor(pipeline):
    images = generate(pipeline, output_type="np").images
    assert images.shape == (2, 32, 32, 3)
    assert generate(pipeline, height=16, width=40).images[0].size == (40, 16)


def test_the_command_paints_any_size_and_keeps_every_picture(pipeline, tmp_path):
    unet = {name: value for name, value in tiny_unet(8).config.items() if not name.startswith("_")}
    for name in ("in_channels", "out_channels", "cross_attention_dim"):
        del unet[name]
    text_encoder = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = train_clip_tokenizer(["a fox", "a hen"], 520, 8)
    create_stable_diffusion(pipeline.vae, tokenizer, unet, text_encoder, "epsilon").save_pretrained(tmp_path / "pq")
    script = runpy.run_path(str(PICTURES))
    flags = ["--models", f"A={tmp_path / 'pq'}", "--prompts", "a fox", "a hen", "--num_images_per_prompt", "2"]
    flags += ["--height", "16", "--width", "48", "--num_inference_steps", "1", "--output", str(tmp_path / "grid.png")]
    script["main"](script["parse_args"]([*flags, "--pictures_dir", str(tmp_path / "all")]))
    names = {path.name for path in (tmp_path / "all").iterdir()}
    assert names == {f"A-{prompt}-{number}.png" for prompt in (0, 1) for number in (0, 1)}
    with PIL.Image.open(tmp_path / "all" / "A-1-0.png") as picture, PIL.Image.open(tmp_path / "grid.png") as grid:
        assert picture.size == (48, 16) and grid.width > grid.height


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
    loaded = StableDiffusionPQPipeline.from_pretrained(tmp_path, **NOTHING_ELSE)
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
    assert generate(pipeline, height=36, width=32, output_type="np").images.shape[1:3] == (36, 32), "no multiple of 8"
    with pytest.raises(ValueError, match="`unet` takes 4 latent channels, but the `vae` has 8"):
        StableDiffusionPQPipeline(
            pipeline.vae, None, None, tiny_unet(4), DDIMScheduler(), None, None, requires_safety_checker=False
        )
    with pytest.raises(TypeError, match="`vae` must be a PQModel, but is of class AutoencoderKL"):
        StableDiffusionPQPipeline(
            AutoencoderKL(norm_num_groups=4, block_out_channels=(8,)), unet=tiny_unet(4), **SCHEDULER, **NOTHING_ELSE
        )


def test_starts_from_a_stable_diffusion_pipeline(pipeline, tmp_path):
    kl = AutoencoderKL(norm_num_groups=4, block_out_channels=(8,))
    source = StableDiffusionPipeline(kl, unet=tiny_unet(4), **SCHEDULER, **NOTHING_ELSE)
    source.save_pretrained(tmp_path)
    started = StableDiffusionPQPipeline.from_stable_diffusion(tmp_path, vae=pipeline.vae, **NOTHING_ELSE)
    assert started.vae is pipeline.vae and started.unet.config.in_channels == 8
    assert torch.equal(started.unet.conv_in.weight[:, 4:], source.unet.conv_in.weight)
    started.set_progress_bar_config(disable=True)
    assert generate(started, output_type="np").images.shape == (2, 32, 32, 3)
    half = {"vae": pipeline.vae, "dtype": torch.bfloat16}
    started = StableDiffusionPQPipeline.from_stable_diffusion(tmp_path, **half, **NOTHING_ELSE)
    assert started.vae.dtype == started.unet.dtype == torch.bfloat16
    assert torch.equal(started.vae.quantizer.codebooks, pipeline.vae.quantizer.codebooks)
    assert pipeline.vae.dtype == torch.float32, "the caller's model stays as it is"


def test_img2img_without_noise_is_the_reconstruction(pipeline):
    img2img = StableDiffusionPQImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)
    picture = noise_picture(40, 32)
    pixels = img2img.image_processor.preprocess(picture)
    expected = (pipeline.vae(pixels).sample / 2 + 0.5).clamp(0, 1).detach()
    # At the lowest strength one step removes almost no noise: most codes stay those of the picture.
    images = generate(img2img, image=picture, strength=0.001, num_inference_steps=1000, output_type="pt").images
    assert images.shape == (2, 3, 32, 40)
    assert (images - expected).abs().mean() < 0.2 * (images - expected.flip(-1)).abs().mean()
    latents = img2img._encode_vae_image(pixels)
    again = generate(img2img, image=latents, strength=0.001, num_inference_steps=1000, output_type="pt").images
    torch.testing.assert_close(again, images)
    changed = generate(img2img, image=picture, strength=1.0, output_type="pt").images
    assert (changed - expected).abs().mean() > 2 * (images - expected).abs().mean()


def test_img2img_spreads_pictures_over_prompts_and_refuses_what_does_not_divide(pipeline):
    img2img = StableDiffusionPQImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)
    pictures = [noise_picture(32, 32)] * 3
    with pytest.raises(ValueError, match="Cannot spread 3 images .* over 2 pictures"):
        generate(img2img, image=pictures)
    with pytest.raises(ValueError, match="`generator` has 1 entries for 2 pictures"):
        generate(img2img, image=pictures[0], generator=[torch.Generator()])


@pytest.mark.parametrize("pipeline_class", [StableDiffusionPQImg2ImgPipeline, StableDiffusionPQInpaintPipeline])
def test_a_strength_that_leaves_no_step_is_refused(pipeline_class, pipeline):
    given = {"mask_image": noise_picture(32, 32)} if pipeline_class is StableDiffusionPQInpaintPipeline else {}
    painter = pipeline_class(**pipeline.components, requires_safety_checker=False)
    with pytest.raises(ValueError, match=r"strength.* 0\.05"):
        generate(painter, image=noise_picture(32, 32), strength=0.05, num_inference_steps=10, **given)


@pytest.fixture
def inpaint(pipeline):
    inpaint = StableDiffusionPQInpaintPipeline(**pipeline.components, requires_safety_checker=False)
    inpaint.set_progress_bar_config(disable=True)
    return inpaint


def test_inpainting_keeps_what_the_mask_keeps(inpaint):
    picture, mask = noise_picture(32, 32), PIL.Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    latents = generate(inpaint, image=picture, mask_image=mask, output_type="latent").images
    kept = inpaint._encode_vae_image(inpaint.image_processor.preprocess(picture))
    torch.testing.assert_close(latents[0, :, :, :4], kept[0, :, :, :4])
    assert not torch.isclose(latents[0, :, :, 4:], kept[0, :, :, 4:]).any()
    assert inpaint.unet.config.in_channels == 8, "put back after the parent's check for 4 channels"
    images = generate(inpaint, image=picture, mask_image=mask).images
    assert [image.size for image in images] == [(32, 32)] * 2


def test_inpainting_checks_sizes_by_the_downsampling_factor(inpaint):
    pictures = {"image": PIL.Image.new("RGB", (36, 32)), "mask_image": PIL.Image.new("L", (36, 32), 255)}
    assert generate(inpaint, **pictures, height=32, width=36).images[0].size == (36, 32)
    with pytest.raises(ValueError, match="multiples of the downsampling factor F = 4, but are 32 and 30"):
        generate(inpaint, **pictures, height=32, width=30)


def test_inpaints_at_a_large_downsampling_factor():
    torch.manual_seed(0)
    blocks = {name: (tiny_config()[name][-1],) * 5 for name in ("down_block_types", "up_block_types")}
    vae = PQModel(**tiny_config(**blocks, block_out_channels=(8,) * 5))
    components = vae, None, None, tiny_unet(8), DDIMScheduler(), None, None
    pipeline = StableDiffusionPQInpaintPipeline(*components, requires_safety_checker=False)
    pictures = {"image": PIL.Image.new("RGB", (64, 48)), "mask_image": PIL.Image.new("L", (64, 48), 255)}
    assert pipeline.vae_scale_factor == 16
    assert generate(pipeline, **pictures, height=48, width=64).images[0].size == (64, 48)


def test_inpainting_a_crop_pastes_it_into_the_picture(inpaint):
    picture, mask = noise_picture(96, 64), PIL.Image.new("L", (96, 64))
    mask.paste(255, (40, 20, 60, 40))
    (image, _) = generate(inpaint, image=picture, mask_image=mask, padding_mask_crop=4).images
    before, after = np.asarray(picture), np.asarray(image)
    inside = np.asarray(mask) > 0
    assert after.shape == before.shape
    assert np.array_equal(before[~inside], after[~inside]) and (before[inside] != after[inside]).mean() > 0.5
    with pytest.raises(ValueError, match="needs a PIL picture as `image`, but it is a Tensor"):
        generate(inpaint, image=torch.zeros(1, 3, 32, 32), mask_image=mask, padding_mask_crop=4)
    with pytest.raises(ValueError, match="needs `output_type='pil'`, but it is 'np'"):
        generate(inpaint, image=picture, mask_image=mask, padding_mask_crop=4, output_type="np")


@pytest.mark.parametrize("region", [(16, 8, 240, 56), (100, 0, 110, 64)])
def test_a_crop_of_other_proportions_comes_back_where_it_was_cut_out(region, inpaint, monkeypatch):
    # Without a denoiser: what comes out of the crop is what went in.
    monkeypatch.setattr(inpaint, "_generate", lambda call, *_, **__: call())
    seen = []

    def paint(image, mask_image, **_):
        seen.extend([image, mask_image])
        return StableDiffusionPipelineOutput([image], None)

    picture = PIL.Image.radial_gradient("L").resize((256, 64)).convert("RGB")
    mask = PIL.Image.new("L", picture.size)
    mask.paste(255, region)
    result = inpaint._inpaint(partial(paint), picture, mask, 64, 64, 0, None, True, "pil", True).images[0]
    assert [one.size for one in seen] == [(64, 64)] * 2
    difference = np.abs(np.asarray(result, int) - np.asarray(picture, int))
    assert difference.mean() < 2 and np.asarray(seen[0]).std() > 10


def test_masks_that_cannot_be_cropped_are_refused(inpaint):
    picture, mask = noise_picture(96, 64), PIL.Image.new("L", (96, 64))
    with pytest.raises(ValueError, match="`mask_image` is all black"):
        generate(inpaint, image=picture, mask_image=mask, padding_mask_crop=4)
    with pytest.raises(ValueError, match=r"one size, but are \(96, 64\) and \(32, 64\)"):
        generate(inpaint, image=picture, mask_image=mask.resize((32, 64)), padding_mask_crop=4)


def test_inpainting_refuses_latents_and_pictures_that_do_not_divide(inpaint):
    mask = PIL.Image.new("L", (32, 32), 255)
    with pytest.raises(ValueError, match="`image` holds latents .8 channels., but inpainting needs pictures"):
        generate(inpaint, image=torch.zeros(1, 8, 8, 8), mask_image=mask)
    with pytest.raises(ValueError, match="Cannot spread 3 images .`image`. over 2 pictures"):
        generate(inpaint, image=[noise_picture(32, 32)] * 3, mask_image=mask)
    with pytest.raises(ValueError, match="Cannot spread 3 images .`mask_image`. over 2 pictures"):
        generate(inpaint, image=noise_picture(32, 32), mask_image=[mask] * 3)


def test_every_pipeline_loads_from_one_folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    for pipeline_class in (StableDiffusionPQImg2ImgPipeline, StableDiffusionPQInpaintPipeline):
        loaded = pipeline_class.from_pretrained(tmp_path, **NOTHING_ELSE)
        assert isinstance(loaded.vae, PQModel)
