"""Runs the real training script on real image files, in small."""

import json
import math
import os
import random
import re
import runpy
import subprocess
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from conftest import tiny_config
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from scripts import run_script, start_script

from diffusers_pq import PatchDiscriminator, PQModel
from diffusers_pq.autoencoders import load_autoencoder
from diffusers_pq.hub.push import check_folder
from diffusers_pq.training.checkpoints import (
    checkpoint_step,
    find_checkpoint,
    find_damage,
    list_checkpoints,
)
from diffusers_pq.training.codebooks import EMACodebooks
from diffusers_pq.training.initialisation import copy_matching_weights
from diffusers_pq.training.pqgan import (
    AutoencoderLoss,
    AutoencoderTrainer,
    LossWeights,
    PQGANOptions,
    ReconstructionModel,
    adaptive_weight,
    build_discriminator,
    hinge_discriminator_loss,
    load_perceptual_loss,
)
from diffusers_pq.training.run import FiniteSteps, whole_module


SCRIPT = Path(__file__).parents[2] / "training_scripts" / "train_pqgan.py"


@pytest.fixture
def workspace(tmp_path):
    """An imagefolder of 12 + 3 pictures cut from a photograph-like gradient, and a tiny model config."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 3)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for number in range(count):
            noise = PIL.Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            noise.resize((48, 36), PIL.Image.Resampling.BICUBIC).save(tmp_path / "data" / split / f"{number}.png")
    PQModel(**tiny_config()).save_config(tmp_path / "pq")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_config(tmp_path / "kl")
    return tmp_path


def command(workspace, output, *extra, model="pq"):
    return [
        *(str(SCRIPT), "--model_config_name_or_path", str(workspace / model)),
        *("--train_data_dir", str(workspace / "data"), "--cache_dir", str(workspace / "cache")),
        *("--output_dir", str(workspace / output), "--resolution", "32", "--train_batch_size", "4"),
        *("--learning_rate", "1e-3", "--perceptual_weight", "0", "--seed", "0", "--max_train_steps", "6", *extra),
    ]


def run(*args, **kwargs):
    return run_script(*command(*args, **kwargs))


def test_trains_with_everything_on_and_leaves_a_loadable_model(workspace):
    extra = ("--use_ema", "--random_flip", "--crops_per_image", "2", "--gradient_checkpointing")
    extra += ("--gradient_accumulation_steps", "2", "--validation_steps", "3", "--checkpointing_steps", "3")
    extra += ("--codebook_ema_decay", "0.9", "--reseed_dead_entries", "2", "--gradient_estimator", "rotation")
    extra += ("--codebook_distance", "cosine", "--codebook_init", "kmeans", "--logging_steps", "1")
    result = run(workspace, "out", *extra, "--max_grad_norm", "1", "--channels_last", "--mixed_precision", "bf16")
    model = load_autoencoder(str(workspace / "out"))
    assert isinstance(model, PQModel) and model.quantizer.codebooks.isfinite().all()
    assert PatchDiscriminator.from_pretrained(workspace / "out" / "discriminator")
    assert [path.name for path in list_checkpoints(workspace / "out")] == ["checkpoint-3", "checkpoint-6"]
    assert "psnr" in result.stdout and "H_n" in result.stdout
    best = json.loads((workspace / "out" / "best" / "validation.json").read_text())
    assert best["step"] in (3, 6) and {"psnr", "psnr_pooled", "ssim", "H_n", "P_n", "dead", "dead_max"} <= best.keys()
    assert isinstance(load_autoencoder(str(workspace / "out" / "best")), PQModel)
    assert check_folder(workspace / "out" / "best").data.library_name == "diffusers"
    assert "diffusers_pq" in (workspace / "out" / "README.md").read_text()
    settings = json.loads((workspace / "out" / "training_config.json").read_text())
    assert settings["perceptual_weight"] == 0 and settings["seed"] == 0
    assert list((workspace / "out" / "logs").rglob("events.out.tfevents*"))


def test_a_dry_run_says_what_a_run_needs_and_writes_nothing(workspace):
    result = run(workspace, "out", "--dry_run", "--gradient_accumulation_steps", "2")
    for line in (
        "resolution: 32",
        "max_train_steps: 6",
        "discriminator: 2.77 M parameters",
        "GiB within a step",
        "24 GB: batches of",
    ):
        assert line in result.stdout
    parameters = sum(parameter.numel() for parameter in PQModel(**tiny_config()).encoder.parameters())
    assert f"encoder: {parameters / 1e6:.2f} M parameters" in result.stdout
    seconds, hours = map(float, re.search(r"time: (\S+) s a step, (\S+) hours for 6 steps", result.stdout).groups())
    assert hours == pytest.approx(6 * seconds / 3600, rel=0.01)
    assert not (workspace / "out").exists()


def test_a_dry_run_does_without_the_weights_of_the_perceptual_loss(workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    result = run(workspace, "out", "--dry_run", "--perceptual_weight", "1")
    assert "Measured with random weights of VGG16" in result.stdout and "hours for 6 steps" in result.stdout


def test_epochs_are_counted_in_pictures(workspace):
    extra = ("--num_train_epochs", "3", "--gradient_accumulation_steps", "2", "--crops_per_image", "2")
    assert "max_train_steps: 9" in run(workspace, "out", *extra, "--dry_run").stdout  # 12 pictures, 4 in each step


def test_skipped_pictures_are_counted_in_the_log(workspace):
    (workspace / "data" / "train" / "0.png").write_bytes(b"no picture")
    result = run(workspace, "out", "--discriminator_weight", "0", "--logging_steps", "1", "--streaming")
    assert "Skipped: " in result.stdout and "0.png cannot be read" in result.stdout
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((workspace / "out" / "logs").rglob("events.out.tfevents*")).parent)).Reload()
    assert [event.value for event in events.Scalars("skipped_images")][-1] == 2, (
        "24 of 12 pictures were used: 2 epochs"
    )


def test_trains_a_kl_autoencoder(workspace):
    run(workspace, "out", "--discriminator_weight", "0", "--compile", model="kl")
    assert isinstance(load_autoencoder(str(workspace / "out")), AutoencoderKL)


def test_starts_without_quantiser_and_then_from_kmeans(workspace):
    extra = ("--quantize_from_step", "3", "--codebook_init", "kmeans", "--discriminator_weight", "0")
    run(workspace, "out", *extra, "--learning_rate", "0")
    codebooks = load_autoencoder(str(workspace / "out")).quantizer.codebooks
    assert abs(float(codebooks.std()) - 1) > 0.05, "k-means centres of latents are no longer N(0, 1)"


def weights(folder):
    files = [folder / "diffusion_pytorch_model.safetensors", *folder.glob("discriminator/*.safetensors")]
    return {str(file.relative_to(folder)): load_file(file) for file in files}


def same_weights(first, second):
    return all(torch.equal(first[name][key], second[name][key]) for name in first for key in first[name])


def kill_when(folder, name, endless):
    """Start a run and kill it the moment that a file or folder of this name exists."""
    process = start_script(*endless)
    deadline = time.time() + 120
    while not (folder / name).exists() and process.is_alive() and time.time() < deadline:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert (folder / name).exists(), "the run ended before the moment to kill it"


STREAM = ("--streaming", "--shuffle_buffer", "5")


# What takes most of a minute and differs from the others in the model alone is left to `make torture`.
KILLED = [("pq", "0", ()), pytest.param("kl", "2", (), marks=pytest.mark.torture), ("pq", "2", STREAM)]


@pytest.mark.parametrize("model, workers, stream", KILLED, ids=str)
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(workspace, model, workers, stream):
    extra = ("--checkpointing_steps", "2", "--checkpoints_total_limit", "2", "--resume_from_checkpoint", "latest")
    extra += ("--use_ema", "--random_flip", "--gradient_accumulation_steps", "2", "--lr_scheduler", "cosine")
    extra += ("--dataloader_num_workers", workers, "--max_train_steps", "9", "--validation_steps", "2", *stream)
    extra += ("--codebook_ema_decay", "0.9", "--reseed_dead_entries", "3") if stream else ()
    run(workspace, "whole", *extra, model=model)
    killed = workspace / "killed"
    # Once right after a checkpoint and once in the middle of writing one; epochs have 12 pictures, steps take 8.
    for moment in ("checkpoint-2", "unfinished-checkpoint-6"):
        kill_when(killed, moment, command(workspace, "killed", *extra, model=model))
    result = run(workspace, "killed", *extra, model=model)
    assert f"Resumed from {killed / 'checkpoint-4'}" in result.stdout
    assert [checkpoint_step(path) for path in list_checkpoints(killed)] == [6, 8]
    found, expected = weights(killed), weights(workspace / "whole")
    assert len(expected) == 2, "the autoencoder and the discriminator"
    assert same_weights(found, expected)


@pytest.mark.torture
@pytest.mark.parametrize("stream", [(), STREAM], ids=["pictures", "stream"])
def test_twenty_kills_at_random_moments_change_nothing(workspace, stream):
    seed = int(os.environ.get("TORTURE_SEED", 0))
    generator = random.Random(f"{seed} {stream}")
    extra = ("--checkpointing_steps", "2", "--checkpoints_total_limit", "2", "--resume_from_checkpoint", "latest")
    extra += ("--use_ema", "--lr_scheduler", "cosine", "--validation_steps", "3", "--codebook_ema_decay", "0.9")
    extra += ("--dataloader_num_workers", "1", "--max_train_steps", "160", *stream)
    started = time.time()
    run(workspace, "whole", *extra)
    interval = 2 * (time.time() - started) / 160
    for number in range(20):
        output = workspace / "output.txt"
        output.write_text("")
        process = start_script(*command(workspace, "killed", *extra), output=output)
        if generator.random() < 0.75:  # else while it starts
            before = set(list_checkpoints(workspace / "killed"))
            while process.is_alive() and set(list_checkpoints(workspace / "killed")) <= before:
                time.sleep(0.001)
        time.sleep(generator.random() * 2 * interval)
        assert process.is_alive(), f"seed {seed}, before kill {number + 1}: {output.read_text()[-2000:]}"
        process.kill()
        process.join()
    run(workspace, "killed", *extra)
    assert same_weights(weights(workspace / "killed"), weights(workspace / "whole")), f"seed {seed}"


def test_another_seed_gives_other_weights(workspace):
    for seed in ("0", "1"):
        run(workspace, seed, "--seed", seed, "--max_train_steps", "1")
    assert not same_weights(weights(workspace / "0"), weights(workspace / "1"))


def test_a_damaged_newest_checkpoint_is_passed_over(workspace):
    extra = ("--checkpointing_steps", "2", "--resume_from_checkpoint", "latest", "--discriminator_weight", "0")
    result = run(workspace, "out", *extra)
    newest = workspace / "out" / "checkpoint-6"
    weights_file = next(newest.glob("*.safetensors"))
    weights_file.write_bytes(weights_file.read_bytes()[:-1])
    result = run(workspace, "out", *extra)
    assert f"{newest} is damaged ({weights_file.name} is not what was written)" in result.stdout
    assert f"Resumed from {newest.with_name('checkpoint-4')}" in result.stdout
    assert find_damage(newest) is None, "written again"
    (newest / "scheduler.bin").unlink()
    assert find_damage(newest) == "scheduler.bin is missing"
    with pytest.raises(ValueError, match="`--resume_from_checkpoint checkpoint-6` is damaged: scheduler.bin"):
        find_checkpoint(workspace / "out", "checkpoint-6")


@pytest.mark.parametrize(
    "extra, message",
    [
        (("--image_column", "picture"), "no column 'picture'; the dataset has image"),
        (("--resolution", "30"), "must be a multiple of the downsampling factor F = 4"),
        (("--crops_per_image", "3"), "must be a multiple of --crops_per_image 3"),
        (("--resume_from_checkpoint", "checkpoint-9"), "checkpoint-9` does not exist"),
        (("--validation_steps", "0"), "--validation_steps: must be at least 1, but is 0"),
        (("--codebook_ema_decay", "2"), "--codebook_ema_decay: must be above 0 and below 1, but is 2.0"),
    ],
)
def test_bad_arguments_are_named(workspace, extra, message, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    script = runpy.run_path(str(SCRIPT))
    arguments = command(workspace, "out", "--discriminator_weight", "0", *extra)[1:]
    with pytest.raises((ValueError, FileNotFoundError, SystemExit)) as error:
        script["main"](script["parse_args"](arguments))
    assert message in str(error.value) + capsys.readouterr().err


def test_missing_lpips_weights_say_where_to_put_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}.*vgg16-397923af.pth.*--perceptual_weight 0"):
        load_perceptual_loss()


def test_hinge_loss_has_its_closed_form():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 0.5])
    assert float(hinge_discriminator_loss(real, fake)) == pytest.approx(0.5 * (0.5 + 0.75))


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    layer = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    weight = adaptive_weight((layer * torch.tensor([3.0, 4.0])).sum(), (layer * torch.tensor([0.0, 0.5])).sum(), layer)
    assert float(weight) == pytest.approx(5 / 0.5001)
    losses = (layer * torch.tensor([3.0, 4.0])).sum(), (layer * torch.tensor([0.0, 0.5])).sum()
    assert float(adaptive_weight(*losses, layer, scale=65536.0)) == pytest.approx(5 / 0.5001)
    assert not weight.requires_grad
    unbounded = adaptive_weight((layer * 1e6).sum(), (layer * 0).sum(), layer)
    assert float(unbounded) == 1e4


def test_discriminator_sees_patches_of_70_pixels():
    discriminator = PatchDiscriminator().eval()
    image = torch.zeros(1, 3, 256, 256, requires_grad=True)
    logits = discriminator(image)
    assert logits.shape == (1, 1, 30, 30)
    logits[0, 0, 15, 15].backward()
    rows = image.grad.abs().sum((0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == 2_765_633


def test_unfinished_checkpoints_are_never_resumed(tmp_path):
    for name in ("checkpoint-5", "checkpoint-10", "unfinished-checkpoint-15", "checkpoint-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("content")
        digest = "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
        (tmp_path / name / "manifest.json").write_text(json.dumps({"file": digest}))
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-10"
    assert find_checkpoint(tmp_path, "checkpoint-5").name == "checkpoint-5"
    assert find_checkpoint(tmp_path, None) is None
    with pytest.raises(FileNotFoundError, match="Checkpoints in .*: checkpoint-5, checkpoint-10"):
        find_checkpoint(tmp_path, "checkpoint-7")


def test_generator_step_leaves_the_discriminator_trainable(model, images):
    discriminator = PatchDiscriminator(base_channels=4)
    wrapped = ReconstructionModel(model).train()
    losses = AutoencoderLoss(LossWeights(perceptual=0), None, discriminator, Accelerator(cpu=True))
    output = wrapped(images)
    loss, parts = losses.generator(wrapped, images, output)
    loss.backward()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert parts["adversarial_weight"] > 0 and model.quantizer.codebooks.grad.any()
    losses.discriminator_loss(images, output.sample).backward()
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_the_discriminator_comes_in_at_its_step(workspace):
    """Until then, the run is one without it, and its own weights stay as they were."""
    extra = ("--checkpointing_steps", "1", "--validation_steps", "99", "--max_train_steps", "3")
    run(workspace, "late", *extra, "--discriminator_start", "2")
    run(workspace, "never", *extra, "--discriminator_weight", "0")

    def same(left, right, file="model.safetensors"):
        left, right = (load_file(workspace / folder / file) for folder in (left, right))
        return all(torch.equal(value, right[name]) for name, value in left.items())

    assert same("late/checkpoint-2", "never/checkpoint-2")
    assert not same("late/checkpoint-3", "never/checkpoint-3")
    assert same("late/checkpoint-1", "late/checkpoint-2", "model_1.safetensors")
    assert not same("late/checkpoint-2", "late/checkpoint-3", "model_1.safetensors")


@pytest.mark.parametrize("model", ["pq", "kl"])
def test_starts_from_the_linear_autoencoder_of_its_pictures(workspace, model):
    extra = ("--learning_rate", "0", "--discriminator_weight", "0", "--max_train_steps", "1")
    extra += ("--validation_steps", "1", "--codebook_init", "kmeans", "--kmeans_vectors_per_entry", "4")
    extra += ("--channels_last",)
    psnr = {}
    for start in ("default", "pca", "pca_rotated"):
        result = run(workspace, start, *extra, "--weight_init", start, model=model)
        psnr[start] = float(re.search(r"step 1: psnr ([\d.]+)", result.stdout).group(1))
    assert min(psnr["pca"], psnr["pca_rotated"]) > psnr["default"] + 5, psnr


def test_fine_tuning_goes_on_with_the_discriminator_of_the_pretrained_model(tmp_path):
    trained = PatchDiscriminator()
    trained.save_pretrained(tmp_path / "discriminator")
    script = runpy.run_path(str(SCRIPT))
    source = ("--pretrained_model_name_or_path", str(tmp_path))
    options = PQGANOptions.of(script["parse_args"](source))
    loaded = build_discriminator(options.model, options.loss)
    assert loaded.training
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in trained.state_dict().items())
    without = PQGANOptions.of(script["parse_args"]((*source, "--discriminator_weight", "0")))
    assert build_discriminator(without.model, without.loss) is None


def test_takes_the_backbone_of_another_kind_of_autoencoder(workspace):
    torch.manual_seed(0)
    source = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
    )
    source.save_pretrained(workspace / "backbone")
    extra = ("--backbone_name_or_path", str(workspace / "backbone"), "--learning_rate", "0")
    result = run(workspace, "out", *extra, "--discriminator_weight", "0")
    trained = load_autoencoder(str(workspace / "out"))
    assert torch.equal(trained.encoder.conv_in.weight, source.encoder.conv_in.weight)
    assert torch.equal(trained.decoder.conv_out.weight, source.decoder.conv_out.weight)
    assert "Not taken from" in result.stdout and "quantizer.codebooks" in result.stdout
    with pytest.raises(ValueError, match="No parameter of the Linear fits the PQModel"):
        copy_matching_weights(trained, torch.nn.Linear(3, 3))


def test_steps_without_a_finite_gradient_are_left_out_and_end_the_run_in_the_end():
    accelerator = Accelerator(cpu=True)
    layer = torch.nn.Linear(2, 1)
    optimizer = accelerator.prepare(torch.optim.Adam(layer.parameters(), lr=0.1))
    steps = FiniteSteps(accelerator, max_norm=1.0, limit=3)

    def step(factor):
        before = layer.weight.detach().clone()
        (factor * layer(torch.ones(1, 2))).sum().backward()
        steps.step(optimizer, layer.parameters())
        assert layer.weight.grad is None or not layer.weight.grad.any()
        return not torch.equal(layer.weight, before)

    assert step(1.0)
    assert not step(math.nan) and not step(math.inf)
    assert (steps.skipped, steps.in_a_row) == (2, 2)
    assert step(1.0) and steps.in_a_row == 0
    assert not step(math.nan) and not step(math.nan)
    with pytest.raises(FloatingPointError, match="not finite for 3 steps in a row"):
        step(math.nan)


def test_a_run_that_blows_up_stops_and_keeps_its_last_checkpoint(workspace):
    extra = ("--discriminator_weight", "0", "--checkpointing_steps", "2", "--max_skipped_steps", "3")
    run(workspace, "out", *extra, "--max_train_steps", "2")
    extra += ("--resume_from_checkpoint", "latest", "--max_train_steps", "20", "--lr_scheduler", "linear")
    with pytest.raises(subprocess.CalledProcessError) as error:
        run(workspace, "out", *extra, "--codebook_weight", "1e38")
    assert "not finite for 3 steps in a row" in error.value.stdout
    assert [path.name for path in list_checkpoints(workspace / "out")] == ["checkpoint-2"]
    assert find_damage(workspace / "out" / "checkpoint-2") is None


def test_gradient_accumulation_is_exact_for_both_optimisers(model, images):
    plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    wrapped, discriminator = ReconstructionModel(model).train(), PatchDiscriminator(base_channels=4)
    losses = AutoencoderLoss(LossWeights(perceptual=0), None, discriminator, accelerator)
    halves = images.split(1)
    expected = {}
    for half in halves:  # one after the other, at the same weights
        output = wrapped(half)
        for module, loss in (
            (wrapped, losses.generator(wrapped, half, output)[0]),
            (discriminator, losses.discriminator_loss(half, output.sample)),
        ):
            gradients = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
            sums = expected.setdefault(module, [torch.zeros_like(parameter) for parameter in module.parameters()])
            for total, gradient in zip(sums, gradients):
                total += 0 if gradient is None else gradient / 2
    before = {module: [p.detach().clone() for p in module.parameters()] for module in expected}
    prepared = []
    for module in (wrapped, discriminator):
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        prepared.append(accelerator.prepare(module, optimizer, get_scheduler("constant", optimizer)))
    trainer = AutoencoderTrainer(accelerator, *prepared[0], losses, *prepared[1])
    assert trainer.step(halves[0]) is None and "loss" in trainer.step(halves[1])
    for module, gradients in expected.items():
        for parameter, start, gradient in zip(module.parameters(), before[module], gradients):
            torch.testing.assert_close(parameter.detach(), start - gradient, rtol=1e-4, atol=1e-6)


def test_averages_follow_codebooks_that_are_set_anew(model):
    accelerator = Accelerator(cpu=True)
    ema = EMAModel(model.parameters())
    remedy = EMACodebooks(model.quantizer, accelerator)
    losses = AutoencoderLoss(LossWeights(0, 1, 0), None, None, accelerator)
    trainer = AutoencoderTrainer(
        accelerator, ReconstructionModel(model), None, None, losses, ema=ema, ema_codebooks=remedy
    )
    model.quantizer.codebooks.data.fill_(7.0)
    trainer.restart_codebook_averages()
    assert (remedy.sums == 7).all()
    ema.copy_to(model.parameters())
    assert (model.quantizer.codebooks == 7).all()


class ShardingAccelerator:
    """What `whole_module` needs of an accelerator whose model is sharded: weights come from `get_state_dict` only."""

    distributed_type = DistributedType.FSDP

    def __init__(self, state, is_main_process):
        self.state = state
        self.is_main_process = is_main_process

    def unwrap_model(self, model):
        return model

    def get_state_dict(self, model):
        return self.state


def test_a_sharded_model_is_saved_whole(model):
    whole = ReconstructionModel(PQModel(**tiny_config()))
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    sharded = ReconstructionModel(model)
    saved = whole_module(ShardingAccelerator(state, True), sharded, "autoencoder")
    assert all(torch.equal(value, state[f"autoencoder.{name}"]) for name, value in saved.state_dict().items())
    assert saved is not model and whole_module(ShardingAccelerator({}, False), sharded, "autoencoder") is not model
    assert whole_module(Accelerator(cpu=True), sharded, "autoencoder") is model
