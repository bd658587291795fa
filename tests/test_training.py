"""Runs the real training script on real image files, in small."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config
from diffusers import AutoencoderKL

from diffusers_pq import PatchDiscriminator, PQModel, ProductQuantizer
from diffusers_pq.training.autoencoders import (
    collect_latents,
    copy_matching_weights,
    kmeans_codebooks,
    load_autoencoder,
)
from diffusers_pq.training.checkpoints import checkpoint_step, find_checkpoint, list_checkpoints
from diffusers_pq.training.data import RandomCrops, load_images
from diffusers_pq.training.losses import adaptive_weight, hinge_discriminator_loss, load_perceptual_loss


SCRIPT = Path(__file__).parent.parent / "training_scripts" / "train_pqgan.py"


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
        *(sys.executable, str(SCRIPT), "--model_config_name_or_path", str(workspace / model)),
        *("--train_data_dir", str(workspace / "data"), "--cache_dir", str(workspace / "cache")),
        *("--output_dir", str(workspace / output), "--resolution", "32", "--train_batch_size", "4"),
        *("--learning_rate", "1e-3", "--perceptual_weight", "0", "--seed", "0", "--max_train_steps", "6", *extra),
    ]


def run(*args, **kwargs):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*args, **kwargs), env=environment, check=True, capture_output=True, text=True)


def test_trains_with_everything_on_and_leaves_a_loadable_model(workspace):
    extra = ("--use_ema", "--random_flip", "--crops_per_image", "2", "--gradient_checkpointing")
    extra += ("--gradient_accumulation_steps", "2", "--validation_steps", "3", "--checkpointing_steps", "3")
    result = run(workspace, "out", *extra, "--max_grad_norm", "1", "--channels_last", "--mixed_precision", "bf16")
    model = load_autoencoder(str(workspace / "out"))
    assert isinstance(model, PQModel) and model.quantizer.codebooks.isfinite().all()
    assert PatchDiscriminator.from_pretrained(workspace / "out" / "discriminator")
    assert [path.name for path in list_checkpoints(workspace / "out")] == ["checkpoint-3", "checkpoint-6"]
    assert "psnr" in result.stderr and "codebook_use" in result.stderr
    settings = json.loads((workspace / "out" / "training_config.json").read_text())
    assert settings["perceptual_weight"] == 0 and settings["seed"] == 0
    assert list((workspace / "out" / "logs").rglob("events.out.tfevents*"))


def test_trains_a_kl_autoencoder(workspace):
    run(workspace, "out", "--discriminator_weight", "0", model="kl")
    assert isinstance(load_autoencoder(str(workspace / "out")), AutoencoderKL)


def test_starts_without_quantiser_and_then_from_kmeans(workspace):
    extra = ("--quantize_from_step", "3", "--codebook_init", "kmeans", "--discriminator_weight", "0")
    run(workspace, "out", *extra, "--weight_init", "orthogonal", "--learning_rate", "0")
    codebooks = load_autoencoder(str(workspace / "out")).quantizer.codebooks
    assert abs(float(codebooks.std()) - 1) > 0.05, "k-means centres of latents are no longer N(0, 1)"


def test_a_killed_run_goes_on_from_its_last_checkpoint(workspace):
    extra = ("--checkpointing_steps", "2", "--checkpoints_total_limit", "2", "--resume_from_checkpoint", "latest")
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    endless = command(workspace, "killed", *extra, "--max_train_steps", "100000")
    process = subprocess.Popen(endless, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list_checkpoints(workspace / "killed") and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = list_checkpoints(workspace / "killed")[-1]
    steps = checkpoint_step(last) + 2
    result = run(workspace, "killed", *extra, "--max_train_steps", str(steps))
    assert f"Resumed from {last}" in result.stderr
    assert [checkpoint_step(path) for path in list_checkpoints(workspace / "killed")] == [steps - 2, steps]
    assert load_autoencoder(str(workspace / "killed"))


@pytest.mark.parametrize(
    "extra, message",
    [
        (("--image_column", "picture"), "has the columns image"),
        (("--resolution", "30"), "must be a multiple of the downsampling factor F = 4"),
        (("--crops_per_image", "3"), "must be a multiple of --crops_per_image 3"),
        (("--resume_from_checkpoint", "checkpoint-9"), "checkpoint-9` does not exist"),
    ],
)
def test_bad_arguments_are_named(workspace, extra, message, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    script = runpy.run_path(str(SCRIPT))
    arguments = command(workspace, "out", "--discriminator_weight", "0", *extra)[2:]
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


def test_kmeans_finds_separate_clusters():
    torch.manual_seed(0)
    quantizer = ProductQuantizer(4, 2, 4)
    centres = torch.tensor([[-9.0, -9.0], [-9.0, 9.0], [9.0, -9.0], [9.0, 9.0]])
    vectors = centres[torch.randint(4, (2, 400))] + 0.01 * torch.randn(2, 400, 2)
    latents = vectors.permute(0, 2, 1).reshape(1, 4, 20, 20)
    kmeans_codebooks(quantizer, latents, iterations=30)
    found = torch.cdist(quantizer.codebooks.data, centres.expand(2, -1, -1)).min(-1).values
    assert (found < 0.1).float().mean() >= 0.75
    with pytest.raises(ValueError, match="at least codebook_size = 4"):
        kmeans_codebooks(quantizer, latents[..., :1, :2])


def test_unfinished_checkpoints_are_never_resumed(tmp_path):
    for name in ("checkpoint-5", "checkpoint-10", "unfinished-checkpoint-15", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-10"
    assert find_checkpoint(tmp_path, "checkpoint-5").name == "checkpoint-5"
    assert find_checkpoint(tmp_path, None) is None
    with pytest.raises(FileNotFoundError, match="Checkpoints in .*: checkpoint-5, checkpoint-10"):
        find_checkpoint(tmp_path, "checkpoint-7")


def test_crops_have_one_size_and_the_centre_is_the_centre():
    picture = PIL.Image.new("RGB", (41, 20))
    picture.putpixel((20, 10), (255, 255, 255))
    crops = RandomCrops("image", 16, crops_per_image=3, random_flip=True)({"image": [picture, picture.resize((9, 7))]})
    assert [tuple(crop.shape) for crop in crops["pixel_values"]] == [(3, 3, 16, 16)] * 2
    (centre,) = RandomCrops("image", 16, center_crop=True)({"image": [picture]})["pixel_values"]
    assert centre[0, 0].argmax() == 8 * 16 + 8


def test_a_dataset_must_be_named_once():
    for sources in ((None, None), ("a", "b")):
        with pytest.raises(ValueError, match="exactly one of"):
            load_images(*sources, "image", "train")


def test_generator_step_leaves_the_discriminator_trainable(model, images):
    from diffusers_pq.training.autoencoders import ReconstructionModel
    from diffusers_pq.training.trainer import AutoencoderLoss, LossWeights

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
    assert "Not taken from" in result.stderr and "quantizer.codebooks" in result.stderr
    with pytest.raises(ValueError, match="No parameter of the Linear fits the PQModel"):
        copy_matching_weights(trained, torch.nn.Linear(3, 3))


def test_kmeans_gets_as_many_latents_as_it_asks_for(model, images):
    latents = collect_latents(model, [images] * 5, minimum=200)
    expected = model.encode(images).latents
    assert latents.shape == (1, 8, 2 * expected[:, 0].numel(), 1), "two batches of 192 latent pixels"
    torch.testing.assert_close(latents[0, :, :4, 0], expected[0].flatten(1)[:, :4])
    assert collect_latents(model, [images], minimum=1000).shape[2] == 192
