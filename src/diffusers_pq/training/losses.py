"""Reconstruction and adversarial losses of VQGAN, which PQGAN takes over unchanged (Eq. 1)."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..metrics import WeightsUnavailableError, load_lpips


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
