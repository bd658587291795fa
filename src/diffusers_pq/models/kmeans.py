"""Codebooks fitted to latents: k-means in every subspace, and the rotation of OPQ."""

import torch

from .quantizer import ProductQuantizer
from .search import nearest_codes


@torch.no_grad()
def kmeans_codebooks(quantizer: ProductQuantizer, latents: torch.Tensor, iterations: int = 10, start: str = "random"):
    """
    Set the codebooks to k-means centres of latents, in every subspace at once.

    Args:
        quantizer ([`ProductQuantizer`]): Changed in place.
        latents (`torch.Tensor` of shape `(B, d, h, w)`): At least K latent pixels.
        iterations (`int`): Lloyd iterations. An entry that loses all its vectors restarts at a random one.
        start (`str`): `"random"` vectors, or the codebooks as they are (`"codebooks"`).

    Raises:
        ValueError: if there are fewer latent pixels than codebook entries.
    """
    # [S, N, d/S], and [1, S, d/S, N] for the search
    vectors = quantizer.sub_vectors(latents).permute(1, 0, 3, 2).flatten(1, 2)
    columns = vectors.transpose(1, 2)[None].contiguous()
    subspaces, count, dimension = vectors.shape
    size = quantizer.codebook_size
    if count < size:
        raise ValueError(f"k-means needs at least codebook_size = {size} latent pixels, but was given {count}.")

    def random_vectors():
        picked = torch.rand(subspaces, count, device=vectors.device).argsort(-1)[:, :size]
        return vectors.gather(1, picked.unsqueeze(-1).expand(-1, -1, dimension))

    centres = random_vectors() if start == "random" else quantizer.entries.detach().clone()
    for _ in range(iterations):
        codes = nearest_codes(columns, centres)[0]
        members = torch.zeros(subspaces, size, device=vectors.device).scatter_add_(
            1, codes, torch.ones_like(codes, dtype=torch.float32)
        )
        sums = torch.zeros_like(centres).scatter_add_(1, codes.unsqueeze(-1).expand(-1, -1, dimension), vectors)
        means = sums / members.clamp(min=1).unsqueeze(-1)
        centres = torch.where(members.unsqueeze(-1) > 0, means, random_vectors())
    quantizer.codebooks.copy_(centres)


def balanced_order(count: int, num_subspaces: int) -> torch.LongTensor:
    """
    An order of components, the largest first, that deals them out to subspaces of consecutive channels so that all
    have about as much to tell: subspace s gets the components s, 2S-1-s, 2S+s, ...
    """
    order = torch.arange(count).view(-1, num_subspaces)
    order[1::2] = order[1::2].flip(1)
    return order.T.flatten()


@torch.no_grad()
def fit_rotation(quantizer: ProductQuantizer, vectors: torch.Tensor, iterations: int = 20) -> torch.Tensor:
    """
    The rotation of latents after which their subspaces quantise best (OPQ; Ge et al., 2013): codebooks and rotation
    are fitted in turn, the latter in closed form, from the principal components on.

    Args:
        quantizer ([`ProductQuantizer`]): Gets the codebooks of the rotated latents.
        vectors (`torch.Tensor` of shape `(N, d)`): Latent pixels, at least K.
        iterations (`int`): Of rotation and two Lloyd iterations.

    Returns:
        `torch.Tensor` of shape `(d, d)`: R, orthogonal; `vectors @ R` are the rotated latents.
    """
    vectors = vectors.double()
    directions = torch.linalg.eigh(torch.cov(vectors.T)).eigenvectors.flip(1)
    order = balanced_order(len(directions), quantizer.num_subspaces).to(vectors.device)
    rotation, start = directions[:, order], "random"
    for _ in range(iterations):
        rotated = as_latents(vectors @ rotation)
        kmeans_codebooks(quantizer, rotated, iterations=2, start=start)
        quantized = quantizer.eval()(rotated).latents[0, :, :, 0].T.double()
        # Orthogonal Procrustes: of all R the one with the smallest |vectors R - quantized|.
        left, _, right = torch.linalg.svd(vectors.T @ quantized)
        rotation, start = left @ right, "codebooks"
    return rotation.float()


def as_latents(vectors: torch.Tensor) -> torch.Tensor:
    """Latent pixels `(N, d)` as latents `(1, d, N, 1)`, float32."""
    return vectors.T.float()[None, :, :, None].contiguous()
