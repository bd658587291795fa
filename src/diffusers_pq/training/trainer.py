"""One optimisation step of an autoencoder against its discriminator (Eq. 1)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator

from .autoencoders import ReconstructionModel
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
            weight = self.weights.discriminator * adaptive_weight(reconstruction, adversarial, last_layer)
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
        norm = float(self.accelerator.clip_grad_norm_(parameters, self.max_norm))
        finite = math.isfinite(norm)
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
