import json

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_config, tiny_unet
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from tiny_pipelines import stable_diffusion, stable_diffusion_xl, tiny_kl

from diffusers_pq import (
    PQModel,
    StableDiffusionPQPipeline,
    StableDiffusionXLPQImg2ImgPipeline,
    StableDiffusionXLPQInpaintPipeline,
    StableDiffusionXLPQPipeline,
)


PROMPT = {"prompt": ["a red ladybug", "a big blue bus"]}


@pytest.fixture
def components():
    torch.manual_seed(0)
    vae = PQModel(**tiny_config(latents_mean=[0.1] * 8, latents_std=[0.5] * 8)).eval()
    return stable_diffusion_xl(vae, 8)


@pytest.fixture
def pipeline(components):
    return quiet(StableDiffusionXLPQPipeline(**components))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return pipeline(**PROMPT | {"num_inference_steps": 2, "generator": generator, "output_type": "np"} | kwargs).images


def noise_picture(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).resize((width, height))


def test_decodes_unscaled_snapped_latents_of_the_default_size(pipeline):
    latents = generate(pipeline, output_type="latent")
    assert latents.shape == (2, 8, 8, 8)
    expected = (pipeline.vae.decode(latents * 0.5 + 0.1).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(generate(pipeline, output_type="pt"), expected)
    assert not torch.allclose(generate(pipeline, output_type="pt", quantize_latents=False), expected)
    assert generate(pipeline, height=20, width=40).shape == (2, 20, 40, 3), "no multiples of 8"


def test_both_prompts_and_the_sizes_matter(pipeline):
    options = {"quantize_latents": False}
    plain = generate(pipeline, **options)
    for change in ({"prompt_2": ["a leaf", "a bus"]}, {"original_size": (8, 8)}, {"crops_coords_top_left": (9, 9)}):
        assert np.abs(generate(pipeline, **options | change) - plain).max() > 1e-5, change


def test_starts_from_a_base_model_of_stable_diffusion_xl(pipeline, tmp_path):
    source = StableDiffusionXLPipeline(**stable_diffusion_xl(tiny_kl(), 4))
    source.save_pretrained(tmp_path / "xl")
    started = quiet(StableDiffusionXLPQPipeline.from_stable_diffusion_xl(tmp_path / "xl", vae=pipeline.vae))
    assert started.vae is pipeline.vae and started.unet.config.in_channels == 8
    assert torch.equal(started.unet.conv_in.weight[:, 4:], source.unet.conv_in.weight)
    assert generate(started).shape == (2, 32, 32, 3)

    index = json.loads((tmp_path / "xl" / "model_index.json").read_text()) | {"requires_aesthetics_score": True}
    (tmp_path / "refiner").mkdir()
    (tmp_path / "refiner" / "model_index.json").write_text(json.dumps(index))
    StableDiffusionPipeline(**stable_diffusion(tiny_kl(), 4)).save_pretrained(tmp_path / "sd")
    for folder, name in (("refiner", "StableDiffusionXLPipeline"), ("sd", "StableDiffusionPipeline")):
        with pytest.raises(ValueError, match=f"starts from a StableDiffusionXLPipeline .* holds a {name}"):
            StableDiffusionXLPQPipeline.from_stable_diffusion_xl(tmp_path / folder, vae=pipeline.vae)
    with pytest.raises(ValueError, match="starts from a StableDiffusionPipeline .* holds a StableDiffusionXLPipeline"):
        StableDiffusionPQPipeline.from_stable_diffusion(tmp_path / "xl", vae=pipeline.vae)


def test_what_does_not_fit_is_refused(pipeline, components):
    with pytest.raises(ValueError, match="multiples of the downsampling factor F = 4, but are 30 and 32"):
        generate(pipeline, height=30, width=32)
    with pytest.raises(ValueError, match="`unet` takes 4 latent channels, but the `vae` has 8"):
        StableDiffusionXLPQPipeline(**components | {"unet": stable_diffusion_xl(None, 4)["unet"]})
    with pytest.raises(ValueError, match="`unet` is not a UNet of Stable Diffusion XL"):
        StableDiffusionXLPQPipeline(**components | {"unet": tiny_unet(8)})
    with pytest.raises(ValueError, match="`unet` is a UNet of Stable Diffusion XL: StableDiffusionPQPipeline takes"):
        StableDiffusionPQPipeline(**stable_diffusion(components["vae"], 8) | {"unet": components["unet"]})
    with pytest.raises(TypeError, match="by `StableDiffusionXLPQPipeline.from_stable_diffusion_xl"):
        StableDiffusionXLPQPipeline(**components | {"vae": tiny_kl(8)})


def test_latents_are_not_handed_over_to_a_refiner(pipeline):
    with pytest.raises(ValueError, match="`denoising_end` is for .* the refiner, which takes 4 channels and not 8"):
        generate(pipeline, denoising_end=0.8)
    img2img = StableDiffusionXLPQImg2ImgPipeline.from_pipe(pipeline)
    with pytest.raises(ValueError, match="`denoising_start` is for"):
        generate(img2img, image=noise_picture(32, 32), denoising_start=0.8)


def test_img2img_takes_pictures_and_latents_and_keeps_those_of_each_prompt(pipeline):
    img2img = quiet(StableDiffusionXLPQImg2ImgPipeline.from_pipe(pipeline))
    options = {"strength": 0.5, "quantize_latents": False}
    picture = noise_picture(40, 32)
    images = generate(img2img, image=picture, **options)
    assert images.shape == (2, 32, 40, 3)
    latents = img2img._encode_vae_image(img2img.image_processor.preprocess(picture))
    np.testing.assert_allclose(generate(img2img, image=latents, **options), images, atol=1e-5)
    with pytest.raises(ValueError, match="Cannot spread 3 images"):
        generate(img2img, image=[picture] * 3, **options)


def test_inpainting_keeps_what_the_mask_keeps(pipeline):
    inpaint = quiet(StableDiffusionXLPQInpaintPipeline.from_pipe(pipeline))
    picture, mask = noise_picture(32, 32), PIL.Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    pictures = {"image": picture, "mask_image": mask}
    latents = generate(inpaint, **pictures, strength=1.0, output_type="latent")
    kept = inpaint._encode_vae_image(inpaint.image_processor.preprocess(picture))
    torch.testing.assert_close(latents[0, :, :, :4], kept[0, :, :, :4])
    assert not torch.isclose(latents[0, :, :, 4:], kept[0, :, :, 4:]).any()
    assert inpaint.unet.config.in_channels == 8, "put back after the parent's check for 4 channels"
    (image, _) = generate(inpaint, **pictures, padding_mask_crop=4, strength=1.0, output_type="pil")
    before, after = np.asarray(picture), np.asarray(image)
    assert np.array_equal(before[:, :16], after[:, :16]) and (before[:, 16:] != after[:, 16:]).any()
    with pytest.raises(ValueError, match="multiples of the downsampling factor F = 4, but are 32 and 30"):
        generate(inpaint, **pictures, height=32, width=30)


def test_pictures_are_watermarked_and_latents_are_not(pipeline):
    class Watermark:
        def apply_watermark(self, images):
            assert images.shape[1] == 3
            return -torch.ones_like(images)

    img2img = quiet(StableDiffusionXLPQImg2ImgPipeline.from_pipe(pipeline))
    pipeline.watermark = img2img.watermark = Watermark()
    assert not generate(pipeline).any()
    options = {"image": noise_picture(32, 32), "strength": 0.5}
    assert not generate(img2img, **options).any()
    assert generate(img2img, **options, output_type="latent").any()


def test_an_ip_adapter_steers_the_picture(pipeline):
    attention = {}
    processors = [name for name in pipeline.unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(processors):
        width = pipeline.unet.get_submodule(name.removesuffix(".processor")).to_out[0].out_features
        for key in ("to_k_ip", "to_v_ip"):
            attention[f"{2 * number + 1}.{key}.weight"] = torch.randn(width, 24)
    projection = {"proj.weight": torch.randn(4 * 24, 8), "proj.bias": torch.zeros(4 * 24)}
    projection |= {"norm.weight": torch.ones(24), "norm.bias": torch.zeros(24)}
    state = {"image_proj": projection, "ip_adapter": attention}
    pipeline.load_ip_adapter(state, subfolder=None, weight_name=None, image_encoder_folder=None)

    def steered(embedding):
        both = torch.stack([torch.zeros(1, 8), embedding])  # without and with guidance
        return generate(pipeline, prompt="a bus", ip_adapter_image_embeds=[both], quantize_latents=False)

    one, other = steered(torch.ones(1, 8)), steered(torch.linspace(-3, 3, 8)[None])
    assert np.abs(one - other).max() > 1e-4
