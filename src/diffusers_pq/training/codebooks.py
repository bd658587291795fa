"""Remedies against codebooks that are hardly used. The paper does without; all are off unless asked for."""

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from ..models.quantizer import ProductQuantizer


def entry_counts(codes: torch.LongTensor, codebook_size: int) -> torch.Tensor:
    """How often codes `[B, S, h, w]` name each entry, as float32 `[S, K]`."""
    flat = codes.transpose(0, 1).flatten(1)
    counts = torch.zeros(len(flat), codebook_size, device=codes.device)
    return counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=counts.dtype))


def entry_sums(vectors: torch.Tensor, codes: torch.LongTensor, codebook_size: int) -> torch.Tensor:
    """Sums `[S, K, d/S]` of the sub-vectors `[B, S, d/S, h*w]` that codes `[B, S, h, w]` assign to each entry."""
    rows = vectors.permute(1, 0, 3, 2).flatten(1, 2)
    flat = codes.transpose(0, 1).flatten(1).unsqueeze(-1).expand_as(rows)
    sums = torch.zeros(len(rows), codebook_size, rows.shape[-1], device=rows.device)
    return sums.scatter_add_(1, flat, rows)


class EMACodebooks:
    """
    Moves each entry to the running mean of the sub-vectors it is nearest to, instead of by gradients (van den Oord et
    al., 2017, appendix A.1).

    Args:
        quantizer ([`ProductQuantizer`]): Its codebooks no longer require gradients.
        accelerator (`Accelerator`): Sums over processes.
        decay (`float`): Of the running means, in (0, 1).
    """

    def __init__(self, quantizer: ProductQuantizer, accelerator: Accelerator, decay: float = 0.99):
        quantizer.codebooks.requires_grad_(False)
        self.quantizer = quantizer
        self.accelerator = accelerator
        self.decay = decay
        self.sums = torch.zeros_like(quantizer.codebooks)
        self.counts = torch.zeros_like(self.sums[..., 0])
        self._new_sums, self._new_counts = torch.zeros_like(self.sums), torch.zeros_like(self.counts)
        self.restart(torch.ones_like(self.counts, dtype=torch.bool))

    @torch.no_grad()
    def restart(self, which: torch.Tensor):
        """Start the means of the entries marked in a boolean `[S, K]` from the entries as they are, as one vector."""
        self.sums[which] = self.quantizer.entries[which]
        self.counts[which] = 1.0

    @torch.no_grad()
    def observe(self, latents: torch.Tensor, codes: torch.LongTensor):
        """Take in z_e `[B, d, h, w]` and its codes, for the next [`step`]."""
        self._new_sums += entry_sums(self.quantizer.sub_vectors(latents), codes, self.quantizer.codebook_size)
        self._new_counts += entry_counts(codes, self.quantizer.codebook_size)

    @torch.no_grad()
    def step(self):
        """
        Move the codebooks, unless a latent was not finite. An entry that has not been named for thousands of steps
        stays where it is.
        """
        sums = self.accelerator.reduce(self._new_sums)
        counts = self.accelerator.reduce(self._new_counts)
        self._new_sums.zero_()
        self._new_counts.zero_()
        if not sums.isfinite().all():
            return
        self.sums.lerp_(sums, 1 - self.decay)
        self.counts.lerp_(counts, 1 - self.decay)
        # Both decay alike, so the mean of an unnamed entry stays the same until its count vanishes.
        moves = (self.counts > 1e-9).unsqueeze(-1)
        means = self.sums / self.counts.clamp(min=1e-9).unsqueeze(-1)
        self.quantizer.codebooks.copy_(torch.where(moves, means, self.quantizer.codebooks))

    def state_dict(self) -> dict:
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: dict):
        self.sums.copy_(state["sums"])
        self.counts.copy_(state["counts"])


class DeadEntryReseeder:
    """
    Every so many steps, moves the entries that were never used in them to random sub-vectors (Dhariwal et al., 2020).

    Args:
        quantizer ([`ProductQuantizer`])
        accelerator (`Accelerator`): Sums over processes.
        every (`int`): Steps between two reseedings.
    """

    def __init__(self, quantizer: ProductQuantizer, accelerator: Accelerator, every: int):
        self.quantizer = quantizer
        self.accelerator = accelerator
        self.every = every
        self.counts = torch.zeros_like(quantizer.codebooks[..., 0])
        self.steps = 0
        self._latents = None

    @torch.no_grad()
    def observe(self, latents: torch.Tensor, codes: torch.LongTensor):
        """Count codes, and keep z_e `[B, d, h, w]` as the source of new entries."""
        self.counts += entry_counts(codes, self.quantizer.codebook_size)
        self._latents = latents

    @torch.no_grad()
    def step(self) -> torch.Tensor | None:
        """Count a step with codes, and reseed if it is time: then returns the reseeded entries, a boolean `[S, K]`."""
        if self._latents is None:  # nothing has been quantised yet
            return None
        self.steps += 1
        if self.steps % self.every:
            return None
        dead = self.accelerator.reduce(self.counts) == 0
        # [S, N, d/S]; every process draws, all take the draw of the first
        vectors = self.quantizer.sub_vectors(self._latents).permute(1, 0, 3, 2).flatten(1, 2)
        drawn = torch.randint(vectors.shape[1], dead.shape, device=vectors.device)
        fresh = vectors.gather(1, drawn.unsqueeze(-1).expand(-1, -1, vectors.shape[-1]))
        fresh = broadcast(fresh.contiguous())
        self.quantizer.codebooks.copy_(torch.where(dead.unsqueeze(-1), fresh, self.quantizer.codebooks))
        self.counts.zero_()
        return dead

    def state_dict(self) -> dict:
        """To be called by all processes, each of which has counted its own codes."""
        return {"counts": self.accelerator.reduce(self.counts), "steps": self.steps}

    def load_state_dict(self, state: dict):
        self.counts.copy_(state["counts"] if self.accelerator.is_main_process else torch.zeros_like(self.counts))
        self.steps = state["steps"]
