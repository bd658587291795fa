"""Trains and resumes small class-conditional models with the real script on real files."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_config
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from diffusers import AutoencoderKL, VQModel
from labelled_pictures import write_labelled_pictures
from scripts import run_script
from test_checkpoints import poison
from whole_runs import check_whole_run, weights

from diffusers_pq import LatentDiffusionPQPipeline, PQModel
from diffusers_pq.data.conditions import ClassLabels, class_names
from diffusers_pq.models.class_conditioning import (
    create_class_conditional_denoiser,
    num_classes,
    predict,
    token_dimension,
)
from diffusers_pq.training.denoiser import ClassConditionalDenoiser
from diffusers_pq.training.noise import (
    add_noise,
    create_scheduler,
    denoising_loss,
    draw_timesteps,
    predicted_latents,
)


ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "training_scripts"
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
DIT = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "patch_size": 2,
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Pictures of three classes, three autoencoders, and the configs of two denoisers."""
    folder = tmp_path_factory.mktemp("ldm")
    write_labelled_pictures(folder / "data")
    (folder / "names.txt").write_text("blue\ngreen\nred\n")
    torch.manual_seed(0)
    PQModel(**tiny_config()).save_pretrained(folder / "pq")
    blocks = {name: tiny_config()[name] for name in ("down_block_types", "up_block_types", "block_out_channels")}
    AutoencoderKL(**blocks, norm_num_groups=4).save_pretrained(folder / "kl")
    VQModel(**blocks, norm_num_groups=4, latent_channels=3).save_pretrained(folder / "vq")
    for name, config in (("unet", UNET), ("transformer", DIT)):
        (folder / f"{name}.json").write_text(json.dumps(config))
    return folder


def arguments(workspace, output, vae="pq", denoiser="unet"):
    given = ["--vae_name_or_path", workspace / vae, "--train_data_dir", workspace / "data"]
    given += ["--model_config_name_or_path", workspace / f"{denoiser}.json", "--label_column", "category"]
    given += ["--cache_dir", workspace / "cache", "--resolution", 32, "--min_image_side", 1]
    given += ["--train_batch_size", 2, "--num_statistics_images", 6, "--max_train_steps", 3]
    return [*map(str, given), "--learning_rate", "1e-2", "--output_dir", str(workspace / output)]


def train(workspace, output, *extra, vae="pq", denoiser="unet"):
    return run("train_ldm.py", *arguments(workspace, output, vae, denoiser), *extra)


def run(script, *arguments):
    return run_script(SCRIPTS / script, *arguments)


def test_trains_on_pq_latents_resumes_exactly_and_paints_by_name(workspace):
    extra = ("--prediction_type", "v_prediction", "--rescale_betas_zero_snr", "--noise_shift", "auto")
    pipeline = check_whole_run(train, workspace, LatentDiffusionPQPipeline, "unet", "0", *extra)
    assert len(pipeline.vae.config.latents_std) == 8 and pipeline.unet.config.in_channels == 8
    assert pipeline.scheduler.alphas_cumprod[-1] == 0 and pipeline.scheduler.config.trained_betas is not None


def test_trains_a_dit_by_flow_matching_from_cached_codes(workspace):
    cache = ("--vae_name_or_path", workspace / "pq", "--train_data_dir", workspace / "data", "--min_image_side", 1)
    cache += ("--output_dir", workspace / "codes", "--label_column", "category", "--resolution", 32)
    run("encode_dataset.py", *cache)
    extra = ("--latents_dir", workspace / "codes", "--objective", "flow_matching", "--noise_shift", "auto")
    extra += ("--prediction_type", "sample")
    result = train(workspace, "dit", *extra, "--weighting_scheme", "logit_normal", denoiser="transformer")
    assert "The denoiser is 16 wide, but sees 32 values at a place" in result.stdout
    pipeline = LatentDiffusionPQPipeline.from_pretrained(workspace / "dit")
    assert pipeline.unet is None and pipeline.scheduler.config.shift == pytest.approx((8 * 8 * 8 / 4096) ** 0.5)
    assert pipeline.scheduler.config.prediction_type == "sample"
    start = create_class_conditional_denoiser(DIT, 8, 8, 3).state_dict()
    trained = weights(workspace / "dit", "transformer")
    changed = [name for name, value in trained.items() if name.endswith("norm1.linear.weight") and value.any()]
    assert len(changed) == DIT["num_layers"] and not any(start[name].any() for name in changed), "adaLN-Zero"
    assert pipeline("green", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)


def test_two_processes_train_on_latents_of_other_autoencoders(workspace):
    numbers = ("--label_column", "number", "--max_train_steps", "1")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += [SCRIPTS / "train_ldm.py", *arguments(workspace, "kl-run", vae="kl"), *numbers, "--cache_latents"]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    pipeline = LatentDiffusionPQPipeline.from_pretrained(workspace / "kl-run")
    assert isinstance(pipeline.vae, AutoencoderKL) and pipeline.vae.config.scaling_factor != 0.18215
    assert pipeline.get_label_ids(["0", "2"]) == [0, 2]
    train(workspace, "vq-run", *numbers, "--num_statistics_images", 0, vae="vq")
    pipeline = LatentDiffusionPQPipeline.from_pretrained(workspace / "vq-run")
    assert isinstance(pipeline.vae, VQModel) and pipeline.vae.config.scaling_factor == 0.18215
    assert pipeline(1, num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)


def test_the_benchmark_compares_runs_that_were_trained_alike(workspace):
    results = workspace / "results"
    for vae in ("pq", "kl"):
        train(workspace, f"compared-{vae}", vae=vae)
    command = [SCRIPTS.parent / "experiments" / "latent_diffusion.py", "--output_dir", results, "--num_samples", 3]
    command += ["--num_inference_steps", 2, "--snr", 10, 0.1, "--grid_classes", "red", "blue"]
    command += ["--runs", *(f"{vae.upper()}={workspace}/compared-{vae}" for vae in ("pq", "kl"))]
    tables = run_script(*command).stdout
    runs = json.loads((results / "latent_diffusion.json").read_text())["runs"]
    spaces = ["8 x 8 pixels", "features of the KL encoder", "features of the PQ encoder"]
    assert f"| Fréchet distance | {' | '.join(spaces)} |" in tables and list(runs) == ["PQ", "KL"]
    for run in runs.values():
        assert [round(level["snr"] or 0, 1) for level in run["held_out"]] == [0, pytest.approx(10, 0.1), 0.1]
        assert min(run["frechet_distances"]["samples"].values()) > 0 and run["bits_per_pixel"] > 0
    assert all((results / f"latent_diffusion{end}.png").is_file() for end in ("", "_samples"))
    train(workspace, "longer", "--max_train_steps", 4, vae="kl")
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_script(*command, f"longer={workspace}/longer")
    assert "longer was not trained like PQ: max_train_steps differ" in error.value.stdout


@pytest.mark.parametrize(
    "extra, message",
    [
        (("--resolution", 30), "--resolution: 30 must be a multiple of the downsampling factor F = 4"),
        (("--label_column", "class"), "no column 'class'; the dataset has image, category, number, text"),
        (
            ("--snr_gamma", 5, "--prediction_type", "v_prediction", "--rescale_betas_zero_snr"),
            "--snr_gamma leaves the last timestep",
        ),
        (("--validation_labels", "yellow"), "unknown class 'yellow'; known names are blue, green, red"),
    ],
)
def test_bad_arguments_are_named(workspace, extra, message):
    script = runpy.run_path(str(SCRIPTS / "train_ldm.py"))
    args = script["parse_args"]([*arguments(workspace, "bad"), *map(str, extra)])
    with pytest.raises(ValueError, match=re.escape(message)):
        script["main"](args)


def test_a_resumed_run_takes_new_rates_and_refuses_code_in_its_checkpoint(workspace, tmp_path):
    script = runpy.run_path(str(SCRIPTS / "train_ldm.py"))

    def train_on(*extra):
        extra = ("--use_ema", "--checkpointing_steps", 1, "--report_to", "none", *extra)
        script["main"](script["parse_args"]([*arguments(workspace, tmp_path / "run"), *map(str, extra)]))

    train_on("--max_train_steps", 1)
    train_on("--max_train_steps", 2, "--learning_rate", 1e-3, "--resume_from_checkpoint", "latest")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    (group,) = torch.load(checkpoint / "optimizer.bin", weights_only=True)["param_groups"]
    assert group["lr"] == 1e-3
    with pytest.raises(ValueError, match="--prediction_type v_prediction: .* was written with .* epsilon"):
        train_on("--prediction_type", "v_prediction", "--resume_from_checkpoint", "latest")
    poison(checkpoint, "custom_checkpoint_0.pkl", tmp_path / "mark")
    with pytest.raises(ValueError, match="custom_checkpoint_0.pkl is not read"):
        train_on("--resume_from_checkpoint", "latest")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--objective", "flow_matching", "--snr_gamma", "5"], "--snr_gamma is of diffusion"),
        (["--objective", "flow_matching", "--prediction_type", "v_prediction"], "v_prediction is of diffusion"),
        (["--rescale_betas_zero_snr"], "--rescale_betas_zero_snr needs --prediction_type v_prediction or sample"),
        (["--weighting_scheme", "logit_normal"], "needs --objective flow_matching"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(extra, message, capsys):
    parse_args = runpy.run_path(str(SCRIPTS / "train_ldm.py"))["parse_args"]
    with pytest.raises(SystemExit):
        parse_args(["--vae_name_or_path", "v", "--model_config_name_or_path", "m", *extra])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "recipe, d, millions",
    [
        ("ldm-f8", 128, 396.1),
        ("ldm-f16", 128, 396.1),
        ("ldm-sd-vae", 4, 395.5),
        ("ldm-dit-f8", 128, 406.5),
        ("ldm-dit-f16", 128, 405.7),
    ],
)
def test_the_recipes_train_400_million_parameters(recipe, d, millions):
    """As Table 5 says; the DiT is also as wide as a token has values."""
    flags = yaml.safe_load((SCRIPTS / "recipes" / f"{recipe}.yaml").read_text())
    config = json.loads((ROOT / flags["model_config_name_or_path"]).read_text())
    with torch.device("meta"):
        denoiser = create_class_conditional_denoiser(config, d, 256 // (16 if "f16" in recipe else 8), 1000)
    assert denoiser.num_parameters() / 1e6 == pytest.approx(millions, abs=0.1)
    dimension, width = token_dimension(denoiser)
    assert width >= dimension


def test_a_config_that_contradicts_the_latents_or_classes_is_refused():
    with pytest.raises(ValueError, match="`in_channels` is 4 in the denoiser's config, but .* ask for 8"):
        create_class_conditional_denoiser(UNET | {"in_channels": 4}, 8, 8, 3)
    with pytest.raises(ValueError, match="`num_embeds_ada_norm` is 1000"):
        create_class_conditional_denoiser(DIT | {"num_embeds_ada_norm": 1000}, 8, 8, 3)
    with pytest.raises(ValueError, match="must name a `_class_name` out of UNet2DConditionModel, DiT.*not 'UNet2DM"):
        create_class_conditional_denoiser({"_class_name": "UNet2DModel"}, 8, 8, 3)


@pytest.mark.parametrize("config", [UNET, DIT], ids=["unet", "dit"])
def test_a_denoiser_knows_its_classes_and_that_of_none(config):
    torch.manual_seed(0)
    denoiser = create_class_conditional_denoiser(config, 8, 8, 3)
    for parameter in denoiser.parameters():  # DiT begins with zeros
        torch.nn.init.normal_(parameter, std=0.1)
    assert num_classes(denoiser) == 3
    model = ClassConditionalDenoiser(denoiser).train()
    noisy = torch.randn(1, 8, 8, 8).expand(4, -1, -1, -1)
    predictions = model(noisy, torch.full((4,), 10), torch.arange(4))
    assert predictions.shape == noisy.shape
    distances = torch.cdist(predictions.flatten(1)[None], predictions.flatten(1)[None])[0]
    assert (distances + torch.eye(4) > 1e-4).all()
    for _ in range(5):  # labels are dropped by the loader, not by the blocks of DiT
        assert torch.equal(model(noisy, torch.full((4,), 10), torch.arange(4)), predictions)
    assert torch.equal(predict(denoiser, noisy, torch.full((4,), 10), torch.arange(4)), predictions)


@pytest.mark.parametrize("column", ["label", "category"])
def test_labels_come_from_names_and_numbers(column):
    features = Features({"label": ClassLabel(names=["blue", "green"]), "category": Value("string")})
    dataset = Dataset.from_dict({"label": [1, 0], "category": ["green", "blue"]}, features=features)
    names = class_names(dataset, column)
    assert names == ["blue", "green"]
    labels = ClassLabels(column, names)
    assert [int(labels(row, Always(1))) for row in dataset] == [1, 0]
    assert int(ClassLabels(column, names, 0.1)(dataset[0], Always(0.05))) == 2, "the class of none"
    with pytest.raises(ValueError, match=r"has the class 'red' in the column .* none of the 2 classes \(blue, green"):
        labels({column: "red"}, Always(1))
    with pytest.raises(ValueError, match="has the class -1 "):
        labels({column: -1}, Always(1))


class Always:
    """A generator that draws one value."""

    def __init__(self, value):
        self.random = lambda: value


def test_a_stream_without_names_asks_for_a_file(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(()), features=Features({"cls": Value("int64")}))
    with pytest.raises(ValueError, match="does not say what classes its column 'cls' has: give `--class_names_file`"):
        class_names(stream, "cls")
    (tmp_path / "names.txt").write_text("tench\ngoldfish\n")
    assert class_names(stream, "cls", str(tmp_path / "names.txt")) == ["tench", "goldfish"]
    (tmp_path / "names.txt").write_text("crane\ncrane\n")
    assert class_names(stream, "cls", str(tmp_path / "names.txt")) == ["crane", "crane"]
    texts = IterableDataset.from_generator(lambda: iter(()), features=Features({"cls": Value("string")}))
    with pytest.raises(ValueError, match="names a class twice"):
        class_names(texts, "cls", str(tmp_path / "names.txt"))


@pytest.mark.parametrize(
    "options", [("diffusion", "epsilon"), ("diffusion", "v_prediction", 2.0, True), ("flow_matching",)]
)
def test_the_latents_follow_from_a_perfect_prediction(options):
    scheduler = create_scheduler(*options)
    latents = torch.randn(6, 4, 4, 4)
    # As `denoising_loss` will draw them.
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = draw_timesteps(scheduler, 6, "logit_normal", generator)
    noisy, target = add_noise(scheduler, latents, noise, timesteps)
    torch.testing.assert_close(predicted_latents(scheduler, target, noisy, timesteps), latents, atol=1e-3, rtol=0)
    drawn = {"generator": torch.Generator().manual_seed(0), "weighting_scheme": "logit_normal"}
    losses = denoising_loss(lambda noisy, timesteps, condition: target + 2, scheduler, latents, None, **drawn)
    torch.testing.assert_close(losses, torch.full((6,), 4.0))
    scheduler.set_timesteps(2)  # what sampling in between does must not change the training
    again = add_noise(scheduler, latents, noise, timesteps)
    assert torch.equal(again[0], noisy) and torch.equal(again[1], target)
