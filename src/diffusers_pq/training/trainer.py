"""Optimisation steps of an autoencoder against its discriminator (Eq. 1)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator

from ..autoencoders import Reconstruction, ReconstructionModel
from ..images import to_uint8
from ..metrics import CodebookUsage, psnr
from .codebooks import DeadEntryReseeder, EMACodebooks
from .losses import adaptive_weight, hinge_discriminator_loss


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

    def generator(self, model: ReconstructionModel, images: torch.Tensor, output) -> tuple[torch.Tensor, dict]:
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
        if self.discriminator is not None:
            adversarial = -self._frozen_discriminator(sample).mean()
            last_layer = self.accelerator.unwrap_model(model).autoencoder.decoder.conv_out.weight
            scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
            ratio = adaptive_weight(reconstruction, adversarial, last_layer, scale)
            weight = self.weights.discriminator * ratio
            loss = loss + weight * adversarial
            parts |= {"adversarial_loss": adversarial.detach(), "adversarial_weight": weight}
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


class FiniteSteps:
    """
    Clips gradients and leaves out the steps whose gradient is not finite.

    Args:
        accelerator (`Accelerator`)
        max_norm (`float`, *optional*): Gradients are clipped to this norm; `None` does not clip.
        limit (`int`): So many steps left out in a row end the run.

    Attributes:
        skipped (`int`): Steps left out so far.
        in_a_row (`int`): Of these, those since the last good step.
    """

    def __init__(self, accelerator: Accelerator, max_norm: float | None = None, limit: int = 10):
        self.accelerator = accelerator
        self.max_norm = math.inf if max_norm is None else max_norm
        self.limit = limit
        self.skipped = 0
        self.in_a_row = 0

    def step(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]):
        """
        Step and clear the gradients; while gradients are being accumulated, do nothing.

        Raises:
            FloatingPointError: at the `limit`-th step in a row without a finite gradient.
        """
        if not self.accelerator.sync_gradients:
            return
        # The same on all processes, since the gradients are; so all of them leave the step out.
        norm = self.accelerator.clip_grad_norm_(parameters, self.max_norm)
        finite = norm is None or math.isfinite(norm)  # DeepSpeed looks after that itself, and gives none
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        # Under fp16 the scaler leaves the step out itself, and must see it to lower its scale.
        if finite or self.accelerator.scaler is not None:
            optimizer.step()
        optimizer.zero_grad()
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"The gradient was not finite for {self.in_a_row} steps in a row. The last checkpoint is from before; "
                "resume from it with a lower learning rate, `--max_grad_norm` or `--mixed_precision bf16`."
            )


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
    def is_healthy(self) -> bool:
        """Whether the last step's gradients were finite."""
        return not (self.steps.in_a_row or self.d_steps.in_a_row)

    @property
    def skipped_steps(self) -> int:
        """Steps of both optimisers that were left out so far."""
        return self.steps.skipped + self.d_steps.skipped

    def step(self, images: torch.Tensor, quantize: bool = True) -> dict[str, torch.Tensor] | None:
        """
        Learn from one batch.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): In [-1, 1], on the accelerator's device.
            quantize (`bool`): `False` trains without the quantiser.

        Returns:
            What to log, still on the device; `None` while gradients are being accumulated.
        """
        models = [model for model in (self.model, self.discriminator) if model is not None]
        with self.accelerator.accumulate(*models):
            output = self.model(images, quantize=quantize)
            loss, logs = self.losses.generator(self.model, images, output)
            self.accelerator.backward(loss)
            self.steps.step(self.optimizer, self.model.parameters())
            self.lr_scheduler.step()
            if self.discriminator is not None:
                logs["discriminator_loss"] = self._discriminator_step(images, output)
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
        self.d_scheduler.step()
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
