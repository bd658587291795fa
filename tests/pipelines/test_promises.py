"""What diffusers' pipelines promise, asked of all of this package's, whatever they are conditioned on."""

import inspect

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_config
from diffusers import DiffusionPipeline
from test_pipeline_latent_diffusion_pq import make as make_latent_diffusion
from test_pipeline_masked_pq import make as make_masked
from test_pipelines import FAMILIES

from diffusers_pq import PQModel


STEPS = 3


def _text_to_image(pipeline_class, components):
    vae = PQModel(**tiny_config(latents_mean=[0.1] * 8, latents_std=[0.5] * 8)).eval()
    torch.manual_seed(0)
    return pipeline_class(**components(vae, 8))


# name -> makes the pipeline
PIPELINES = {
    pipeline_class.__name__: lambda pipeline_class=pipeline_class, components=components: _text_to_image(
        pipeline_class, components
    )
    for family, components in FAMILIES.items()
    for pipeline_class in family
}
PIPELINES |= {
    "LatentDiffusionPQPipeline-unet": make_latent_diffusion,
    "LatentDiffusionPQPipeline-transformer": lambda: make_latent_diffusion("transformer"),
    "MaskedPQPipeline": make_masked,
    "MaskedPQPipeline-text": lambda: make_masked(text=True),
}


@pytest.fixture(params=PIPELINES)
def pipeline(request):
    torch.manual_seed(0)
    made = PIPELINES[request.param]()
    made.set_progress_bar_config(disable=True)
    return made


def arguments(pipeline):
    return inspect.signature(type(pipeline).__call__).parameters


def is_masked(pipeline):
    return type(pipeline).__name__.startswith("Masked")


def inputs(pipeline, count=1, **kwargs):
    """Of a call for `count` pictures of 32 x 32 pixels, with a seed for each."""
    taken = arguments(pipeline)
    given = {"num_inference_steps": STEPS, "output_type": "np"}
    given["generator"] = [torch.Generator().manual_seed(number) for number in range(count)]
    if "class_labels" in taken and getattr(pipeline, "text_encoder", None) is None:
        given["class_labels"] = [number % 3 for number in range(count)]
    else:
        given["prompt"] = ["a red apple", "a frog", "a red frog"][:count]
    if "image" in taken and not is_masked(pipeline):
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        given |= {"image": [PIL.Image.fromarray(pixels)] * count, "strength": 0.9}
        if "mask_image" in taken:
            given["mask_image"] = [PIL.Image.new("L", (32, 32), 255)] * count
    return given | kwargs


def paint(pipeline, count=1, **kwargs):
    return pipeline(**inputs(pipeline, count, **kwargs)).images


def assert_near(found, expected):
    """Codes can turn out otherwise near a border between two entries: most of the picture stays near."""
    assert found.shape == expected.shape and np.isfinite(found).all()
    assert (np.abs(found - expected) > 0.1).mean() < 0.1


def test_tuples_hold_what_the_outputs_hold(pipeline):
    plain = pipeline(**inputs(pipeline, return_dict=False))
    assert isinstance(plain, tuple) and np.array_equal(plain[0], paint(pipeline))


def test_outputs_come_in_every_type(pipeline):
    pictures = paint(pipeline)
    tensor = paint(pipeline, output_type="pt")
    np.testing.assert_allclose(tensor.permute(0, 2, 3, 1).numpy(), pictures, atol=1e-6)
    (picture,) = paint(pipeline, output_type="pil")
    assert isinstance(picture, PIL.Image.Image) and picture.size == (32, 32)
    np.testing.assert_allclose(np.asarray(picture) / 255, pictures[0], atol=0.51 / 255)


def test_latents_decode_to_the_picture(pipeline):
    latents = paint(pipeline, output_type="latent")
    with torch.no_grad():
        if is_masked(pipeline):
            decoded = pipeline.vae.decode_codes(latents).sample
        else:
            decoded = pipeline.vae.decode(pipeline.vae.unscale_latents(latents)).sample
    expected = paint(pipeline)
    if "mask_image" in arguments(pipeline) and not is_masked(pipeline):  # what the mask keeps is pasted
        assert decoded.shape[-2:] == expected.shape[1:3]
        return
    np.testing.assert_allclose((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


def test_a_picture_of_a_batch_is_the_picture_alone(pipeline):
    batch = paint(pipeline, 3)
    assert batch.shape == (3, 32, 32, 3)
    assert_near(batch[:1], paint(pipeline))


def test_several_pictures_of_one_condition(pipeline):
    if "num_images_per_prompt" not in arguments(pipeline):
        pytest.skip("has no such argument")
    generators = [torch.Generator().manual_seed(number) for number in range(3)]
    pictures = paint(pipeline, num_images_per_prompt=3, generator=generators)
    assert pictures.shape == (3, 32, 32, 3)
    assert np.abs(pictures[0] - pictures[1]).max() > 1e-3
    assert_near(pictures[:1], paint(pipeline))


def test_callbacks_see_every_step_and_change_what_they_return(pipeline):
    if "callback_on_step_end" not in arguments(pipeline):
        pytest.skip("has no such argument")
    name = "codes" if is_masked(pipeline) else "latents"
    seen = []

    def look(pipe, step, timestep, tensors):
        assert pipe is pipeline and tensors.keys() == {name}
        seen.append(step)
        return tensors

    expected = paint(pipeline)
    found = paint(pipeline, callback_on_step_end=look, callback_on_step_end_tensor_inputs=[name])
    assert np.array_equal(found, expected) and seen == list(range(len(seen))) and len(seen) > 1
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        paint(pipeline, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["not there"])

    def blank(pipe, step, timestep, tensors):
        return {name: torch.zeros_like(tensors[name])} if step == seen[-1] else {}

    changed = paint(pipeline, callback_on_step_end=blank, callback_on_step_end_tensor_inputs=[name])
    assert np.abs(changed - expected).max() > 1e-3


def test_a_callback_can_end_the_sampling(pipeline):
    if "callback_on_step_end" not in arguments(pipeline) or not hasattr(pipeline, "interrupt"):
        pytest.skip("cannot be interrupted")
    seen = []

    def stop(pipe, step, timestep, tensors):
        seen.append(step)
        pipe._interrupt = True
        return tensors

    assert np.isfinite(paint(pipeline, callback_on_step_end=stop)).all() and seen == [0]


def test_slicing_the_attention_changes_nothing(pipeline):
    expected = paint(pipeline)
    pipeline.enable_attention_slicing("max")
    assert_near(paint(pipeline), expected)
    pipeline.disable_attention_slicing()
    assert_near(paint(pipeline), expected)


def test_a_variant_is_written_and_read(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert all("fp16" in path.name for path in tmp_path.rglob("*.safetensors"))
    with pytest.raises(OSError):
        type(pipeline).from_pretrained(tmp_path)
    loaded = type(pipeline).from_pretrained(tmp_path, variant="fp16")
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(paint(loaded), paint(pipeline))


def test_components_make_the_same_pipeline(pipeline, tmp_path):
    given = dict(pipeline.components)
    if "id2label" in pipeline.config:
        given["id2label"] = pipeline.config.id2label
    again = type(pipeline)(**given)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(paint(again), paint(pipeline))
    pipeline.save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)) is type(pipeline)


def test_bfloat16_paints_finite_pictures(pipeline):
    pipeline.to(torch.bfloat16)
    assert pipeline.dtype == torch.bfloat16
    pictures = paint(pipeline, 2)
    assert pictures.shape == (2, 32, 32, 3) and np.isfinite(pictures).all()


def test_layerwise_casting_paints_finite_pictures(pipeline):
    for name in ("unet", "transformer", "vae"):
        if getattr(pipeline, name, None) is not None:
            getattr(pipeline, name).enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    pictures = paint(pipeline, 2)
    assert pictures.shape == (2, 32, 32, 3) and np.isfinite(pictures).all()


def test_prompts_can_be_encoded_beforehand(pipeline):
    if "prompt_embeds" not in arguments(pipeline) or is_masked(pipeline):
        pytest.skip("has no such argument")
    parent = next(parent for parent in type(pipeline).__mro__ if parent.__module__.startswith("diffusers."))
    taken = inspect.signature(parent.encode_prompt).parameters
    given = {"prompt": "a red apple", "device": "cpu", "num_images_per_prompt": 1}
    given |= {"do_classifier_free_guidance": True, "prompt_2": None, "prompt_3": None}
    encoded = pipeline.encode_prompt(**{name: value for name, value in given.items() if name in taken})
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    found = paint(pipeline, prompt=None, **dict(zip(names, encoded)))
    assert_near(found, paint(pipeline))


def test_the_progress_bar_can_be_switched_off_and_on(pipeline, capsys):
    paint(pipeline)
    assert "%|" not in capsys.readouterr().err
    pipeline.set_progress_bar_config(disable=False)
    paint(pipeline)
    assert "%|" in capsys.readouterr().err
