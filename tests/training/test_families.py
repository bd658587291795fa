"""Pipelines of each family are adapted by the real script, pushed, and loaded and used in another process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_config
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from hub_stand_in import Hub
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from scripts import run_script
from tiny_pipelines import stable_diffusion, stable_diffusion_3, stable_diffusion_xl, tiny_kl

import diffusers_pq
from diffusers_pq import PQModel
from diffusers_pq.models.widening import outer_layers, widen_denoiser
from diffusers_pq.training.denoiser import ConditionalDenoiser
from diffusers_pq.training.families import StableDiffusion, StableDiffusion3, StableDiffusionXL, find_family


TRAIN_PQSD = Path(__file__).parents[2] / "training_scripts" / "train_pqsd.py"
SOURCES = {
    StableDiffusion: (StableDiffusionPipeline, stable_diffusion, "from_stable_diffusion"),
    StableDiffusionXL: (StableDiffusionXLPipeline, stable_diffusion_xl, "from_stable_diffusion_xl"),
    StableDiffusion3: (StableDiffusion3Pipeline, stable_diffusion_3, "from_stable_diffusion_3"),
}
NEW = [StableDiffusionXL, StableDiffusion3]  # what test_train_pqsd.py does not train
by_family = pytest.mark.parametrize("family", SOURCES, ids=lambda family: family.__name__)
by_new_family = pytest.mark.parametrize("family", NEW, ids=lambda family: family.__name__)


def source_of(family):
    pipeline_class, components, _ = SOURCES[family]
    return pipeline_class(**components(tiny_kl(), 4))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Captioned pictures, a PQ model, and a pipeline of each family on the latents of a KL autoencoder."""
    folder = tmp_path_factory.mktemp("families")
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 2)):
        (folder / "data" / split).mkdir(parents=True)
        lines = []
        for number in range(count):
            pixels = generator.integers(0, 256, (40, 56, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / "data" / split / f"{number}.png")
            caption = ["a red ladybug", "a big blue bus", "a leaf"][number % 3]
            lines.append(json.dumps({"file_name": f"{number}.png", "text": caption}))
        (folder / "data" / split / "metadata.jsonl").write_text("\n".join(lines))
    torch.manual_seed(0)
    PQModel(**tiny_config()).save_pretrained(folder / "pq")
    for family in SOURCES:
        source_of(family).save_pretrained(folder / family.__name__)
    return folder


def adapt(workspace, family, output, *extra, stages="32:1:1e-2:conv 40:2:1e-2:all"):
    arguments = ("--pretrained_model_name_or_path", workspace / family.__name__, "--vae_name_or_path")
    arguments += (workspace / "pq", "--train_data_dir", workspace / "data", "--cache_dir", workspace / "cache")
    arguments += ("--stages", stages, "--min_image_side", 1, "--train_batch_size", 2, "--num_statistics_images", 4)
    return run_script(TRAIN_PQSD, *arguments, "--output_dir", workspace / output, *extra)


def weights(family, folder):
    return load_file(folder / family.denoiser_name / "diffusion_pytorch_model.safetensors")


def paint(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    return pipeline("a big blue bus", **options).images


@pytest.fixture(scope="module")
def adapted(workspace):
    """Adapts a pipeline of a family once and returns its folder."""

    def get(family):
        folder = workspace / f"{family.__name__}-adapted"
        if not folder.is_dir():
            extra = ("--noise_shift", "auto", "--validation_steps", 3, "--validation_prompts", "a leaf")
            adapt(workspace, family, folder.name, *extra, "--checkpointing_steps", 1, "--use_ema", "--random_flip")
        return folder

    return get


@by_new_family
def test_a_pipeline_is_adapted_in_two_stages_and_resumed_exactly(family, workspace, adapted):
    folder = adapted(family)
    pipeline = family.pq_pipeline_class.from_pretrained(folder)
    assert paint(pipeline).shape == (1, 40, 40, 3)
    assert getattr(pipeline, family.denoiser_name).config.in_channels == 8
    assert len(pipeline.vae.config.latents_std) == 8
    assert json.loads((folder / "best" / "validation.json").read_text())["loss"] > 0
    extra = ("--noise_shift", "auto", "--use_ema", "--random_flip")
    extra += ("--resume_from_checkpoint", folder / "checkpoint-1")
    adapt(workspace, family, f"{family.__name__}-resumed", *extra)
    expected = weights(family, folder)
    resumed = weights(family, workspace / f"{family.__name__}-resumed")
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())


def test_the_shift_of_flow_matching_grows_with_the_latents(adapted):
    scheduler = StableDiffusion3.pq_pipeline_class.from_pretrained(adapted(StableDiffusion3)).scheduler
    # 8 channels of 10 x 10 instead of 4 of 8 x 8.
    assert scheduler.config.shift == pytest.approx(3.0 * (8 * 10 * 10 / (4 * 8 * 8)) ** 0.5)


@by_new_family
def test_the_first_stage_trains_the_first_and_last_layer_only(family, workspace):
    output = f"{family.__name__}-conv"
    adapt(workspace, family, output, stages="32:1:1e-2:conv")
    source = getattr(source_of(family), family.denoiser_name)
    start, outer = widen_denoiser(source, 8), tuple(f"{layer}." for layer in outer_layers(source))
    before, after = start.state_dict(), weights(family, workspace / output)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith(outer) for name in changed)


@by_new_family
def test_an_adapter_is_trained_that_our_pipelines_load(family, workspace):
    output = f"{family.__name__}-lora"
    extra = ("--lora_alpha", 4, "--cache_latents", "--prediction_type", "sample")
    if family is StableDiffusionXL:  # told the sizes of pictures of other proportions
        extra = ("--lora_target_modules", "to_q", "ff.net.2", "--aspect_ratio_buckets", "auto")
    adapt(workspace, family, output, "--lora_rank", 2, *extra)
    scheduler = json.loads((workspace / output / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler.get("prediction_type") == ("sample" if family is StableDiffusion3 else "epsilon")
    vae = PQModel.from_pretrained(workspace / output / "vae")
    start = getattr(family.pq_pipeline_class, SOURCES[family][2])
    pipeline = start(workspace / family.__name__, vae=vae)
    before = paint(pipeline)
    pipeline.load_lora_weights(workspace / output)
    denoiser = getattr(pipeline, family.denoiser_name)
    saved = load_file(workspace / output / "pytorch_lora_weights.safetensors")
    loaded = {name: value for name, value in denoiser.state_dict().items() if "lora_" in name}
    layers = ({name: value for name, value in state.items() if "lora" in name} for state in (saved, loaded))
    sums = [sorted(float(value.abs().sum()) for value in state.values()) for state in layers]
    assert sums[0] == pytest.approx(sums[1]) and sum(sums[0]) > 0, "each layer is loaded"
    layers = [module for module in denoiser.modules() if isinstance(module, LoraLayer)]
    assert {layer.scaling["default_0"] for layer in layers} == {2.0 if family is StableDiffusion3 else 1.0}
    if family is StableDiffusionXL:
        kinds = {name.split(".lora_")[0].split("attn")[-1].lstrip("12.") for name in loaded}
        assert {kind.rpartition("ff.net")[1] or kind for kind in kinds} == {"to_q", "ff.net"}
    assert np.abs(paint(pipeline) - before).max() > 1e-4


# Stable Diffusion has one of the two text encoders of XL.
@by_new_family
def test_captions_that_are_encoded_once_train_the_same(family, workspace):
    extra = ("--proportion_empty_prompts", 0.5, "--dataloader_num_workers", 1, "--validation_steps", 1)
    extra += ("--validation_prompts", "a leaf")
    trained = []
    for name, flags in (("each", ()), ("once", ("--cache_text_states", "--offload"))):
        output = f"{family.__name__}-{name}"
        result = adapt(workspace, family, output, *extra, *flags, stages="32:2:1e-3:all")
        trained.append(weights(family, workspace / output))
    assert "4 captions are encoded: 0.00 GiB" in result.stdout
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, atol=1e-4, rtol=1e-3)


def test_adapted_pipelines_are_pushed_and_paint_the_same_in_another_process(adapted, tmp_path):
    expected = {}
    for family in SOURCES:
        pipeline = family.pq_pipeline_class.from_pretrained(adapted(family), **family.left_out)
        np.save(tmp_path / f"{family.__name__}.npy", paint(pipeline))
        expected[family.__name__] = [str(adapted(family)), family.pq_pipeline_class.__name__]
    code = f"""
import json
import numpy as np
import torch
import diffusers_pq
from diffusers import DiffusionPipeline

def check(name, folder, pipeline_class):
    pipeline_class = getattr(diffusers_pq, pipeline_class)
    pipeline_class.from_pretrained(folder).push_to_hub(f"org/{{name}}")
    pipeline = DiffusionPipeline.from_pretrained(f"org/{{name}}", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    options = {{"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}}
    images = pipeline("a big blue bus", **options).images
    same = np.abs(images - np.load(f"{tmp_path}/{{name}}.npy")).max() < 1e-4
    return bool(same) and isinstance(pipeline, pipeline_class)

print(json.dumps({{name: check(name, *rest) for name, rest in {expected}.items()}}))
"""
    hub = Hub()
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_owner"}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    try:
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=400)
    finally:
        hub.close()
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == dict.fromkeys(expected, True)


@by_family
def test_captions_are_encoded_as_the_pipelines_encode_prompts(family):
    pipeline = source_of(family)
    trained = family(pipeline)
    encoders = {name: getattr(pipeline, name) for name in trained.tokenizers}
    denoiser = ConditionalDenoiser(trained, getattr(pipeline, family.denoiser_name), encoders)
    tokens = [trained.tokenize(caption) for caption in ("a red ladybug", "")]
    batch = {name: torch.stack([one[name] for one in tokens]) for name in tokens[0]}
    with torch.no_grad():
        states = denoiser.encode(batch, torch.device("cpu"))
        options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        if family is StableDiffusion3:
            options |= {"prompt_2": None, "prompt_3": None}
        prompt, negative, *pooled = pipeline.encode_prompt(prompt="a red ladybug", **options)
    torch.testing.assert_close(states["prompt"], torch.cat([prompt, negative]))
    if pooled:
        torch.testing.assert_close(states["pooled"], torch.cat(pooled))


def test_stable_diffusion_3_does_without_its_third_text_encoder():
    pipeline = StableDiffusion3Pipeline(**stable_diffusion_3(tiny_kl(), 4) | {"text_encoder_3": None})
    family = StableDiffusion3(pipeline)
    assert set(family.tokenizers) == {"text_encoder", "text_encoder_2"}
    encoders = {name: getattr(pipeline, name) for name in family.tokenizers}
    tokens = {name: value[None] for name, value in family.tokenize("a bus").items()}
    assert family.encode(encoders, tokens)["prompt"].shape == (1, 12 + 256, 32)
    with pytest.raises(ValueError, match="has no text_encoder_2: captions cannot be encoded without"):
        StableDiffusionXL(StableDiffusionXLPipeline(**stable_diffusion_xl(None, 4) | {"text_encoder_2": None}))


@by_family
def test_a_pipeline_s_family_is_known_by_its_components(family, workspace):
    assert find_family(DiffusionPipeline.load_config(workspace / family.__name__)) is family
    with pytest.raises(ValueError, match="A FluxPipeline cannot be adapted; known are StableDiffusionPipeline, "):
        find_family({"_class_name": "FluxPipeline", "transformer": [], "text_encoder": [], "text_encoder_2": []})


def test_checkpoints_that_hold_text_encoders_which_are_not_trained_still_load():
    pipeline = source_of(StableDiffusion)
    denoiser = ConditionalDenoiser(StableDiffusion(pipeline), pipeline.unet, {"text_encoder": pipeline.text_encoder})
    assert all(name.startswith("unet.") for name in denoiser.state_dict())
    earlier = denoiser.state_dict() | {
        f"text_encoder.{name}": value for name, value in pipeline.text_encoder.state_dict().items()
    }
    denoiser.load_state_dict(earlier)
    trained = ConditionalDenoiser(denoiser.family, pipeline.unet, {"text_encoder": pipeline.text_encoder}, True)
    trained.load_state_dict(earlier)
    assert trained.state_dict().keys() == earlier.keys()


@pytest.mark.parametrize(
    ("family", "extra", "message"),
    [
        (StableDiffusion3, ("--snr_gamma", 5), "--snr_gamma is of diffusion, but the pipeline is of flow matching"),
        (StableDiffusion3, ("--prediction_type", "epsilon"), "--prediction_type is of diffusion, but the pipeline"),
        (
            StableDiffusionXL,
            ("--lora_rank", 2, "--lora_target_modules", "to_z"),
            "no layer of the denoiser is called 'to_z'",
        ),
        (StableDiffusionXL, ("--cache_text_states", "--streaming"), "--cache_text_states needs to know all captions"),
        (StableDiffusionXL, ("--lora_alpha", 2), "--lora_alpha needs --lora_rank"),
        (StableDiffusionXL, ("--weighting_scheme", "none"), "--weighting_scheme is of flow matching: leave it out"),
        (
            StableDiffusion3,
            ("--stages", "36:1:1e-3:all"),
            "a multiple of the downsampling factor F = 4 times",
        ),
        (StableDiffusion3, ("--stages", "264:1:1e-3:all"), "the transformer has positions for 32: at most 256 px"),
        (
            StableDiffusion3,
            ("--stages", "256:1:1e-3:all", "--aspect_ratio_buckets", "auto"),
            "360 px are 45 patches a side, but the transformer has positions for 32",
        ),
    ],
)
def test_what_does_not_fit_the_family_is_named(family, extra, message, workspace):
    with pytest.raises(subprocess.CalledProcessError) as error:
        adapt(workspace, family, "bad", *extra)
    assert message in error.value.stdout


def test_public_names_of_the_families_pipelines():
    for family in SOURCES:
        assert getattr(diffusers_pq, family.pq_pipeline_class.__name__) is family.pq_pipeline_class
