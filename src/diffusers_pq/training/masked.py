"""Training of masked transformers on product codes: which codes are hidden, and what guessing them costs."""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..models.autoencoder_pq import PQModel
from ..models.masked_transformer import PQMaskedTransformer


def draw_masks(shape: tuple[int, ...], generator: torch.Generator | None = None, device=None) -> torch.BoolTensor:
    """
    Hide a random share of each picture's codes, at least one: cos(pi/2 u) of them with u uniform in [0, 1), as MaskGIT
    (Chang et al., 2022, section 3.3) draws the share. Any code of any place may be hidden, whatever happens to the
    others there.

    Args:
        shape (`tuple[int]`): `(B, S, h, w)`, of the codes.
        generator (`torch.Generator`, *optional*): On the CPU or on `device`.
        device (*optional*): Of the masks.
    """
    source = generator.device if generator is not None else device
    shares = torch.cos(math.pi / 2 * torch.rand(shape[0], 1, generator=generator, device=source))
    places = torch.rand(shape[0], math.prod(shape[1:]), generator=generator, device=source)
    hidden = (shares * places.shape[1]).ceil()
    return (places.argsort(1).argsort(1) < hidden).view(shape).to(device)


class MaskedCodePredictor(nn.Module):
    """
    A masked transformer and, where it is told texts, their encoder: one forward for DDP and the like.

    Args:
        transformer ([`PQMaskedTransformer`])
        text_encoder (`CLIPTextModel`, *optional*): Not trained unless `train_text_encoder`.
        train_text_encoder (`bool`)
    """

    def __init__(
        self, transformer: PQMaskedTransformer, text_encoder: nn.Module | None = None, train_text_encoder: bool = False
    ):
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder
        if text_encoder is not None:
            text_encoder.requires_grad_(train_text_encoder)

    def forward(self, codes: torch.LongTensor, mask: torch.BoolTensor, condition: torch.LongTensor) -> torch.Tensor:
        """Logits `[B, S, K, h, w]`; `condition` holds labels `[B]` or the token ids `[B, L]` of texts."""
        if self.text_encoder is None:
            return self.transformer(codes, mask, class_labels=condition).logits
        states = self.text_encoder(condition).last_hidden_state
        return self.transformer(codes, mask, encoder_hidden_states=states).logits

    def learned_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


@dataclass
class MaskedObjective:
    """
    What is learned from a batch: to guess hidden codes. Its siblings are the denoising objectives.

    Args:
        vae ([`PQModel`]): Encodes pictures where a batch holds no codes.
        label_smoothing (`float`): Of the cross-entropy, in [0, 1).
    """

    vae: PQModel
    label_smoothing: float = 0.0

    @torch.no_grad()
    def inputs(self, batch: dict[str, torch.Tensor]) -> torch.LongTensor:
        """The codes `[B, S, h, w]` of a batch with `codes` or `pixel_values`."""
        if "codes" in batch:
            return batch["codes"].to(self.vae.device)
        return self.vae.encode_codes(batch["pixel_values"].to(self.vae.device, self.vae.dtype))

    def losses(
        self,
        model: nn.Module,
        codes: torch.LongTensor,
        condition: torch.LongTensor,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """The mean cross-entropy of each picture's hidden codes, in nats: `[B]`."""
        mask = draw_masks(codes.shape, generator, codes.device)
        logits = model(codes, mask, condition).float().movedim(2, 1)
        entropies = F.cross_entropy(logits, codes, reduction="none", label_smoothing=self.label_smoothing)
        return (entropies * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)
