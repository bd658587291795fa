"""Pipelines of diffusers' families, made of components that run in milliseconds, on latents of any autoencoder."""

import string
from functools import cache

import torch
from conftest import tiny_unet
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from diffusers_pq.training.stable_diffusion import train_clip_tokenizer


# Of a prompt, in tokens.
LENGTH = 12
_UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
}


def tiny_kl(channels: int = 4) -> AutoencoderKL:
    """Of F=4, with a shift as Stable Diffusion 3's."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    sizes = {"block_out_channels": (4, 4, 8), "norm_num_groups": 4, "latent_channels": channels, "shift_factor": 0.1}
    return AutoencoderKL(**blocks, **sizes, sample_size=32).eval()


@cache
def tokenizer() -> CLIPTokenizer:
    return train_clip_tokenizer(["a red ladybug on a leaf", "a big blue bus"] * 3, 600, LENGTH)


def text_encoder(hidden_size: int = 16, projection_dim: int | None = None) -> CLIPTextModel:
    sizes = {"hidden_size": hidden_size, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = tokenizer()
    marks = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    config = CLIPTextConfig(**sizes, **marks, vocab_size=len(words), max_position_embeddings=LENGTH)
    if projection_dim is None:
        return CLIPTextModel(config).eval()
    config.projection_dim = projection_dim
    return CLIPTextModelWithProjection(config).eval()


def stable_diffusion(vae, channels: int) -> dict:
    """Components of a `StableDiffusionPipeline`."""
    torch.manual_seed(0)
    return {
        "vae": vae,
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "unet": tiny_unet(channels).eval(),
        "scheduler": DDPMScheduler(clip_sample=False, beta_schedule="scaled_linear", steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def stable_diffusion_xl(vae, channels: int) -> dict:
    """Components of a `StableDiffusionXLPipeline`."""
    torch.manual_seed(0)
    sizes = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + 12}
    sizes |= {"cross_attention_dim": 16 + 8, "in_channels": channels, "out_channels": channels}
    return {
        "vae": vae,
        "text_encoder": text_encoder(),
        "text_encoder_2": text_encoder(8, projection_dim=12),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "unet": UNet2DConditionModel(**_UNET, **sizes, addition_embed_type="text_time").eval(),
        "scheduler": DDPMScheduler(clip_sample=False, beta_schedule="scaled_linear", steps_offset=1),
    }


def stable_diffusion_3(vae, channels: int) -> dict:
    """Components of a `StableDiffusion3Pipeline`."""
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
    sizes |= {"in_channels": channels, "out_channels": channels, "sample_size": 8, "pos_embed_max_size": 32}
    letters = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    letters += [(letter, -1.0) for letter in ["▁", *string.ascii_lowercase]]
    t5 = T5Config(vocab_size=len(letters), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return {
        "vae": vae,
        "text_encoder": text_encoder(16, projection_dim=16),
        "text_encoder_2": text_encoder(8, projection_dim=8),
        "text_encoder_3": T5EncoderModel(t5).eval(),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "tokenizer_3": T5Tokenizer(vocab=letters, extra_ids=0),
        "transformer": SD3Transformer2DModel(**sizes, joint_attention_dim=32, pooled_projection_dim=24).eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
