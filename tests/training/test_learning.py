"""That training learns: losses fall, and every term of them reaches the weights."""

import lpips
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import tiny_config
from diffusers.optimization import get_constant_schedule

from diffusers_pq import PQModel
from diffusers_pq.flags import parse
from diffusers_pq.models.class_conditioning import create_class_conditional_denoiser
from diffusers_pq.training.denoiser import ClassConditionalDenoiser, DenoiserTrainer, DenoisingObjective
from diffusers_pq.training.noise import create_scheduler, denoising_loss
from diffusers_pq.training.pqgan import (
    AutoencoderLoss,
    AutoencoderTrainer,
    LossWeights,
    PQGANOptions,
    ReconstructionModel,
    load_perceptual_loss,
    train_pqgan,
)


@pytest.fixture
def random_vgg(monkeypatch):
    """LPIPS as it is but for VGG's weights, which are random instead of downloaded."""
    whole = lpips.LPIPS
    monkeypatch.setattr(lpips, "LPIPS", lambda **options: whole(**options | {"pnet_rand": True}))


def pictures(count):
    """Smooth pictures `[count, 3, 32, 32]` in [-1, 1]."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return F.interpolate(coarse, (32, 32), mode="bicubic").clamp(-1, 1)


def test_the_perceptual_term_is_lpips_on_vgg_and_reaches_the_autoencoder_alone(random_vgg):
    torch.manual_seed(0)
    perceptual_loss = load_perceptual_loss()
    model = ReconstructionModel(PQModel(**tiny_config()))
    losses = AutoencoderLoss(LossWeights(0.7, 0.5, 0), perceptual_loss, None, Accelerator(cpu=True))
    images = pictures(2)
    output = model(images)
    loss, parts = losses.generator(model, images, output)
    expected = perceptual_loss(output.sample, images).mean()
    assert parts["perceptual_loss"] == expected > 0 and perceptual_loss.pnet_type == "vgg"
    pixel, codebook = F.l1_loss(output.sample, images), output.regularisation
    torch.testing.assert_close(loss, pixel + 0.7 * expected + 0.5 * codebook)
    decoder = model.autoencoder.decoder.conv_out.weight
    (by_all,) = torch.autograd.grad(loss, decoder, retain_graph=True)
    (by_pixels,) = torch.autograd.grad(pixel, decoder, retain_graph=True)
    (by_features,) = torch.autograd.grad(expected, decoder)
    torch.testing.assert_close(by_all, by_pixels + 0.7 * by_features)
    assert by_features.norm() > 1e-3 * by_pixels.norm()
    assert not any(parameter.requires_grad for parameter in perceptual_loss.parameters())


def test_the_training_program_trains_with_all_losses_of_the_paper(random_vgg, tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    for number, picture in enumerate(pictures(4)):
        pixels = ((picture + 1) * 127.5).to(torch.uint8).permute(1, 2, 0).numpy()
        PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "data" / "train" / f"{number}.png")
    PQModel(**tiny_config()).save_config(tmp_path / "pq")
    flags = ["--model_config_name_or_path", tmp_path / "pq", "--train_data_dir", tmp_path / "data"]
    flags += ["--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out", "--resolution", 32]
    flags += ["--train_batch_size", 2, "--max_train_steps", 2, "--logging_steps", 1, "--mixed_precision", "no"]
    train_pqgan(PQGANOptions.of(parse(PQGANOptions, list(map(str, flags)))))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = EventAccumulator(str(next((tmp_path / "out" / "logs").rglob("events.out.tfevents*")).parent)).Reload()
    for term in ("perceptual_loss", "adversarial_loss", "codebook_loss", "pixel_loss", "discriminator_loss"):
        values = [event.value for event in logs.Scalars(term)]
        assert len(values) == 2 and np.isfinite(values).all() and any(values), term


def test_an_autoencoder_learns_four_pictures_by_heart():
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = ReconstructionModel(PQModel(**tiny_config()))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = AutoencoderLoss(LossWeights(0, 1, 0), None, None, accelerator)
    trainer = AutoencoderTrainer(accelerator, model, optimizer, get_constant_schedule(optimizer), losses)
    images = F.avg_pool2d(pictures(4), 2)
    logs = [trainer.step(images) for _ in range(100)]
    first, last = logs[0], logs[-1]
    assert last["pixel_loss"] < first["pixel_loss"] / 2.5, (first, last)
    assert last["psnr"] > first["psnr"] + 7, (first, last)


@pytest.mark.parametrize("objective", ["diffusion", "flow_matching"])
def test_a_denoiser_learns_eight_latents_by_heart(objective):
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    latents, labels = torch.randn(8, 4, 2, 2).repeat(8, 1, 1, 1), torch.arange(8).repeat(8)
    config = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 16}
    config |= {"num_layers": 1, "patch_size": 1}
    denoiser = ClassConditionalDenoiser(create_class_conditional_denoiser(config, 4, 2, num_classes=8))
    scheduler = create_scheduler(objective)
    optimizer = torch.optim.AdamW(denoiser.parameters(), 1e-2)
    objective = DenoisingObjective(vae=None, scheduler=scheduler)
    trainer = DenoiserTrainer(accelerator, denoiser, optimizer, get_constant_schedule(optimizer), objective)

    @torch.no_grad()
    def loss():
        torch.manual_seed(1)
        return denoising_loss(denoiser, scheduler, latents, labels).mean()

    before = loss()
    for _ in range(150):
        trainer.step(latents, labels)
    assert loss() < before / 5, (before, loss())
