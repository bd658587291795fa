"""Reconstruction quality of a model over a set of pictures."""

from collections.abc import Iterable

import torch

from ..images import to_uint8
from ..metrics import CodebookUsage, psnr, ssim
from .autoencoders import ReconstructionModel


@torch.no_grad()
def evaluate_reconstruction(
    model: ReconstructionModel, batches: Iterable[torch.Tensor], quantize: bool = True
) -> dict[str, float]:
    """
    Mean PSNR (dB) and SSIM over pictures, and H_n, P_n and the share of dead entries if the model has codebooks.

    Args:
        model ([`ReconstructionModel`]): Evaluated in eval mode; its mode is restored.
        batches (iterable of `torch.Tensor` of shape `(B, 3, H, W)`): Pictures in [-1, 1].
        quantize (`bool`): `False` measures the model without its quantiser.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    totals, count, usage = {"psnr": 0.0, "ssim": 0.0}, 0, None
    for images in batches:
        images = images.to(device)
        output = model(images, quantize=quantize)
        pair = to_uint8(output.sample), to_uint8(images)
        totals["psnr"] += float(psnr(*pair).sum())
        totals["ssim"] += float(ssim(*pair).sum())
        count += len(images)
        if output.codes is not None:
            quantizer = model.autoencoder.quantizer
            usage = usage or CodebookUsage(quantizer.num_subspaces, quantizer.codebook_size)
            usage.update(output.codes)
    model.train(was_training)
    return {name: total / count for name, total in totals.items()} | (usage.compute() if usage else {})
