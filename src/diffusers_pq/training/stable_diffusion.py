"""Untrained Stable Diffusion pipelines of any size, for data sets too small or too special for a pretrained one."""

from collections.abc import Iterable

import torch.nn as nn
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..models.autoencoder_pq import PQModel


_START, _END = "<|startoftext|>", "<|endoftext|>"


def train_clip_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """
    A tokenizer of CLIP's kind (lower case, byte-pair encoding with end-of-word marks) fitted to captions.

    Args:
        captions: Texts to fit it to.
        vocab_size (`int`):
            At most so many tokens; at least the 256 single bytes, two marks and the ends of the captions' words.
        max_length (`int`): Tokens of a prompt, the two marks included.
    """
    blank = CLIPTokenizer(vocab={_START: 0, _END: 1}, merges=[])
    trained = blank.train_new_from_iterator(captions, vocab_size)
    trained.model_max_length = max_length
    return trained


def create_stable_diffusion(
    vae: nn.Module, tokenizer: CLIPTokenizer, unet_config: dict, text_encoder_config: dict, prediction_type: str
) -> StableDiffusionPipeline:
    """
    A Stable Diffusion pipeline with fresh weights around a trained autoencoder.

    Args:
        vae: An `AutoencoderKL` or [`PQModel`].
        tokenizer (`CLIPTokenizer`)
        unet_config, text_encoder_config (`dict`): Of `UNet2DConditionModel` and `CLIPTextConfig`; channels, prompt
            embedding and vocabulary are filled in.
        prediction_type (`str`): `"epsilon"` or `"v_prediction"`.
    """
    text_config = CLIPTextConfig(
        **text_encoder_config,
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    channels = vae.config.latent_channels
    unet = UNet2DConditionModel(
        **unet_config, in_channels=channels, out_channels=channels, cross_attention_dim=text_config.hidden_size
    )
    # Stable Diffusion's schedule.
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDPMScheduler(**betas, clip_sample=False, steps_offset=1, prediction_type=prediction_type)
    if isinstance(vae, PQModel):
        from ..pipelines.pipeline_stable_diffusion_pq import StableDiffusionPQPipeline as pipeline_class
    else:
        pipeline_class = StableDiffusionPipeline
    text_encoder = CLIPTextModel(text_config)
    return pipeline_class(vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
