"""What diffusers' pipelines promise, asked of all Stable Diffusion pipelines on PQ latents, with text encoders."""

import copy
import inspect

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload
from conftest import tiny_config, tiny_unet
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionPipeline,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tiny_pipelines import stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from transformers import CLIPTokenizer

from diffusers_pq import (
    PQModel,
    StableDiffusion3PQImg2ImgPipeline,
    StableDiffusion3PQPipeline,
    StableDiffusionPQImg2ImgPipeline,
    StableDiffusionPQInpaintPipeline,
    StableDiffusionPQPipeline,
    StableDiffusionXLPQImg2ImgPipeline,
    StableDiffusionXLPQInpaintPipeline,
    StableDiffusionXLPQPipeline,
)


# Text-to-image, image-to-image, inpainting; what makes their components.
FAMILIES = {
    (StableDiffusionPQPipeline, StableDiffusionPQImg2ImgPipeline, StableDiffusionPQInpaintPipeline): stable_diffusion,
    (
        StableDiffusionXLPQPipeline,
        StableDiffusionXLPQImg2ImgPipeline,
        StableDiffusionXLPQInpaintPipeline,
    ): stable_diffusion_xl,
    (StableDiffusion3PQPipeline, StableDiffusion3PQImg2ImgPipeline): stable_diffusion_3,
}
PIPELINES = [(pipeline_class, family) for family in FAMILIES for pipeline_class in family]
SCHEDULERS = [scheduler.name for scheduler in KarrasDiffusionSchedulers]


def vae():
    return PQModel(**tiny_config(latents_mean=[0.1] * 8, latents_std=[0.5] * 8)).eval()


@pytest.fixture(scope="module")
def components():
    return stable_diffusion(vae(), 8)


@pytest.fixture(params=PIPELINES, ids=lambda param: param[0].__name__)
def family(request):
    """A pipeline class, and those it shares components with."""
    return request.param


@pytest.fixture
def pipeline(family):
    pipeline_class, siblings = family
    torch.manual_seed(0)
    return quiet(pipeline_class(**FAMILIES[siblings](vae(), 8)))


def denoiser(pipeline):
    return getattr(pipeline, "transformer", None) or pipeline.unet


@pytest.fixture
def text_to_image(components):
    """With its own text encoder and UNet, which the test changes."""
    torch.manual_seed(0)
    own = {
        "unet": tiny_unet(8).eval(),
        "text_encoder": copy.deepcopy(components["text_encoder"]),
        "tokenizer": copy.deepcopy(components["tokenizer"]),
    }
    return quiet(StableDiffusionPQPipeline(**components | own))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(pipeline, prompt="a red ladybug", **kwargs):
    """Pictures `[N, H, W, 3]` in [0, 1]."""
    inputs = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    taken = inspect.signature(type(pipeline).__call__).parameters
    if "image" in taken:
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        inputs["strength"] = 0.8
        inputs["image"] = PIL.Image.fromarray(pixels)
    if "mask_image" in taken:
        inputs["mask_image"] = PIL.Image.new("L", (32, 32), 255)
    return pipeline(prompt=prompt, **inputs | kwargs).images


def test_the_prompt_and_the_guidance_matter_and_a_seed_repeats(pipeline):
    ladybug = paint(pipeline)
    assert ladybug.shape == (1, 32, 32, 3)
    assert np.array_equal(ladybug, paint(pipeline))
    quantised = {"quantize_latents": False}  # what snapping would hide
    ladybug, unguided = paint(pipeline, **quantised), paint(pipeline, guidance_scale=1.0, **quantised)
    assert np.abs(ladybug - paint(pipeline, "a big blue bus", **quantised)).max() > 1e-4
    assert np.abs(ladybug - unguided).max() > 1e-4
    assert np.abs(ladybug - paint(pipeline, negative_prompt="blue", **quantised)).max() > 1e-4


def test_the_default_guidance_is_saved_with_the_pipeline(pipeline, family, tmp_path):
    pipeline.register_to_config(guidance_scale=2.5)
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(type(pipeline).from_pretrained(tmp_path))
    other = quiet(family[1][0].from_pipe(loaded))
    pipeline.register_to_config(guidance_scale=7.5)
    assert loaded.config.guidance_scale == other.config.guidance_scale == 2.5
    options = {"quantize_latents": False}
    assert np.abs(paint(loaded, **options) - paint(pipeline, guidance_scale=2.5, **options)).max() < 1e-5
    assert np.abs(paint(loaded, **options) - paint(pipeline, **options)).max() > 1e-4


def test_a_picture_of_a_batch_is_the_picture_alone(pipeline):
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    kwargs = {}
    if "image" in inspect.signature(type(pipeline).__call__).parameters:
        kwargs = {"strength": 1.0}
    batch = paint(pipeline, ["a red ladybug", "a big blue bus"], generator=generators(1, 2), **kwargs)
    for number, prompt in enumerate(("a red ladybug", "a big blue bus")):
        (alone,) = paint(pipeline, [prompt], generator=generators(number + 1), **kwargs)
        assert np.abs(batch[number] - alone).max() < 1e-4
    assert len(paint(pipeline, num_images_per_prompt=2, **kwargs)) == 2


def test_an_adapter_brings_the_outer_layers_along(pipeline, tmp_path):
    name, ends = pipeline._denoiser_name, pipeline._ends
    plain = paint(pipeline, quantize_latents=False)
    adapted = copy.deepcopy(denoiser(pipeline))
    adapted.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(adapted))
    outer = (f"{ends.first}.", f"{ends.last}.")
    layers |= {key: value + 0.1 for key, value in adapted.state_dict().items() if key.startswith(outer)}
    pipeline.save_lora_weights(tmp_path, **{f"{name}_lora_layers": layers})
    pipeline.load_lora_weights(tmp_path)
    first = denoiser(pipeline).get_submodule(ends.first)
    assert torch.equal(first.weight, layers[f"{ends.first}.weight"])
    with_layers = paint(pipeline, quantize_latents=False)
    pipeline.unload_lora_weights()
    without_layers = paint(pipeline, quantize_latents=False)
    assert np.abs(with_layers - plain).max() > 1e-4 and np.abs(with_layers - without_layers).max() > 1e-5
    few = {key: value[:, :4].contiguous() if value.ndim == 4 else value for key, value in layers.items()}
    pipeline.save_lora_weights(tmp_path, **{f"{name}_lora_layers": few})
    with pytest.raises(ValueError, match=f"for 4 latent channels, but the `{name}` has 8"):
        pipeline.load_lora_weights(tmp_path)


def adapter_of(pipeline):
    """A state dict with LoRA layers and a changed first and last layer."""
    ends = pipeline._ends
    adapted = copy.deepcopy(denoiser(pipeline))
    adapted.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(adapted))
    outer = (f"{ends.first}.", f"{ends.last}.")
    layers |= {key: value + 0.1 for key, value in adapted.state_dict().items() if key.startswith(outer)}
    return {f"{pipeline._denoiser_name}.{key}": value for key, value in layers.items()}


def test_an_adapter_in_a_dict_is_loaded_and_stays_whole(pipeline):
    adapter = adapter_of(pipeline)
    names = list(adapter)
    pipeline.load_lora_weights(adapter)
    assert list(adapter) == names and pipeline.get_active_adapters() == ["default_0"]
    assert torch.equal(
        denoiser(pipeline).get_submodule(pipeline._ends.first).weight,
        adapter[f"{pipeline._denoiser_name}.{pipeline._ends.first}.weight"],
    )


@pytest.mark.parametrize("state", ["compiled", "adapted"])
def test_an_adapter_finds_the_outer_layers_of_a_compiled_or_adapted_unet(state, text_to_image):
    adapter, unet = adapter_of(text_to_image), text_to_image.unet
    if state == "compiled":
        text_to_image.unet = torch.compile(unet, backend="eager")
    else:
        unet.add_adapter(LoraConfig(r=2, target_modules=["conv_in", "conv_out"]), "first")
    text_to_image.load_lora_weights(adapter, adapter_name="second")
    for name in ("conv_in", "conv_out"):
        layer = unet.get_submodule(name)
        assert torch.equal(getattr(layer, "base_layer", layer).weight, adapter[f"unet.{name}.weight"])


def test_an_adapter_is_not_half_loaded_into_a_unet_that_is_offloaded_by_layers(text_to_image):
    cpu_offload(text_to_image.unet, torch.device("cpu"))
    with pytest.raises(ValueError, match="load it before `enable_sequential_cpu_offload`"):
        text_to_image.load_lora_weights(adapter_of(quiet(StableDiffusionPQPipeline(**stable_diffusion(vae(), 8)))))


def test_an_adapter_of_the_text_encoder_changes_the_picture(text_to_image, tmp_path, monkeypatch):
    # Some releases of transformers ask for a peft that is yet to come.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18.0")
    adapted = copy.deepcopy(text_to_image.text_encoder)
    adapted.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(adapted))
    text_to_image.save_lora_weights(tmp_path, text_encoder_lora_layers=layers)
    plain = paint(text_to_image, quantize_latents=False)
    text_to_image.load_lora_weights(tmp_path, adapter_name="words")
    assert text_to_image.get_list_adapters() == {"text_encoder": ["words"]}
    assert np.abs(paint(text_to_image, quantize_latents=False) - plain).max() > 1e-5
    text_to_image.unload_lora_weights()
    assert np.array_equal(paint(text_to_image, quantize_latents=False), plain)


def test_a_prompt_without_its_text_encoder_is_refused(pipeline):
    missing = pipeline._prompt_components[-1]
    setattr(pipeline, missing, None)
    with pytest.raises(ValueError, match=f"A `prompt` needs `{missing}`, which the pipeline lacks"):
        paint(pipeline)


def test_an_autoencoder_that_overflows_in_half_precision_runs_in_float32(pipeline, monkeypatch):
    pipeline.vae.register_to_config(force_upcast=True)
    pipeline.vae.to(torch.float16)
    seen = []
    decode = pipeline.vae.decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda z, **kwargs: seen.append(z.dtype) or decode(z, **kwargs))
    assert np.isfinite(paint(pipeline)).all()
    assert seen == [torch.float32] and pipeline.vae.dtype == torch.float16


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_diffusers_paints(name, components):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    scheduler = getattr(diffusers, name).from_config(components["scheduler"].config)
    pipeline = quiet(StableDiffusionPQPipeline(**components | {"scheduler": scheduler}))
    assert np.isfinite(paint(pipeline, num_inference_steps=6)).all()


def test_a_saved_pipeline_paints_the_same_and_half_as_large_in_bfloat16(pipeline, tmp_path):
    before = paint(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(type(pipeline).from_pretrained(tmp_path))
    assert np.abs(paint(loaded) - before).max() < 1e-4
    half = quiet(type(pipeline).from_pretrained(tmp_path, dtype=torch.bfloat16))
    assert {denoiser(half).dtype, half.vae.dtype, half.text_encoder.dtype} == {torch.bfloat16}
    assert half.vae.quantizer.codebooks.dtype == torch.float32, "distances are exact whatever the dtype"
    assert np.isfinite(paint(half)).all()


def test_a_pipeline_stored_in_half_precision_loads_in_float32_as_a_whole(pipeline, tmp_path):
    copy.deepcopy(pipeline).to(torch.float16).save_pretrained(tmp_path)
    loaded = quiet(type(pipeline).from_pretrained(tmp_path))
    assert {denoiser(loaded).dtype, loaded.vae.dtype, loaded.text_encoder.dtype} == {torch.float32}
    assert np.isfinite(paint(loaded)).all()
    mixed = type(pipeline).from_pretrained(tmp_path, dtype={"text_encoder": torch.float16, "default": torch.bfloat16})
    assert (mixed.text_encoder.dtype, denoiser(mixed).dtype) == (torch.float16, torch.bfloat16)


def test_from_pipe_shares_the_parts_in_the_dtype_they_have(pipeline, family):
    denoiser(pipeline).to(torch.bfloat16)
    other = family[1][1].from_pipe(pipeline)
    assert denoiser(other) is denoiser(pipeline) and other.vae is pipeline.vae
    assert (denoiser(other).dtype, other.vae.dtype) == (torch.bfloat16, torch.float32)
    codebooks = pipeline.vae.quantizer.codebooks.detach().clone()
    half = family[1][1].from_pipe(pipeline, dtype=torch.bfloat16)
    assert {denoiser(half).dtype, half.vae.dtype, half.text_encoder.dtype} == {torch.bfloat16}
    assert torch.equal(half.vae.quantizer.codebooks, codebooks)
    assert denoiser(half) is denoiser(pipeline) and half.vae is not pipeline.vae
    assert (denoiser(pipeline).dtype, pipeline.vae.dtype) == (torch.bfloat16, torch.float32), "it stays as it was"


def test_model_offloading_changes_nothing_and_covers_the_decoding(components, tmp_path, monkeypatch):
    pipeline = quiet(StableDiffusionPQPipeline(**components))
    before = paint(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(StableDiffusionPQPipeline.from_pretrained(tmp_path))
    loaded.enable_model_cpu_offload(device="cpu")
    moved = []
    pre_forward = CpuOffload.pre_forward

    def record(hook, module, *args, **kwargs):
        moved.append(type(module).__name__)
        return pre_forward(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", record)
    assert np.abs(paint(loaded) - before).max() < 1e-4
    # Else decoding would find the autoencoder's weights on the CPU.
    assert moved[-1] == "PQModel"


def test_sequential_offloading_of_the_autoencoder_changes_nothing(components, images, tmp_path):
    components["vae"].save_pretrained(tmp_path)
    offloaded = cpu_offload(PQModel.from_pretrained(tmp_path), torch.device("cpu"))
    with torch.no_grad():
        latents = offloaded.encode(images).latents
        decoded = offloaded.decode(latents).sample
        expected = components["vae"](images).sample
    torch.testing.assert_close(decoded, expected)
    assert offloaded.quantizer.codebooks.device.type == "meta"


def test_tiling_and_slicing_reach_the_autoencoder(pipeline):
    is_text_to_image = "image" not in inspect.signature(type(pipeline).__call__).parameters
    whole = paint(pipeline, height=128, width=128) if is_text_to_image else None
    pipeline.enable_vae_tiling()
    pipeline.enable_vae_slicing()
    try:
        assert pipeline.vae.use_tiling and pipeline.vae.use_slicing and np.isfinite(paint(pipeline)).all()
        if whole is not None:
            tiled = paint(pipeline, height=128, width=128)
            assert tiled.shape == whole.shape and np.abs(tiled - whole).max() > 1e-4
    finally:
        pipeline.disable_vae_tiling()
        pipeline.disable_vae_slicing()
    assert not (pipeline.vae.use_tiling or pipeline.vae.use_slicing)


def test_pipelines_share_their_components(pipeline, family):
    for other in family[1]:
        converted = quiet(other.from_pipe(pipeline))
        assert denoiser(converted) is denoiser(pipeline) and converted.vae is pipeline.vae
        assert paint(converted).shape == (1, 32, 32, 3)


def test_auto_pipelines_find_the_siblings(pipeline, family):
    autos = (AutoPipelineForText2Image, AutoPipelineForImage2Image, AutoPipelineForInpainting)
    for auto, expected in zip(autos, family[1]):
        converted = quiet(auto.from_pipe(pipeline))
        assert type(converted) is expected
        assert denoiser(converted) is denoiser(pipeline) and converted.vae is pipeline.vae
        assert converted.config.guidance_scale == pipeline.config.guidance_scale
        assert paint(converted).shape == (1, 32, 32, 3)


def test_a_textual_inversion_is_a_word_of_the_prompt(text_to_image, tmp_path):
    plain = paint(text_to_image, "a buga", quantize_latents=False)
    save_file({"buga": torch.ones(2, 16)}, tmp_path / "toy.safetensors")
    text_to_image.load_textual_inversion(tmp_path, weight_name="toy.safetensors", token="buga")
    assert np.abs(paint(text_to_image, "a buga", quantize_latents=False) - plain).max() > 1e-4
    text_to_image.unload_textual_inversion()
    assert np.abs(paint(text_to_image, "a buga", quantize_latents=False) - plain).max() < 1e-4


def load_ip_adapter(pipeline):
    attention = {}
    processors = [name for name in pipeline.unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(processors):
        width = pipeline.unet.get_submodule(name.removesuffix(".processor")).to_out[0].out_features
        for key in ("to_k_ip", "to_v_ip"):
            attention[f"{2 * number + 1}.{key}.weight"] = torch.randn(width, 16)
    projection = {"proj.weight": torch.randn(4 * 16, 8), "proj.bias": torch.zeros(4 * 16)}
    projection |= {"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16)}
    weights = {"image_proj": projection, "ip_adapter": attention}
    pipeline.load_ip_adapter(weights, subfolder=None, weight_name=None, image_encoder_folder=None)


def test_an_ip_adapter_steers_the_picture(text_to_image):
    load_ip_adapter(text_to_image)

    def steered(embedding):
        both = torch.stack([torch.zeros(1, 8), embedding])  # without and with guidance
        return paint(text_to_image, ip_adapter_image_embeds=[both], quantize_latents=False)

    one, other = steered(torch.ones(1, 8)), steered(torch.linspace(-3, 3, 8)[None])
    assert np.abs(one - other).max() > 1e-4
    text_to_image.set_ip_adapter_scale(0.0)
    assert np.abs(steered(torch.ones(1, 8)) - steered(torch.linspace(-3, 3, 8)[None])).max() < 1e-6


def test_an_ip_adapter_steers_inpainting_too_and_stays(text_to_image):
    load_ip_adapter(text_to_image)
    inpaint = quiet(StableDiffusionPQInpaintPipeline.from_pipe(text_to_image))

    def steered(pipeline, embedding):
        both = torch.stack([torch.zeros(1, 8), embedding])
        return paint(pipeline, ip_adapter_image_embeds=[both], quantize_latents=False)

    for pipeline in (inpaint, text_to_image):
        one, other = steered(pipeline, torch.ones(1, 8)), steered(pipeline, torch.linspace(-3, 3, 8)[None])
        assert np.abs(one - other).max() > 1e-4
    assert inpaint.unet.config.in_channels == 8


def test_each_given_picture_and_mask_goes_with_its_own_prompt(pipeline):
    taken = inspect.signature(type(pipeline).__call__).parameters
    if "image" not in taken:
        pytest.skip("takes no pictures")
    pictures = [PIL.Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    known = [pipeline._encode_vae_image(pipeline.image_processor.preprocess(picture))[0] for picture in pictures]
    more = {}
    if "mask_image" in taken:
        more["mask_image"] = [PIL.Image.new("L", (32, 32), grey) for grey in (0, 255)]
    more |= {"image": pictures, "num_images_per_prompt": 2, "guidance_scale": 1.0}
    seen = []
    hook = denoiser(pipeline).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, kwargs.get("hidden_states"))[0].clone()), with_kwargs=True
    )
    latents = paint(
        pipeline, ["a red bus", "a blue bus"], **more, strength=0.1, num_inference_steps=20, output_type="latent"
    )
    hook.remove()
    nearest = [int(torch.stack([(one - k).square().mean() for k in known]).argmin()) for one in seen[0]]
    assert nearest == [0, 0, 1, 1]
    if "mask_image" in taken:
        kept = [bool(torch.isclose(one, known[0]).all()) for one in latents]
        assert kept == [True, True, False, False], "the first mask keeps everything, the second nothing"


def test_a_call_takes_the_parents_arguments_in_the_parents_order(pipeline):
    parent = next(base for base in type(pipeline).__mro__ if base.__module__.startswith("diffusers.pipelines."))
    expected = inspect.signature(parent.__call__).parameters
    found = inspect.signature(pipeline.__call__).parameters
    names = [name for name in expected if name not in ("self", "kwargs")]
    assert list(found)[: len(names)] == names
    assert {name for name in found if name not in expected} == {"quantize_latents"}
    assert found["guidance_scale"].default is None and found["quantize_latents"].default is True
    pairs = [(name, found[name].default, expected[name].default) for name in names if name != "guidance_scale"]
    assert all(ours == theirs for name, ours, theirs in pairs), pairs
    with pytest.raises(TypeError, match="multiple values for keyword argument 'prompt'"):
        pipeline("a bus", prompt="a bus")
    with pytest.raises(TypeError, match=f"takes {len(names)} positional arguments, but got {len(names) + 1}"):
        pipeline(*[None] * (len(names) + 1))


def test_positional_sizes_and_steps_are_understood(components):
    pipeline = quiet(StableDiffusionPQPipeline(**components))
    seen = []
    result = pipeline("a bus", 16, 40, 2, callback_on_step_end=lambda *step: seen.append(step) or {})
    assert result.images[0].size == (40, 16) and len(seen) == 2


def test_a_unet_of_an_old_diffusers_keeps_its_size(family):
    pipeline_class, siblings = family
    parts = FAMILIES[siblings](vae(), 8)
    if "unet" not in parts:
        pytest.skip("has no UNet")
    parts["unet"].register_to_config(_diffusers_version="0.6.0")
    pipeline = quiet(pipeline_class(**parts))
    assert pipeline.unet.config.sample_size == 8
    assert paint(pipeline).shape == (1, 32, 32, 3)


IMAGE_PIPELINES = [pair[0] for pair in PIPELINES if "image" in inspect.signature(pair[0].__call__).parameters]


@pytest.mark.parametrize("pipeline_class", IMAGE_PIPELINES, ids=lambda pipeline_class: pipeline_class.__name__)
@pytest.mark.parametrize("channels", [3, 4])
def test_a_picture_is_not_taken_for_latents_of_as_many_channels(pipeline_class, channels):
    make = next(make for siblings, make in FAMILIES.items() if pipeline_class in siblings)
    autoencoder = PQModel(**tiny_config(latent_channels=channels, num_subspaces=1)).eval()
    pipeline = quiet(pipeline_class(**make(autoencoder, channels)))
    transparent = PIL.Image.new("RGBA", (32, 32), (255, 0, 0, 255))
    transparent.paste((0, 0, 0, 0), (0, 0, 16, 32))
    opaque = PIL.Image.new("RGB", (32, 32), "red")
    opaque.paste("white", (0, 0, 16, 32))
    painted = paint(pipeline, image=transparent)
    assert painted.shape == (1, 32, 32, 3)
    assert np.array_equal(painted, paint(pipeline, image=opaque)), "transparent parts are on white"
    if channels == 3:
        pixels = torch.rand(1, 3, 32, 32)
        assert paint(pipeline, image=pixels).shape == (1, 32, 32, 3)
    else:
        with pytest.raises(ValueError, match="must hold RGB pictures, but has 4 channels: only tensors"):
            paint(pipeline, image=np.zeros((1, 32, 32, 4), np.float32))


def test_the_stock_pipeline_takes_a_pq_model_with_a_scaling_factor(components):
    vae = PQModel(**tiny_config(scaling_factor=0.5)).eval()
    stock = StableDiffusionPipeline(**components | {"vae": vae})
    ours = StableDiffusionPQPipeline(**components | {"vae": vae})
    assert np.abs(paint(quiet(stock)) - paint(quiet(ours))).max() < 1e-4


def test_prompts_without_tokens_are_refused(text_to_image):
    limited = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3}, merges=[])
    limited.model_max_length = 12
    text_to_image.tokenizer = limited
    assert paint(text_to_image, "a b").shape == (1, 32, 32, 3)
    with pytest.raises(ValueError, match="no tokens for a part of `prompt` 'a ladybug'"):
        paint(text_to_image, "a ladybug")
    with pytest.raises(ValueError, match="no tokens for a part of `prompt` 'ugly'"):
        paint(text_to_image, "a", negative_prompt="ugly")
    limited.add_tokens(["<toy>"] * 1)
    text_to_image.text_encoder.resize_token_embeddings(4)
    with pytest.raises(ValueError, match=r"The text encoder has 4 tokens and none for \['<toy>'\]"):
        paint(text_to_image, "a <toy>")


def test_a_folder_without_pq_parts_is_refused(components, tmp_path):
    kl = diffusers.AutoencoderKL(norm_num_groups=4, block_out_channels=(8,), latent_channels=8)
    StableDiffusionPipeline(**components | {"vae": kl}).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="`vae` must be a PQModel, but is of class AutoencoderKL"):
        StableDiffusionPQPipeline.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="model_index.json"):
        StableDiffusionPQPipeline.from_pretrained(tmp_path / "vae")


def test_diffusion_pipeline_loads_a_saved_pipeline(components, tmp_path):
    StableDiffusionPQPipeline(**components).save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is StableDiffusionPQPipeline
