"""Blocks for modular diffusers: they paint what the pipelines of this package paint, and drop into other families."""

import diffusers
import PIL.Image
import pytest
import torch
from conftest import tiny_config
from diffusers.modular_pipelines import SequentialPipelineBlocks
from tiny_pipelines import stable_diffusion_3, stable_diffusion_xl, tiny_kl

import diffusers_pq
from diffusers_pq import (
    Flux2KleinBasePQBlocks,
    Flux2KleinPQBlocks,
    Flux2PQBlocks,
    FluxPQBlocks,
    PQDecodeStep,
    PQEncodeStep,
    PQModel,
    QwenImagePQBlocks,
    StableDiffusion3PQImg2ImgPipeline,
    StableDiffusion3PQPipeline,
    StableDiffusionXLPQBlocks,
    StableDiffusionXLPQImg2ImgPipeline,
    StableDiffusionXLPQInpaintPipeline,
    StableDiffusionXLPQPipeline,
    ZImagePQBlocks,
)
from diffusers_pq.hub.modular import to_modular


PIPELINES = {
    "SDXL": (StableDiffusionXLPQPipeline, StableDiffusionXLPQImg2ImgPipeline, stable_diffusion_xl),
    "SD3": (StableDiffusion3PQPipeline, StableDiffusion3PQImg2ImgPipeline, stable_diffusion_3),
}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}


def tiny_flux(channels):
    sizes = {"num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (2, 2, 4)}
    sizes |= {"joint_attention_dim": 16, "pooled_projection_dim": 16, "guidance_embeds": False}
    return diffusers.FluxTransformer2DModel(in_channels=4 * channels, **sizes, **HEADS)


def tiny_flux2(channels):
    sizes = {"num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (2, 2, 2, 2), "joint_attention_dim": 16}
    return diffusers.Flux2Transformer2DModel(in_channels=4 * channels, timestep_guidance_channels=16, **sizes, **HEADS)


def tiny_qwen(channels):
    sizes = {"num_layers": 1, "joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4)}
    return diffusers.QwenImageTransformer2DModel(in_channels=4 * channels, out_channels=channels, **sizes, **HEADS)


def tiny_z_image(channels):
    sizes = {"dim": 24, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16}
    axes = {"axes_dims": [4, 4, 4], "axes_lens": [64, 16, 16]}
    return diffusers.ZImageTransformer2DModel(in_channels=channels, **axes, **sizes)


# Blocks, denoiser, prompts that are encoded, and whether pictures are a starting point.
FAMILIES = {
    "Flux": (
        FluxPQBlocks,
        tiny_flux,
        {"prompt_embeds": torch.ones(1, 3, 16), "pooled_prompt_embeds": torch.ones(1, 16)},
        True,
    ),
    "Flux 2": (Flux2PQBlocks, tiny_flux2, {"prompt_embeds": torch.ones(1, 3, 16)}, False),
    "Flux 2 Klein": (Flux2KleinPQBlocks, tiny_flux2, {"prompt_embeds": torch.ones(1, 3, 16)}, False),
    "Flux 2 Klein, base": (Flux2KleinBasePQBlocks, tiny_flux2, {"prompt_embeds": torch.ones(1, 3, 16)}, False),
    "Qwen-Image": (
        QwenImagePQBlocks,
        tiny_qwen,
        {"prompt_embeds": torch.ones(1, 3, 16), "prompt_embeds_mask": torch.ones(1, 3, dtype=torch.long)},
        True,
    ),
    "Z-Image": (ZImagePQBlocks, tiny_z_image, {"prompt_embeds": [torch.ones(3, 16)]}, True),
}


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    statistics = {"latents_mean": [0.1] * 8, "latents_std": [2.0] * 8}
    return PQModel(**tiny_config(**statistics)).eval()


def seeded():
    return {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 2, "output_type": "pt"}


@pytest.mark.parametrize("kind", PIPELINES)
def test_modular_pipelines_paint_what_ours_paint(kind, vae):
    text_to_image, image_to_image, components = PIPELINES[kind]
    pipeline = text_to_image(**components(vae, 8), guidance_scale=3.0)
    pipeline.set_progress_bar_config(disable=True)
    modular = to_modular(pipeline)
    assert type(modular).__name__.startswith(text_to_image.__name__.removesuffix("PQPipeline"))
    # Without a negative prompt, the blocks of Stable Diffusion 3 leave guidance out.
    prompts = {"prompt": "a red ladybug", "negative_prompt": ""}
    found = modular(**prompts, **seeded(), output="images")
    torch.testing.assert_close(found, pipeline(**prompts, **seeded()).images)
    unsnapped = modular(**prompts, **seeded(), output="images", quantize_latents=False)
    torch.testing.assert_close(unsnapped, pipeline(**prompts, **seeded(), quantize_latents=False).images)
    assert (unsnapped - found).abs().max() > 1e-3
    image = {"image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)), "strength": 0.9}
    expected = image_to_image.from_pipe(pipeline)(**prompts, **image, **seeded()).images
    torch.testing.assert_close(modular(**prompts, **image, **seeded(), output="images"), expected)


def test_modular_pipelines_repaint_what_ours_repaint(vae):
    inpaint = StableDiffusionXLPQInpaintPipeline(**stable_diffusion_xl(vae, 8), guidance_scale=3.0)
    inpaint.set_progress_bar_config(disable=True)
    modular = to_modular(inpaint)
    picture = PIL.Image.radial_gradient("L").convert("RGB").resize((48, 48))
    mask = PIL.Image.linear_gradient("L").resize(picture.size).point(lambda value: 255 * (value > 127))
    given = {"prompt": "a red ladybug", "negative_prompt": "", "image": picture, "mask_image": mask}
    for options in ({"strength": 0.9}, {"strength": 1.0, "num_images_per_prompt": 2}):
        expected = inpaint(**given, **options, **seeded()).images
        torch.testing.assert_close(modular(**given, **options, **seeded(), output="images"), expected)
    cropped = {"padding_mask_crop": 4, "strength": 0.9} | seeded() | {"output_type": "pil"}
    expected = inpaint(**given, **cropped).images[0]
    found = modular(**given, **cropped | {"generator": torch.Generator().manual_seed(0)}, output="images")[0]
    assert found.size == (48, 48) and found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", FAMILIES)
def test_blocks_drop_into_the_pipelines_of_other_families(kind, vae):
    make_blocks, make_denoiser, prompts, takes_pictures = FAMILIES[kind]
    torch.manual_seed(0)
    blocks = make_blocks()
    blocks.sub_blocks.pop("text_encoder")
    pipeline = blocks.init_pipeline()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline.update_components(transformer=make_denoiser(8).eval(), scheduler=scheduler, vae=vae)
    if hasattr(pipeline, "guider"):
        pipeline.update_components(guider=diffusers.ClassifierFreeGuidance(enabled=False))
    sides = {"height": 32, "width": 48}
    images, latents = pipeline(**prompts, **sides, **seeded(), output=["images", "latents"]).values()
    assert images.shape == (1, 3, 32, 48)
    latents = latents.squeeze(2)  # of Qwen-Image, with frames
    if latents.shape[1] == 32:
        latents = diffusers.Flux2Pipeline._unpatchify_latents(latents)
    assert latents.shape == (1, 8, 8, 12)
    with torch.no_grad():
        expected = vae.decode(vae.unscale_latents(latents)).sample
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1))
    if takes_pictures:
        image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
        changed = pipeline(**prompts, **sides, **seeded(), image=image, strength=0.5, output="images")
        assert changed.shape == (1, 3, 32, 48) and not torch.equal(changed, images)


def one_step(step, vae):
    pipeline = SequentialPipelineBlocks.from_blocks_dict({"step": step}).init_pipeline()
    pipeline.update_components(vae=vae)
    return pipeline


def test_pictures_are_encoded_as_ours_are(vae):
    image = torch.rand(2, 3, 37, 48, generator=torch.Generator().manual_seed(1))
    found = one_step(PQEncodeStep(), vae)(image=image, output="image_latents")
    assert found.shape == (2, 8, 9, 12), "the height is rounded down to a multiple of F"
    found = one_step(PQEncodeStep(), vae)(image=image[..., :36, :], output="image_latents")
    with torch.no_grad():
        codes = vae.encode_codes(image[..., :36, :] * 2 - 1)
        torch.testing.assert_close(found, vae.scale_latents(vae.quantizer.lookup(codes)))


def test_latents_are_left_alone_where_they_are_asked_for(vae):
    latents = torch.randn(1, 8, 4, 4)
    found = one_step(PQDecodeStep(), vae)(latents=latents, output_type="latent", output="images")
    assert torch.equal(found, latents)


def test_a_model_that_overflows_in_half_precision_decodes_in_float32(vae):
    half = PQModel(**vae.config | {"force_upcast": True}).half()
    latents, used = torch.randn(1, 8, 4, 4).half(), []
    handle = half.decoder.register_forward_pre_hook(lambda module, inputs: used.append(inputs[0].dtype))
    found = PQDecodeStep.decode(half, latents, True)
    handle.remove()
    assert used == [torch.float32] and half.dtype == torch.float16 and found.dtype == torch.float32


def test_blocks_resolve_the_workflows_of_their_family():
    blocks = diffusers_pq.StableDiffusion3PQBlocks()
    assert "vae_encoder" not in blocks.get_workflow("text2image").sub_blocks
    names = [type(block).__name__ for block in blocks.get_workflow("image2image").sub_blocks.values()]
    assert names[1] == "PQEncodeStep" and names[-1] == "PQDecodeStep"
    assert "PQPrepareLatentsStep" in str(StableDiffusionXLPQBlocks().get_workflow("image2image"))


def test_bad_input_is_named(vae):
    with pytest.raises(TypeError, match="`vae` must be a PQModel, but is of class AutoencoderKL"):
        one_step(PQDecodeStep(), tiny_kl())(latents=torch.zeros(1, 4, 2, 2))
    with pytest.raises(TypeError, match="`vae` must be a PQModel, but is missing: load it with `load_components"):
        SequentialPipelineBlocks.from_blocks_dict({"step": PQEncodeStep()}).init_pipeline()(image=torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="made latents of 4 channels, but the `vae` has 8: widen .*latent_channels=8"):
        one_step(PQDecodeStep(), vae)(latents=torch.zeros(1, 4, 2, 2))
    pipeline = to_modular(StableDiffusionXLPQPipeline(**stable_diffusion_xl(vae, 8)))
    with pytest.raises(ValueError, match="Cannot spread 2 pictures .`image`. over 1 to generate"):
        pipeline(prompt="a leaf", image=torch.rand(2, 3, 32, 32), num_inference_steps=2)
