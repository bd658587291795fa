"""A prior over codes as an entropy model: how many bits pictures take under it."""

import math

import torch

from ..compression import pack_codes
from ..models.autoencoder_pq import PQModel
from ..models.masked_transformer import PQMaskedTransformer


@torch.no_grad()
def code_length(
    transformer: PQMaskedTransformer,
    codes: torch.LongTensor,
    condition: dict[str, torch.Tensor],
    num_steps: int = 32,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    An estimate of the bits that each picture's codes take under a masked transformer: codes are revealed in a random
    order, as many a step as the cosine schedule of generation reveals, and each costs -log2 of its probability given
    those of earlier steps. The codes of one step are taken as independent, so more steps come closer to what a coder
    of single codes would need. No coder is at hand whose floating-point results would be the same on every machine.

    Args:
        transformer ([`PQMaskedTransformer`]): In eval mode.
        codes (`torch.LongTensor` of shape `(B, S, h, w)`)
        condition (`dict`): Of `transformer.forward`: `class_labels`, or `encoder_hidden_states` and their mask.
        num_steps (`int`): T >= 1.
        generator (`torch.Generator`, *optional*): Of the order, on the CPU.

    Returns:
        `torch.Tensor` of shape `(B,)`, float64: bits.

    Raises:
        ValueError: if `num_steps` is less than 1.
    """
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1, but is {num_steps}.")
    total = codes[0].numel()
    ranks = torch.rand(len(codes), total, generator=generator).argsort(1).argsort(1).view(codes.shape).to(codes.device)
    bits = torch.zeros(len(codes), dtype=torch.float64, device=codes.device)
    known = 0
    for step in range(num_steps):
        hidden = math.floor(total * math.cos(math.pi / 2 * (step + 1) / num_steps)) if step < num_steps - 1 else 0
        until = min(total, max(known + 1, total - hidden))
        if until == known:
            continue
        logits = transformer(codes, ranks >= known, **condition).logits
        entropies = -logits.double().log_softmax(2).gather(2, codes.unsqueeze(2)).squeeze(2) / math.log(2)
        revealed = (ranks >= known) & (ranks < until)
        bits += (entropies * revealed).flatten(1).sum(1)
        known = until
    return bits


def bits_per_code(
    vae: PQModel,
    transformer: PQMaskedTransformer,
    codes: torch.LongTensor,
    condition: dict[str, torch.Tensor],
    num_steps: int = 32,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """
    Bits per code of pictures under a masked transformer, beside those that coders without one take.

    Args:
        vae ([`PQModel`]): Whose codes they are.
        transformer, codes, condition, num_steps, generator: See [`code_length`].

    Returns:
        `dict[str, float]`: `masked`, the estimate of [`code_length`]; `adaptive`, what `diffusers-pq compress` writes
        for the pictures, header included; `uniform`, log2 K.
    """
    size = tuple(side * vae.downsampling_factor for side in (codes.shape[-1], codes.shape[-2]))
    masked = code_length(transformer, codes, condition, num_steps, generator).sum()
    adaptive = sum(8 * len(pack_codes(vae, picture[None], size)) for picture in codes)
    return {
        "masked": float(masked) / codes.numel(),
        "adaptive": adaptive / codes.numel(),
        "uniform": math.log2(vae.config.codebook_size),
    }
