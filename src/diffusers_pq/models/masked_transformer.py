"""A masked transformer over product codes: generation from the indices themselves."""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, HunyuanAttnProcessor2_0
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_rotary_pos_embed
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from .auto_class import AutoModelMixin
from .quantizer import ProductQuantizer


_FRACTION_FREQUENCIES = 64


@dataclass
class PQMaskedTransformerOutput(BaseOutput):
    """
    Output of [`PQMaskedTransformer`].

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_subspaces, codebook_size, height, width)`):
            Unnormalised log-probabilities of the entries of each code, masked or not.
    """

    logits: torch.Tensor


class PQMaskedTransformer(AutoModelMixin, ModelMixin, ConfigMixin):
    r"""
    Predicts masked product codes from those that are known: a bidirectional transformer over the h w latent pixels, as
    in MaskGIT (Chang et al., 2022), whose tokens are the S codes of a pixel together.

    Each subspace has its own table of K embeddings. The embeddings of a pixel's S codes, or of the mask, are joined
    and projected to the width of the transformer; at its end a pixel's features are projected to S queries, whose
    products with the same tables are the logits. Parameters and operations of both ends grow with S K and never with
    K^S, the number of joint indices that the paper names as the obstacle (section 5); the blocks between do not depend
    on S.

    Parameters:
        num_subspaces (`int`, *optional*, defaults to 64): S.
        codebook_size (`int`, *optional*, defaults to 128): K.
        sample_size (`int`, *optional*, defaults to 16): Side of the latents it was trained on; any other works, too.
        code_embed_dim (`int`, *optional*, defaults to 32): Length of a code's embedding.
        num_layers (`int`, *optional*, defaults to 24): Transformer blocks.
        num_attention_heads (`int`, *optional*, defaults to 16): Attention heads.
        attention_head_dim (`int`, *optional*, defaults to 64): Channels of a head, a multiple of 4.
        num_classes (`int`, *optional*): Classes of a class-conditional model, without the one that stands for none.
        cross_attention_dim (`int`, *optional*): Channels of the text states of a text-conditional model.

    Raises:
        ValueError: if a size is out of range, or both or neither of `num_classes` and `cross_attention_dim` are given.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MaskedTransformerBlock"]
    _repeated_blocks = ["MaskedTransformerBlock"]
    _skip_layerwise_casting_patterns = ["code_embeddings", "mask_embeddings", "norm"]

    @register_to_config
    def __init__(
        self,
        num_subspaces: int = 64,
        codebook_size: int = 128,
        sample_size: int = 16,
        code_embed_dim: int = 32,
        num_layers: int = 24,
        num_attention_heads: int = 16,
        attention_head_dim: int = 64,
        num_classes: int | None = None,
        cross_attention_dim: int | None = None,
    ):
        super().__init__()
        sizes = {"num_subspaces": num_subspaces, "sample_size": sample_size, "code_embed_dim": code_embed_dim}
        sizes |= {"num_layers": num_layers, "num_attention_heads": num_attention_heads}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {value}.")
        if codebook_size < 2:
            raise ValueError(f"`codebook_size` must be at least 2, but is {codebook_size}.")
        if attention_head_dim < 4 or attention_head_dim % 4:
            # Half of a head's channels turn with the row, half with the column, in pairs.
            raise ValueError(f"`attention_head_dim` must be a positive multiple of 4, but is {attention_head_dim}.")
        if (num_classes is None) == (cross_attention_dim is None):
            raise ValueError(
                f"Give exactly one of `num_classes` and `cross_attention_dim`, not {num_classes} and "
                f"{cross_attention_dim}: the model is told a class or a text."
            )
        width = num_attention_heads * attention_head_dim
        self.code_embeddings = nn.Parameter(torch.randn(num_subspaces, codebook_size, code_embed_dim))
        self.mask_embeddings = nn.Parameter(0.02 * torch.randn(num_subspaces, code_embed_dim))
        self.proj_in = nn.Linear(num_subspaces * code_embed_dim, width)
        # The share of masked codes: what the timestep is to a denoiser.
        self.fraction_proj = Timesteps(_FRACTION_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.fraction_embedding = TimestepEmbedding(_FRACTION_FREQUENCIES, width)
        self.class_embedding = None if num_classes is None else nn.Embedding(num_classes + 1, width)
        # adaLN-single (PixArt-alpha, Chen et al., 2024): one projection for all blocks, an own offset for each.
        self.modulation = nn.Linear(width, 6 * width)
        self.transformer_blocks = nn.ModuleList(
            MaskedTransformerBlock(width, num_attention_heads, attention_head_dim, cross_attention_dim)
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, num_subspaces * code_embed_dim)
        self.logits_bias = nn.Parameter(torch.zeros(num_subspaces, codebook_size))
        self.gradient_checkpointing = False
        self._init_weights()

    def _init_weights(self):
        # adaLN-Zero (Peebles & Xie, 2023): each block begins as the identity, the logits begin at 0.
        for layer in (self.modulation, self.modulation_out, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.class_embedding is not None:
            nn.init.normal_(self.class_embedding.weight, std=0.02)

    @torch.no_grad()
    def init_code_embeddings(self, quantizer: ProductQuantizer, generator: torch.Generator | None = None):
        """
        Start the tables of codes from codebooks, so that near entries have near embeddings: random Fourier features
        (Rahimi & Recht, 2007) of the entries, from one turn over a subspace's spread to one between neighbours.

        Args:
            quantizer ([`ProductQuantizer`]): With the same S and K.
            generator (`torch.Generator`, *optional*): Of the frequencies, on the CPU.

        Raises:
            ValueError: if S or K are not those of this model.
        """
        own, other = self.code_embeddings.shape[:2], quantizer.codebooks.shape[:2]
        if own != other:
            raise ValueError(
                f"`quantizer` has S = {other[0]} and K = {other[1]}, but this model S = {own[0]} and K = {own[1]}."
            )
        entries = quantizer.entries.detach().float().cpu()
        entries = (entries - entries.mean(1, keepdim=True)) / entries.std(1, keepdim=True).clamp(min=1e-6)
        subspaces, size, dimension = entries.shape
        features = self.code_embeddings.shape[-1]
        # K entries in m dimensions lie about K^(-1/m) of their spread apart.
        octaves = torch.rand(subspaces, 1, features, generator=generator)
        frequencies = torch.randn(subspaces, dimension, features, generator=generator) * size ** (octaves / dimension)
        phases = 2 * torch.pi * torch.rand(subspaces, 1, features, generator=generator)
        self.code_embeddings.copy_(2**0.5 * torch.cos(entries @ frequencies + phases))

    def forward(
        self,
        codes: torch.LongTensor,
        mask: torch.BoolTensor,
        class_labels: torch.LongTensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> PQMaskedTransformerOutput | tuple[torch.Tensor]:
        """
        Args:
            codes (`torch.LongTensor` of shape `(batch_size, num_subspaces, height, width)`): In `[0, codebook_size)`;
                masked ones may have any value.
            mask (`torch.BoolTensor` of the shape of `codes`): `True` where a code is hidden from the model.
            class_labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                In `[0, num_classes]`; the last stands for no class.
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, length, cross_attention_dim)`, *optional*):
                States of a text.
            encoder_attention_mask (`torch.Tensor` of shape `(batch_size, length)`, *optional*):
                1 for the states that are attended to, 0 for padding.
            return_dict (`bool`, *optional*, defaults to `True`): Output class or plain tuple.

        Returns:
            [`PQMaskedTransformerOutput`] or a tuple of its field.

        Raises:
            ValueError: if the codes or the mask have a wrong shape, or the condition is missing.
        """
        self._check_inputs(codes, mask, class_labels, encoder_hidden_states)
        height, width = codes.shape[-2:]
        hidden_states = self.proj_in(self._embed_codes(codes, mask))
        condition = self._embed_condition(mask, class_labels)
        modulation = self.modulation(F.silu(condition)).unflatten(1, (6, 1, -1))
        attention_mask = None
        if encoder_attention_mask is not None:
            attention_mask = (1 - encoder_attention_mask.to(self.dtype))[:, None, :] * torch.finfo(self.dtype).min
        rotary = get_2d_rotary_pos_embed(
            self.config.attention_head_dim, ((0, 0), (height, width)), (height, width), device=codes.device
        )
        for block in self.transformer_blocks:
            inputs = hidden_states, modulation, rotary, encoder_hidden_states, attention_mask
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, *inputs)
            else:
                hidden_states = block(*inputs)
        shift, scale = self.modulation_out(F.silu(condition)).unsqueeze(1).chunk(2, dim=-1)
        hidden_states = self.norm_out(hidden_states) * (1 + scale) + shift
        queries = self.proj_out(hidden_states).unflatten(2, (self.config.num_subspaces, -1))
        logits = torch.einsum("bpse,ske->bskp", queries, self.code_embeddings.to(queries.dtype))
        logits = (logits + self.logits_bias.unsqueeze(-1)).unflatten(-1, (height, width))
        if not return_dict:
            return (logits,)
        return PQMaskedTransformerOutput(logits=logits)

    def _embed_codes(self, codes: torch.LongTensor, mask: torch.BoolTensor) -> torch.Tensor:
        """`[B, h w, S e]`: the embeddings of a pixel's codes side by side."""
        subspaces, size, _ = self.code_embeddings.shape
        first = torch.arange(subspaces, device=codes.device).view(-1, 1, 1) * size
        known = codes.masked_fill(mask, 0) + first
        embeddings = F.embedding(known, self.code_embeddings.flatten(0, 1))  # [B, S, h, w, e]
        embeddings = torch.where(mask.unsqueeze(-1), self.mask_embeddings[:, None, None], embeddings)
        return embeddings.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2).to(self.dtype)

    def _embed_condition(self, mask: torch.BoolTensor, class_labels: torch.LongTensor | None) -> torch.Tensor:
        fraction = 1000 * mask.flatten(1).float().mean(1)
        condition = self.fraction_embedding(self.fraction_proj(fraction).to(self.dtype))
        return condition if self.class_embedding is None else condition + self.class_embedding(class_labels)

    def _check_inputs(self, codes, mask, class_labels, encoder_hidden_states):
        subspaces = self.config.num_subspaces
        if codes.is_floating_point() or codes.ndim != 4 or codes.shape[1] != subspaces:
            raise ValueError(
                f"`codes` must be integers of shape [batch, {subspaces}, height, width] (num_subspaces = "
                f"{subspaces}), but are {codes.dtype} of shape {list(codes.shape)}."
            )
        if mask.dtype != torch.bool or mask.shape != codes.shape:
            raise ValueError(
                f"`mask` must be of booleans and have the shape {list(codes.shape)} of `codes`, but is of "
                f"{mask.dtype} and has the shape {list(mask.shape)}."
            )
        if self.class_embedding is not None and class_labels is None:
            raise ValueError(f"`class_labels` are missing; {self.config.num_classes} stands for no class.")
        if self.class_embedding is None and encoder_hidden_states is None:
            raise ValueError("`encoder_hidden_states` are missing; those of an empty text stand for no text.")


class MaskedTransformerBlock(nn.Module):
    """
    Self-attention with 2-D rotary positions and normalised queries and keys, attention to a text where there is one,
    and a feed-forward layer; the first and the last modulated by the condition (adaLN).
    """

    def __init__(self, width: int, heads: int, head_dim: int, cross_attention_dim: int | None):
        super().__init__()
        attention = {"query_dim": width, "heads": heads, "dim_head": head_dim, "qk_norm": "rms_norm"}
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn1 = Attention(**attention, processor=HunyuanAttnProcessor2_0())
        self.norm2 = self.attn2 = None
        if cross_attention_dim is not None:
            self.norm2 = nn.LayerNorm(width)
            self.attn2 = Attention(
                **attention, cross_attention_dim=cross_attention_dim, processor=HunyuanAttnProcessor2_0()
            )
            nn.init.zeros_(self.attn2.to_out[0].weight)
            nn.init.zeros_(self.attn2.to_out[0].bias)
        self.norm3 = nn.LayerNorm(width, elementwise_affine=False)
        self.ff = FeedForward(width, activation_fn="gelu-approximate")
        self.modulation_offset = nn.Parameter(torch.zeros(6, 1, width))

    def forward(
        self,
        hidden_states: torch.Tensor,
        modulation: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        encoder_hidden_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """`hidden_states` `[B, h w, width]` to the same; `modulation` is `[B, 6, 1, width]`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.modulation_offset).unbind(1)
        normed = self.norm1(hidden_states) * (1 + scale1) + shift1
        hidden_states = hidden_states + gate1 * self.attn1(normed, image_rotary_emb=rotary)
        if self.attn2 is not None:
            hidden_states = hidden_states + self.attn2(
                self.norm2(hidden_states), encoder_hidden_states, attention_mask=attention_mask
            )
        normed = self.norm3(hidden_states) * (1 + scale2) + shift2
        return hidden_states + gate2 * self.ff(normed)
