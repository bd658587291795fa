"""Metrics of reconstructions (section 4.1) and of codebook use (Eq. 3)."""

import torch
from torchmetrics.functional.image import structural_similarity_index_measure


def psnr(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """
    PSNR in dB of every picture, for pictures of the range 0 ... 255.

    Args:
        images, references (`torch.Tensor` of shape `(B, 3, H, W)`, uint8): See [`~diffusers_pq.images.to_uint8`].

    Returns:
        `torch.Tensor` of shape `(B,)`; infinite for identical pictures.
    """
    error = (images.double() - references.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(255.0**2 / error)


def ssim(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """SSIM (torchmetrics: 11 x 11 Gaussian window) of every picture of two uint8 batches `[B, 3, H, W]`, as `[B]`."""
    return structural_similarity_index_measure(images.float(), references.float(), data_range=255.0, reduction="none")


class CodebookUsage:
    """
    Counts codes and gives the utilisation of Eq. 3, averaged over the S codebooks.

    Args:
        num_subspaces (`int`): S.
        codebook_size (`int`): K.
    """

    def __init__(self, num_subspaces: int, codebook_size: int):
        self.counts = torch.zeros(num_subspaces, codebook_size, dtype=torch.long)

    def update(self, codes: torch.LongTensor):
        """Add codes of shape `[B, S, h, w]`."""
        subspaces, size = self.counts.shape
        flat = codes.transpose(0, 1).reshape(subspaces, -1).cpu()
        offsets = torch.arange(subspaces).unsqueeze(1) * size
        self.counts += torch.bincount((flat + offsets).flatten(), minlength=subspaces * size).view(subspaces, size)

    def compute(self) -> dict[str, float]:
        """
        `H_n` (entropy over log K) and `P_n` (perplexity over K), both in [0, 1], and `dead`, the share of entries that
        were never used.

        Raises:
            ValueError: if no code was counted.
        """
        if not self.counts.any():
            raise ValueError("No codes were counted: call `update` first.")
        probabilities = self.counts.double() / self.counts.sum(1, keepdim=True)
        entropy = -torch.special.xlogy(probabilities, probabilities).sum(1)
        size = torch.tensor(self.counts.shape[1], dtype=torch.double)
        return {
            "H_n": float((entropy / size.log()).mean()),
            "P_n": float((entropy.exp() / size).mean()),
            "dead": float((self.counts == 0).double().mean()),
        }
