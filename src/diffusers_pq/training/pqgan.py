"""How a PQGAN, or a VQ or KL autoencoder on its backbone, is trained: Eq. 1, its optimisation steps and the run."""

import logging
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader

from ..autoencoders import check_resolution, create_autoencoder, downsampling_factor, load_autoencoder
from ..data.loaders import build_train_loader, first_batches
from ..data.pictures import RESIZE_MODES, Crops, usable_rows
from ..flags import Options, flag, with_default
from ..images import to_uint8
from ..metrics import LPIPS, PSNR, SSIM, CodebookUsage, PooledPSNR, WeightsUnavailableError, load_lpips, psnr
from ..models.discriminator import PatchDiscriminator
from ..models.kmeans import kmeans_codebooks
from .codebooks import DeadEntryReseeder, EMACodebooks
from .initialisation import collect_latents, copy_matching_weights, pca_init
from .optimizers import build_optimizer
from .options import DataOptions, OptimisationOptions, RunOptions, TrainingOptions
from .run import (
    FiniteSteps,
    TrainingRun,
    build_ema,
    build_lr_scheduler,
    complete_step,
    count_steps,
    create_accelerator,
    dry_run,
    ema_weights,
    load_train_split,
    load_validation_split,
    prepare_model,
    share_out,
)
from .uploads import BestModel


logger = logging.getLogger(__name__)

PREVIEWS = 8  # pictures that are logged
PCA_CROPS = 32  # crops that --weight_init pca is fitted to


@dataclass
class Reconstruction:
    """
    Args:
        sample (`torch.Tensor` of shape `(B, 3, H, W)`): The reconstruction, about [-1, 1].
        regularisation (`torch.Tensor`, scalar): Codebook and commitment loss of Eq. 1, or the KL divergence.
        codes (`torch.LongTensor` of shape `(B, S, h, w)`, *optional*): The codes, `None` without a quantiser.
        latents (`torch.Tensor` of shape `(B, d, h, w)`, *optional*): z_e, detached, where there are codes.
    """

    sample: torch.Tensor
    regularisation: torch.Tensor
    codes: torch.LongTensor | None = None
    latents: torch.Tensor | None = None


class ReconstructionModel(nn.Module):
    """
    Wraps an autoencoder so that one forward pass returns everything a training step needs; DDP requires a single one.

    Args:
        autoencoder: a [`PQModel`] or [`AutoencoderKL`].
    """

    def __init__(self, autoencoder: nn.Module):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: torch.Tensor, quantize: bool = True) -> Reconstruction:
        """
        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): In [-1, 1].
            quantize (`bool`): `False` decodes z_e itself, with a codebook loss of zero.
        """
        if isinstance(self.autoencoder, AutoencoderKL):
            return self._reconstruct_kl(images)
        latents = self.autoencoder.encode(images).latents
        if not quantize:
            sample = self.autoencoder.decode(latents, quantize=False).sample
            # Zero, but touches the codebooks: every parameter of a DDP model must receive a gradient.
            return Reconstruction(sample, 0.0 * self.autoencoder.quantizer.codebooks.sum())
        quantized = self.autoencoder.quantize(latents)
        sample = self.autoencoder.decode(quantized.latents, quantize=False).sample
        return Reconstruction(sample, quantized.loss, quantized.codes, latents.detach())

    def _reconstruct_kl(self, images: torch.Tensor) -> Reconstruction:
        posterior = self.autoencoder.encode(images).latent_dist
        latents = posterior.sample() if self.training else posterior.mode()
        return Reconstruction(self.autoencoder.decode(latents).sample, posterior.kl().mean())


@dataclass
class LossWeights:
    """
    Weights of the terms of Eq. 1 beside the pixel term; 0 switches a term off.

    Args:
        perceptual (`float`): LPIPS.
        codebook (`float`): Codebook and commitment loss of a `PQModel`, or the KL divergence of an `AutoencoderKL`.
        discriminator (`float`): Adversarial loss, on top of the adaptive weight.
    """

    perceptual: float = 1.0
    codebook: float = 1.0
    discriminator: float = 0.8


def load_perceptual_loss() -> nn.Module:
    """
    LPIPS on VGG16, frozen; its forward takes two image batches in [-1, 1] and returns `[B, 1, 1, 1]`.

    Raises:
        WeightsUnavailableError: if the VGG16 weights are neither in torch's hub cache nor downloadable.
    """
    try:
        return load_lpips("vgg")
    except WeightsUnavailableError as error:
        message = f"{error} Or switch the term off with `--perceptual_weight 0`."
        raise WeightsUnavailableError(message, error.wanted) from error


def hinge_discriminator_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    """Half the sum of the hinge losses on real and reconstructed patches."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def adaptive_weight(
    reconstruction_loss: torch.Tensor, generator_loss: torch.Tensor, last_layer: nn.Parameter, scale: float = 1.0
) -> torch.Tensor:
    """
    VQGAN's adaptive weight of the adversarial term: the ratio of the two losses' gradient norms at the decoder's last
    layer, at most 1e4. With float16 gradients both losses are multiplied by `scale` meanwhile.
    """
    reconstruction_norm, generator_norm = (
        torch.autograd.grad(scale * loss, last_layer, retain_graph=True)[0].norm() / scale
        for loss in (reconstruction_loss, generator_loss)
    )
    ratio = reconstruction_norm / (generator_norm + 1e-4)
    return ratio.clamp(0.0, 1e4).detach()


class AutoencoderLoss:
    """
    The generator's and the discriminator's losses.

    Args:
        weights ([`LossWeights`])
        perceptual_loss: what [`load_perceptual_loss`] returns, or `None` with a weight of 0.
        discriminator: a [`PatchDiscriminator`], or `None` with a weight of 0.
        accelerator (`Accelerator`): Unwraps the models.
    """

    def __init__(self, weights: LossWeights, perceptual_loss, discriminator, accelerator: Accelerator):
        self.weights = weights
        self.perceptual_loss = perceptual_loss
        self.discriminator = discriminator
        self.accelerator = accelerator

    def generator(
        self, model: ReconstructionModel, images: torch.Tensor, output: Reconstruction, adversarial: bool = True
    ) -> tuple[torch.Tensor, dict]:
        """The loss of the autoencoder and its parts, for a [`Reconstruction`] of `images`."""
        sample = output.sample.float()
        pixel = F.l1_loss(sample, images)
        parts = {"pixel_loss": pixel.detach(), "codebook_loss": output.regularisation.detach()}
        reconstruction = pixel
        if self.perceptual_loss is not None:
            perceptual = self.perceptual_loss(sample, images).mean()
            reconstruction = reconstruction + self.weights.perceptual * perceptual
            parts["perceptual_loss"] = perceptual.detach()
        loss = reconstruction + self.weights.codebook * output.regularisation
        if self.discriminator is not None and adversarial:
            adversarial_loss = -self._frozen_discriminator(sample).mean()
            last_layer = self.accelerator.unwrap_model(model).autoencoder.decoder.conv_out.weight
            scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
            ratio = adaptive_weight(reconstruction, adversarial_loss, last_layer, scale)
            weight = self.weights.discriminator * ratio
            loss = loss + weight * adversarial_loss
            parts |= {"adversarial_loss": adversarial_loss.detach(), "adversarial_weight": weight}
        return loss, parts | {"loss": loss.detach()}

    def discriminator_loss(self, images: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """Hinge loss on the pictures and on the reconstruction that the generator's step has made already."""
        return hinge_discriminator_loss(self.discriminator(images), self.discriminator(sample.detach().float()))

    def _frozen_discriminator(self, sample: torch.Tensor) -> torch.Tensor:
        # The generator's gradient passes through the discriminator without touching it; unwrapped, since DDP would
        # otherwise wait for gradients that never come.
        discriminator = self.accelerator.unwrap_model(self.discriminator)
        discriminator.requires_grad_(False)
        logits = discriminator(sample)
        discriminator.requires_grad_(True)
        return logits


class AutoencoderTrainer:
    """
    One model, its discriminator and what a step does with them.

    Args:
        accelerator (`Accelerator`)
        model ([`ReconstructionModel`]): Prepared by the accelerator.
        optimizer, lr_scheduler: Likewise prepared.
        losses ([`AutoencoderLoss`])
        discriminator, d_optimizer, d_scheduler (*optional*): Likewise prepared.
        max_grad_norm (`float`, *optional*): Of the model's gradients; `None` does not clip.
        max_skipped_steps (`int`): See [`FiniteSteps`].
        ema (`EMAModel`, *optional*): Of the autoencoder's weights.
        ema_codebooks ([`EMACodebooks`], *optional*)
        reseeder ([`DeadEntryReseeder`], *optional*)
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer,
        lr_scheduler,
        losses: AutoencoderLoss,
        discriminator: nn.Module | None = None,
        d_optimizer=None,
        d_scheduler=None,
        max_grad_norm: float | None = None,
        max_skipped_steps: int = 10,
        ema=None,
        ema_codebooks: EMACodebooks | None = None,
        reseeder: DeadEntryReseeder | None = None,
    ):
        self.accelerator = accelerator
        self.model, self.optimizer, self.lr_scheduler = model, optimizer, lr_scheduler
        self.losses = losses
        self.discriminator, self.d_optimizer, self.d_scheduler = discriminator, d_optimizer, d_scheduler
        self.steps = FiniteSteps(accelerator, max_grad_norm, max_skipped_steps)
        self.d_steps = FiniteSteps(accelerator, limit=max_skipped_steps)
        self.ema = ema
        self.ema_codebooks = ema_codebooks
        self.reseeder = reseeder
        quantizer = getattr(self.autoencoder, "quantizer", None)
        # Since the last `codebook_use`.
        self.usage = None
        if quantizer is not None:
            self.usage = CodebookUsage(quantizer.num_subspaces, quantizer.codebook_size).to(accelerator.device)

    @property
    def autoencoder(self) -> nn.Module:
        """The bare autoencoder."""
        return self.accelerator.unwrap_model(self.model).autoencoder

    @property
    def schedules(self) -> list[tuple]:
        """Optimisers, each with its scheduler."""
        pairs = (self.optimizer, self.lr_scheduler), (self.d_optimizer, self.d_scheduler)
        return [pair for pair in pairs if pair[0] is not None]

    @property
    def is_healthy(self) -> bool:
        """Whether the last step's gradients were finite."""
        return not (self.steps.in_a_row or self.d_steps.in_a_row)

    @property
    def skipped_steps(self) -> int:
        """Steps of both optimisers that were left out so far."""
        return self.steps.skipped + self.d_steps.skipped

    def step(
        self, images: torch.Tensor, quantize: bool = True, adversarial: bool = True
    ) -> dict[str, torch.Tensor] | None:
        """
        Learn from one batch.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): In [-1, 1], on the accelerator's device.
            quantize (`bool`): `False` trains without the quantiser.
            adversarial (`bool`): `False` trains without the discriminator, and not the discriminator.

        Returns:
            What to log, still on the device; `None` while gradients are being accumulated.
        """
        models = [model for model in (self.model, self.discriminator) if model is not None]
        with self.accelerator.accumulate(*models):
            output = self.model(images, quantize=quantize)
            loss, logs = self.losses.generator(self.model, images, output, adversarial)
            self.accelerator.backward(loss)
            self.steps.step(self.optimizer, self.model.parameters())
            self.lr_scheduler.step()
            if self.discriminator is not None:
                if adversarial:
                    logs["discriminator_loss"] = self._discriminator_step(images, output)
                self.d_scheduler.step()
        self._observe(output)
        if not self.accelerator.sync_gradients:
            return None
        self._step_codebooks()
        if self.ema is not None and self.is_healthy:
            self.ema.step(self.autoencoder.parameters())
        return logs | {"psnr": psnr(to_uint8(output.sample.detach()), to_uint8(images)).mean()}

    def codebook_use(self) -> dict[str, float]:
        """
        H_n, P_n (Eq. 3) and dead entries over all codes of all processes since the last call; to be called by all.
        """
        if self.usage is None or not self.usage.update_called:
            return {}
        use = self.usage.compute()
        self.usage.reset()
        return use

    def restart_codebook_averages(self):
        """Let the running averages go on from the codebooks as they are, after these were set anew."""
        codebooks = self.autoencoder.quantizer.codebooks
        if self.ema_codebooks is not None:
            self.ema_codebooks.restart(torch.ones_like(codebooks[..., 0], dtype=torch.bool))
        for average, parameter in zip(self.ema.shadow_params if self.ema else (), self.autoencoder.parameters()):
            if parameter is codebooks:
                average.copy_(codebooks.detach())

    def _discriminator_step(self, images: torch.Tensor, output: Reconstruction) -> torch.Tensor:
        loss = self.losses.discriminator_loss(images, output.sample)
        self.accelerator.backward(loss)
        self.d_steps.step(self.d_optimizer, self.discriminator.parameters())
        return loss.detach()

    def _observe(self, output: Reconstruction):
        # Codes and latents of a step without finite gradients are worth nothing; all processes see the same gradients.
        if output.codes is None or self.steps.in_a_row:
            return
        self.usage.update(output.codes)
        for remedy in (self.ema_codebooks, self.reseeder):
            if remedy is not None:
                remedy.observe(output.latents, output.codes)

    def _step_codebooks(self):
        if self.steps.in_a_row:
            return
        if self.ema_codebooks is not None:
            self.ema_codebooks.step()
        reseeded = None if self.reseeder is None else self.reseeder.step()
        if reseeded is not None and self.ema_codebooks is not None:
            self.ema_codebooks.restart(reseeded)


class ReconstructionValidation:
    """
    Measures the reconstruction of held-out pictures, shared out among the processes.

    Args:
        accelerator (`Accelerator`)
        rows (`list[dict]`): What [`usable_rows`] returns, the same in every process.
        crops ([`~diffusers_pq.data.pictures.Crops`]): One of each picture, not random.
        batch_size (`int`): Per process.
        lpips (*optional*): What [`load_lpips`] returns, to report `lpips`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        rows: list[dict],
        crops: Crops,
        batch_size: int,
        lpips: nn.Module | None = None,
    ):
        self.accelerator = accelerator
        rows, self.count = share_out(rows, accelerator)
        self.crops = crops
        self.loader = DataLoader(rows, batch_size=batch_size, collate_fn=self._collate)
        self.metrics = {"psnr": PSNR(), "psnr_pooled": PooledPSNR(), "ssim": SSIM()}
        self.metrics |= {} if lpips is None else {"lpips": LPIPS(lpips)}

    def _collate(self, rows: list[dict]) -> torch.Tensor:
        return torch.cat([self.crops(row, random.Random(0)) for row in rows])

    @torch.no_grad()
    def evaluate(self, model: ReconstructionModel, quantize: bool = True) -> tuple[dict[str, float], torch.Tensor]:
        """
        To be called by all processes.

        Args:
            model ([`ReconstructionModel`]): Prepared or bare; evaluated in eval mode, its mode is restored.
            quantize (`bool`): `False` measures the model without its quantiser.

        Returns:
            `tuple`: means over all pictures of `psnr` (dB), `ssim` and, if its weights are available, `lpips`, with
            `psnr_pooled` of all errors together, and H_n, P_n and the share of dead entries if there are codes; and
            some originals followed by their reconstructions, uint8.
        """
        device = self.accelerator.device
        quantizer = getattr(self.accelerator.unwrap_model(model).autoencoder, "quantizer", None)
        metrics = {name: metric.to(device) for name, metric in self.metrics.items()}
        usage = CodebookUsage(quantizer.num_subspaces, quantizer.codebook_size).to(device) if quantizer else None
        was_training = model.training
        model.eval()
        previews, remaining = None, self.count
        for images in self.loader:
            output = model(images.to(device), quantize=quantize)
            pair = to_uint8(output.sample)[:remaining], to_uint8(images).to(device)[:remaining]
            if previews is None:
                previews = torch.cat([part[:PREVIEWS] for part in reversed(pair)])
            for metric in metrics.values() if remaining else ():
                metric.update(*pair)
            if output.codes is not None:
                usage.update(output.codes[:remaining])
            remaining = max(0, remaining - len(images))
        model.train(was_training)
        scores = {name: float(metric.compute()) for name, metric in metrics.items()}
        for metric in metrics.values():
            metric.reset()
        return scores | (usage.compute() if quantize and usage else {}), previews


@dataclass(kw_only=True)
class AutoencoderOptions(Options):
    """Which autoencoder to train, and how its weights start."""

    title: ClassVar[str] = "model"

    model_config_name_or_path: str | None = flag(
        None, "config.json, folder or Hub repository to start afresh from", differs="between machines"
    )
    pretrained_model_name_or_path: str | None = flag(
        None, "trained autoencoder to fine-tune", differs="between machines"
    )
    revision: str | None = flag(
        None, "branch, tag or commit of that autoencoder on the Hub; default: main", fixed=True
    )
    variant: str | None = flag(None, 'of that autoencoder\'s files, such as "fp16"', fixed=True)
    backbone_name_or_path: str | None = flag(
        None,
        "trained autoencoder (PQModel or AutoencoderKL) whose fitting weights a fresh model starts from",
        fixed=True,
    )
    weight_init: str = flag(
        "default",
        "torch's, as in the paper, or the linear autoencoder that fits the first crops: its components dealt out to "
        "the subspaces, the largest with the smallest, or rotated at random by --seed, which favours no bottleneck",
        choices=("default", "pca", "pca_rotated"),
        fixed=True,
    )

    def check(self):
        if (self.model_config_name_or_path is None) == (self.pretrained_model_name_or_path is None):
            raise ValueError("give exactly one of --model_config_name_or_path and --pretrained_model_name_or_path")
        if (self.revision or self.variant) and not self.pretrained_model_name_or_path:
            raise ValueError("--revision and --variant are of --pretrained_model_name_or_path")
        if self.backbone_name_or_path and self.pretrained_model_name_or_path:
            raise ValueError("--backbone_name_or_path needs --model_config_name_or_path")
        if self.weight_init != "default" and not self.model_config_name_or_path:
            raise ValueError(f"--weight_init {self.weight_init} starts afresh: it needs --model_config_name_or_path")
        if self.weight_init != "default" and self.backbone_name_or_path:
            raise ValueError(f"--weight_init {self.weight_init} and --backbone_name_or_path exclude each other")


@dataclass(kw_only=True)
class CodebookOptions(Options):
    """Remedies against unused codebook entries."""

    title: ClassVar[str] = "codebooks (the paper uses none of these)"

    quantize_from_step: int = flag(0, "train without quantiser up to this step", minimum=0)
    codebook_init: str = flag(
        "normal",
        "N(0, 1) as in the paper, or k-means centres of latents at --quantize_from_step",
        choices=("normal", "kmeans"),
    )
    kmeans_vectors_per_entry: int = flag(32, "latent pixels of k-means, over codebook_size", minimum=1)
    codebook_distance: str | None = flag(
        None, "what the nearest entry is; default: the config's", choices=("euclidean", "cosine")
    )
    codebook_ema_decay: float | None = flag(
        None, "move the codebooks by running means with this decay, not by gradients", above=0, below=1, fixed=True
    )
    reseed_dead_entries: int | None = flag(
        None, "move unused entries to data after so many steps", minimum=1, fixed=True
    )
    gradient_estimator: str = flag(
        "straight_through", "how gradients pass the quantiser", choices=("straight_through", "rotation")
    )


@dataclass(kw_only=True)
class CropOptions(DataOptions):
    """What pictures to train on, and what is cut from them."""

    resolution: int = flag(256, "side of the crops, in pixels", minimum=1)
    crops_per_image: int = flag(1, "crops cut from each decoded picture", minimum=1, fixed=True)
    resize_mode: str = flag(
        "native",
        "cut crops from pictures as they are (native), or resized to a short side of --resolution (short_side), or "
        "make whole pictures squares, as the paper's authors do (stretch)",
        choices=RESIZE_MODES,
    )
    center_crop: bool = flag(False, "cut the middle out of each picture instead of a random part")

    def check(self):
        super().check()
        if self.crops_per_image == 1:
            return
        if self.center_crop:
            raise ValueError(f"--center_crop cuts the same --crops_per_image {self.crops_per_image} times: give 1")
        if self.resize_mode == "stretch":
            raise ValueError(
                f"--resize_mode stretch leaves nothing to cut --crops_per_image {self.crops_per_image} times: give 1"
            )


@dataclass(kw_only=True)
class AutoencoderOptimisationOptions(OptimisationOptions):
    """Optimiser, precision and accumulation of an autoencoder (Table 4, appendix A.1)."""

    usual_batch_size: ClassVar[int] = 20

    train_batch_size: int | None = flag(
        None,
        "crops per process and forward pass; default: this process's share of --total_batch_size, else 20",
        minimum=1,
        differs="between machines",
    )
    learning_rate: float = flag(4.5e-6, "learning rate, after the warm-up", minimum=0)
    discriminator_learning_rate: float | None = flag(
        None, "learning rate of the discriminator; default: that of --learning_rate", minimum=0
    )
    adam_beta1: float = with_default(OptimisationOptions, "adam_beta1", 0.5)
    adam_beta2: float = with_default(OptimisationOptions, "adam_beta2", 0.9)


@dataclass(kw_only=True)
class LossOptions(Options):
    """Weights of the terms of Eq. 1."""

    title: ClassVar[str] = "losses (0 switches a term off)"

    perceptual_weight: float = flag(1.0, "weight of the perceptual distance LPIPS", minimum=0)
    codebook_weight: float = flag(1.0, "weight of the codebook and commitment loss of a PQModel", minimum=0)
    kl_weight: float = flag(1e-6, "weight of the KL divergence of an AutoencoderKL", minimum=0)
    discriminator_weight: float = flag(0.8, "weight of the adversarial loss, on top of the adaptive one", minimum=0)
    discriminator_start: int = flag(0, "steps before the discriminator and its loss come in", minimum=0)


@dataclass(kw_only=True)
class PQGANRunOptions(RunOptions):
    """Output, logs, checkpoints and the Hub, of an autoencoder."""

    output_dir: str = with_default(RunOptions, "output_dir", "pqgan")


@dataclass(kw_only=True)
class PQGANOptions(TrainingOptions):
    """All of a training of an autoencoder."""

    model: AutoencoderOptions
    codebooks: CodebookOptions
    data: CropOptions
    optim: AutoencoderOptimisationOptions
    loss: LossOptions
    run: PQGANRunOptions

    def check(self):
        if self.codebooks.codebook_distance and self.model.pretrained_model_name_or_path:
            raise ValueError("--codebook_distance needs --model_config_name_or_path")
        if (self.optim.train_batch_size or 0) % self.data.crops_per_image:
            raise ValueError(
                f"--train_batch_size {self.optim.train_batch_size} must be a multiple of "
                f"--crops_per_image {self.data.crops_per_image}"
            )

    def check_resuming(self, earlier: Mapping[str, Any]):
        super().check_resuming(earlier)
        if self.loss.discriminator_weight and not earlier.get("discriminator_weight"):
            raise ValueError(
                f"--discriminator_weight {self.loss.discriminator_weight}: the checkpoint was written without a "
                "discriminator (--discriminator_weight 0). Give 0 again, or start another run from its model with "
                "`--pretrained_model_name_or_path`."
            )

    @property
    def pictures_per_batch(self) -> int:
        """Decoded pictures in each forward pass of a process."""
        return self.optim.train_batch_size // self.data.crops_per_image


def train_pqgan(options: PQGANOptions, build: Callable[[], nn.Module] | None = None):
    """
    Train, validate, keep checkpoints and write the trained model; or do a dry run. To be called by all processes.

    Args:
        options ([`PQGANOptions`])
        build (*optional*): Makes the autoencoder, its weights and codebooks as they are to be at the start, instead
            of the flags for the model and for these.

    Raises:
        ValueError: if the options contradict the model or the data.
    """
    codebooks, data, optim, loss = options.codebooks, options.data, options.optim, options.loss
    accelerator = create_accelerator(optim, options.run)
    _check_accelerator(accelerator, optim, loss)
    options.check()  # with this process's share of the batch
    run = TrainingRun(options, accelerator, BestModel(options.run.output_dir, "psnr"))
    train_images = load_train_split(data)
    count_steps(optim, train_images, options.pictures_per_batch, accelerator)
    autoencoder = build_autoencoder(options.model, codebooks) if build is None else build()
    check_resolution("--resolution", data.resolution, downsampling_factor(autoencoder))
    if build is None and options.model.weight_init != "default" and run.checkpoint is None:
        fit_to_images(options, autoencoder, train_images)
    model = ReconstructionModel(prepare_model(optim, autoencoder, dynamic=False))
    perceptual_loss = _build_perceptual_loss(loss, options.run.dry_run)
    if perceptual_loss is not None:
        perceptual_loss.to(accelerator.device)
    trainer = _build_trainer(options, accelerator, model, perceptual_loss)
    loader = _build_loader(options, accelerator, train_images, run.step)
    if options.run.dry_run:
        parts = dict(trainer.autoencoder.named_children())
        parts |= {"discriminator": trainer.discriminator} if trainer.discriminator else {}
        optimizers = [optimizer for optimizer in (trainer.optimizer, trainer.d_optimizer) if optimizer]
        batches = iter(loader)
        dry_run(options, accelerator, parts, optimizers, lambda: _take_step(trainer, batches, quantize=True))
        return
    validation = _build_validation(options, accelerator, perceptual_loss)
    run.start(trainer)

    kmeans_pending = build is None and codebooks.codebook_init == "kmeans" and run.step <= codebooks.quantize_from_step
    kmeans_pending = kmeans_pending and hasattr(trainer.autoencoder, "quantizer")
    trainer.model.train()
    batches = iter(loader)
    while not run.is_finished:
        quantize = run.step >= codebooks.quantize_from_step
        if kmeans_pending and quantize:
            _init_codebooks(options, trainer, train_images)
            kmeans_pending = False
        logs = _take_step(trainer, batches, quantize, adversarial=run.step >= loss.discriminator_start)
        run.advance()
        if run.is_due(options.run.logging_steps):
            logs |= trainer.codebook_use() | {"lr": trainer.lr_scheduler.get_last_lr()[0]}
            logs |= {
                "skipped_steps": trainer.skipped_steps,
                "skipped_images": loader.dataset.bad_images.total(accelerator),
            }
            run.log(logs, shown=("loss", "psnr", "H_n"))
        if validation is not None and run.is_due(options.run.validation_steps):
            with ema_weights(trainer.ema, trainer.autoencoder.parameters()):
                scores, pictures = validation.evaluate(trainer.model, quantize)
                run.log_scores(scores)
                run.log_images(pictures, images_per_row=len(pictures) // 2)
                run.keep_if_best(partial(_save_autoencoder, trainer), scores)
        # After a validation, whose random numbers its state then has behind it.
        if run.is_due(options.run.checkpointing_steps) and trainer.is_healthy:
            run.save_checkpoint()
    with ema_weights(trainer.ema, trainer.autoencoder.parameters()):
        run.finish(partial(_save_model, trainer))


def build_autoencoder(model: AutoencoderOptions, codebooks: CodebookOptions) -> nn.Module:
    """The autoencoder that the options ask for."""
    if model.pretrained_model_name_or_path:
        files = {"revision": model.revision, "variant": model.variant}
        autoencoder = load_autoencoder(model.pretrained_model_name_or_path, **files).train()
    else:
        overrides = {"codebook_distance": codebooks.codebook_distance} if codebooks.codebook_distance else {}
        autoencoder = create_autoencoder(model.model_config_name_or_path, **overrides)
        if model.backbone_name_or_path:
            fresh = copy_matching_weights(autoencoder, load_autoencoder(model.backbone_name_or_path))
            logger.info("Not taken from %s: %s", model.backbone_name_or_path, ", ".join(fresh) or "nothing")
    if hasattr(autoencoder, "quantizer"):
        autoencoder.quantizer.gradient_estimator = codebooks.gradient_estimator
        # Before DDP wraps the model, which waits for the gradients of all parameters that had one then.
        autoencoder.quantizer.codebooks.requires_grad_(not codebooks.codebook_ema_decay)
    return autoencoder


def fit_to_images(options: PQGANOptions, autoencoder: nn.Module, train_images):
    """Start from the linear autoencoder of the run's first crops."""
    batches = islice(first_crops(options, train_images), math.ceil(PCA_CROPS / options.optim.train_batch_size))
    quantizer = getattr(autoencoder, "quantizer", None)
    num_subspaces = 1 if quantizer is None else quantizer.num_subspaces
    rotation_seed = options.optim.seed if options.model.weight_init == "pca_rotated" else None
    pca_init(autoencoder, torch.cat(list(batches)), num_subspaces, rotation_seed)


def first_crops(options: PQGANOptions, train_images) -> DataLoader:
    """Batches of the run's first crops, the same in every process."""
    order = options.optim.seed, options.data.shuffle_buffer
    crops = _random_crops(options.data)
    return first_batches(train_images, crops, options.pictures_per_batch, torch.cat, *order)


def build_discriminator(model: AutoencoderOptions, loss: LossOptions) -> PatchDiscriminator | None:
    """A fresh one, or the one that the pretrained autoencoder was trained against."""
    if not loss.discriminator_weight:
        return None
    pretrained = model.pretrained_model_name_or_path
    if pretrained and Path(pretrained, "discriminator").is_dir():
        return PatchDiscriminator.from_pretrained(Path(pretrained, "discriminator"), use_safetensors=True).train()
    return PatchDiscriminator()


def _random_crops(data):
    return Crops(
        data.image_column,
        data.resolution,
        data.crops_per_image,
        resize_mode=data.resize_mode,
        image_interpolation_mode=data.image_interpolation_mode,
        center_crop=data.center_crop,
        random_flip=data.random_flip,
        min_image_side=data.min_image_side,
    )


def _init_codebooks(options, trainer, train_images):
    """k-means on the run's first crops, in every process; all then take the codebooks of the first one."""
    autoencoder = trainer.autoencoder
    wanted = options.codebooks.kmeans_vectors_per_entry * autoencoder.config.codebook_size
    kmeans_codebooks(autoencoder.quantizer, collect_latents(autoencoder, first_crops(options, train_images), wanted))
    broadcast(autoencoder.quantizer.codebooks.data)
    trainer.restart_codebook_averages()


def _build_perceptual_loss(loss, is_dry_run):
    if not loss.perceptual_weight:
        return None
    try:
        return load_perceptual_loss()
    except WeightsUnavailableError as error:
        if not is_dry_run:
            raise
        logger.warning("Measured with random weights of VGG16: %s", error)
        return load_lpips("vgg", pretrained=False)


def _build_loader(options, accelerator, train_images, step):
    data, pictures = options.data, options.pictures_per_batch
    return build_train_loader(
        train_images,
        _random_crops(data),
        accelerator,
        pictures,
        collate_fn=torch.cat,
        seed=options.optim.seed,
        start=step * pictures * options.optim.gradient_accumulation_steps * accelerator.num_processes,
        shuffle_buffer=data.shuffle_buffer,
        num_workers=data.dataloader_num_workers,
        prefetch_factor=data.dataloader_prefetch,
        on_bad_image=data.on_bad_image,
    )


def _available_lpips():
    try:
        return load_lpips("vgg")
    except WeightsUnavailableError as error:
        logger.info("The validation goes without LPIPS: %s", error)
        return None


def _build_validation(options, accelerator, perceptual_loss):
    data = options.data
    images = load_validation_split(data)
    if images is None:
        return None
    rows = usable_rows(images, data.image_column, options.run.num_validation_images)
    if not rows:
        logger.warning("No picture of the validation can be used: no validation.")
        return None
    lpips = perceptual_loss or _available_lpips()
    crops = data.validation_crops(data.resolution)
    return ReconstructionValidation(accelerator, rows, crops, options.optim.train_batch_size, lpips)


def _save_autoencoder(trainer, folder):
    if trainer.accelerator.is_main_process:
        trainer.autoencoder.save_pretrained(folder)


def _save_model(trainer, folder):
    _save_autoencoder(trainer, folder)
    if trainer.discriminator is not None and trainer.accelerator.is_main_process:
        trainer.accelerator.unwrap_model(trainer.discriminator).save_pretrained(folder / "discriminator")


def _check_accelerator(accelerator, optim, loss):
    """Refuse what two models and the adaptive weight, a gradient of the decoder's last layer, do not allow."""
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"train_pqgan.py cannot run with {accelerator.distributed_type.value}, which would shard its models: "
            "launch it with `--config_file training_scripts/accelerate_configs/ddp.yaml`."
        )
    if accelerator.mixed_precision == "fp16" and optim.gradient_accumulation_steps > 1 and loss.discriminator_weight:
        raise ValueError(
            f"--gradient_accumulation_steps {optim.gradient_accumulation_steps} cannot be combined with fp16 and a "
            "discriminator, since one loss scale serves both optimisers: use `--mixed_precision bf16`, or 1 step."
        )


def _build_trainer(options, accelerator, model, perceptual_loss):
    codebooks, optim, loss = options.codebooks, options.optim, options.loss

    def optimiser(module, rate):
        optimizer = build_optimizer(optim, module.parameters(), rate)
        return optimizer, build_lr_scheduler(optim, optimizer)

    model, optimizer, lr_scheduler = accelerator.prepare(model, *optimiser(model, optim.learning_rate))
    discriminator = build_discriminator(options.model, loss)
    adversary = [discriminator, None, None]
    if discriminator is not None:
        own_rate = optim.discriminator_learning_rate
        rate = optim.learning_rate if own_rate is None else own_rate
        adversary = accelerator.prepare(discriminator, *optimiser(discriminator, rate))
    autoencoder = accelerator.unwrap_model(model).autoencoder
    quantizer = getattr(autoencoder, "quantizer", None)
    regularisation_weight = loss.kl_weight if quantizer is None else loss.codebook_weight
    weights = LossWeights(loss.perceptual_weight, regularisation_weight, loss.discriminator_weight)
    helpers = {}
    if optim.use_ema:
        helpers["ema"] = build_ema(optim, accelerator, autoencoder.parameters())
    if quantizer is not None and codebooks.codebook_ema_decay:
        helpers["ema_codebooks"] = EMACodebooks(quantizer, accelerator, codebooks.codebook_ema_decay)
    if quantizer is not None and codebooks.reseed_dead_entries:
        helpers["reseeder"] = DeadEntryReseeder(quantizer, accelerator, codebooks.reseed_dead_entries)
    accelerator.register_for_checkpointing(*helpers.values())
    return AutoencoderTrainer(
        accelerator,
        model,
        optimizer,
        lr_scheduler,
        AutoencoderLoss(weights, perceptual_loss, adversary[0], accelerator),
        *adversary,
        max_grad_norm=optim.max_grad_norm,
        max_skipped_steps=optim.max_skipped_steps,
        **helpers,
    )


def _take_step(trainer, batches, quantize, adversarial=True):
    device = trainer.accelerator.device
    return complete_step(lambda: trainer.step(next(batches).to(device, non_blocking=True), quantize, adversarial))
