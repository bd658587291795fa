"""A prior over codes as an entropy model: how many bits pictures take under it."""

import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from ..data.pictures import Crops
from ..models.autoencoder_pq import PQModel
from ..models.masked_transformer import PQMaskedTransformer
from ..pipelines.pipeline_masked_pq import MaskedPQPipeline


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
    of single codes would need. A coder would need the same floating-point results on every machine.

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

    Raises:
        ImportError: if the coder's library is not installed.
    """
    from ..compression import pack_codes  # which needs the library of `diffusers_pq[compress]`

    size = tuple(side * vae.downsampling_factor for side in (codes.shape[-1], codes.shape[-2]))
    masked = code_length(transformer, codes, condition, num_steps, generator).sum()
    adaptive = sum(8 * len(pack_codes(vae, picture[None], size)) for picture in codes)
    return {
        "masked": float(masked) / codes.numel(),
        "adaptive": adaptive / codes.numel(),
        "uniform": math.log2(vae.config.codebook_size),
    }


def bits_per_code_of_files(
    pipeline: MaskedPQPipeline,
    paths: Sequence[Path],
    class_label: int | str | None = None,
    prompt: str | None = None,
    num_steps: int = 32,
    seed: int = 0,
    batch_size: int = 16,
) -> dict[str, float]:
    """
    [`bits_per_code`] of pictures in files, their middle at the size of the pipeline's training.

    Args:
        pipeline ([`MaskedPQPipeline`])
        paths (`Sequence[Path]`)
        class_label (`int` or `str`, *optional*): Of all pictures; default: no class.
        prompt (`str`, *optional*): Of all pictures; default: no text.
        num_steps (`int`): See [`code_length`].
        seed (`int`): Of the order in which codes are revealed.
        batch_size (`int`): Pictures at once.

    Raises:
        BadImageError: if a picture cannot be read.
        ValueError: if the condition is not what the pipeline takes.
    """
    device = pipeline.transformer.device
    resolution = pipeline.transformer.config.sample_size * pipeline.vae.downsampling_factor
    crops = Crops.middle("image", resolution)
    generator = torch.Generator().manual_seed(seed)
    condition = pipeline.encode_condition(prompt, class_label)
    totals = {}
    for start in range(0, len(paths), batch_size):
        chosen = paths[start : start + batch_size]
        rows = ({"image": {"path": str(path), "bytes": None}} for path in chosen)
        pictures = torch.cat([crops(row, random.Random(0)) for row in rows])
        with torch.no_grad():
            codes = pipeline.vae.encode_codes(pictures.to(device, pipeline.vae.dtype))
        same = {name: value.expand(len(chosen), *value.shape[1:]) for name, value in condition.items()}
        bits = bits_per_code(pipeline.vae, pipeline.transformer, codes, same, num_steps, generator)
        for name, value in bits.items():
            totals[name] = totals.get(name, 0.0) + value * len(chosen)
    return {name: total / len(paths) for name, total in totals.items()}
