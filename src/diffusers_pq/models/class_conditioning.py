"""Class-conditional denoisers made of diffusers' models: the UNet of LDM's ImageNet models, and DiT."""

import inspect

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, SchedulerMixin, UNet2DConditionModel


DENOISERS = {"UNet2DConditionModel": UNet2DConditionModel, "DiTTransformer2DModel": DiTTransformer2DModel}


def create_class_conditional_denoiser(
    config: dict, latent_channels: int, sample_size: int, num_classes: int
) -> UNet2DConditionModel | DiTTransformer2DModel:
    """
    A fresh denoiser.

    A `UNet2DConditionModel` attends to one token, a learned embedding of the class (LDM, Rombach et al., 2022): its
    `encoder_hid_proj` multiplies one-hot labels. A `DiTTransformer2DModel` (Peebles & Xie, 2023) is initialised as its
    paper says. Both have a further class, the last, that stands for no class.

    Args:
        config (`dict`): Of the model, with its `_class_name`; what the other arguments say is filled in.
        latent_channels (`int`): d.
        sample_size (`int`): Side of the latents, in latent pixels.
        num_classes (`int`): Without the one that stands for none.

    Raises:
        ValueError: if the class is another, or the config contradicts an argument.
    """
    name = config.get("_class_name")
    if name not in DENOISERS:
        raise ValueError(f"A denoiser's config must name a `_class_name` out of {', '.join(DENOISERS)}, not {name!r}.")
    filled_in = {"in_channels": latent_channels, "out_channels": latent_channels, "sample_size": sample_size}
    if name == "UNet2DConditionModel":
        filled_in |= {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": num_classes + 1}
    else:
        filled_in |= {"num_embeds_ada_norm": num_classes}
    for key, value in filled_in.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"`{key}` is {config[key]} in the denoiser's config, but latents or classes ask for {value}. Leave it "
                "out of the config."
            )
    denoiser = DENOISERS[name].from_config(config | filled_in)
    if name == "UNet2DConditionModel":
        nn.init.normal_(denoiser.encoder_hid_proj.weight)  # the rows of an `nn.Embedding`
        nn.init.zeros_(denoiser.encoder_hid_proj.bias)
    else:
        _init_dit(denoiser)
    return denoiser


@torch.no_grad()
def _init_dit(transformer: DiTTransformer2DModel):
    """DiT's own start, adaLN-Zero: every block begins as the identity. diffusers, which only runs DiT, has torch's."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    patches = transformer.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.flatten(1))
    nn.init.zeros_(patches.bias)
    for block in transformer.transformer_blocks:
        nn.init.normal_(block.norm1.emb.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(block.norm1.emb.timestep_embedder.linear_2.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    nn.init.zeros_(transformer.proj_out_1.weight)
    nn.init.zeros_(transformer.proj_out_2.weight)


def num_classes(denoiser: nn.Module) -> int:
    """
    Classes of a denoiser, without the one that stands for none.

    Raises:
        ValueError: if it takes no class labels.
    """
    config = denoiser.config
    if config.get("encoder_hid_dim_type") == "text_proj":
        return config.encoder_hid_dim - 1
    if "num_embeds_ada_norm" in config:
        return config.num_embeds_ada_norm
    raise ValueError(
        f"This {type(denoiser).__name__} takes no class labels; `create_class_conditional_denoiser` does."
    )


def predict(
    denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, labels: torch.LongTensor
) -> torch.Tensor:
    """The prediction `[B, d, h, w]` for noisy latents at timesteps `[B]`, given labels `[B]` in [0, num_classes]."""
    if "encoder_hid_dim" in denoiser.config:
        one_hot = F.one_hot(labels, denoiser.config.encoder_hid_dim).to(noisy.dtype)
        return denoiser(noisy, timesteps, one_hot.unsqueeze(1)).sample
    return denoiser(noisy, timestep=timesteps, class_labels=labels).sample


def predicts_sample(scheduler: SchedulerMixin) -> bool:
    """Whether a denoiser is trained to predict the latents without noise."""
    return scheduler.config.get("prediction_type") == "sample"


def scheduler_input(
    scheduler: SchedulerMixin, prediction: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """
    A denoiser's prediction as the `step` of its scheduler wants it. Those of diffusion take each `prediction_type`;
    those of flow matching know none and take velocities only, (x_t - x) / sigma.
    """
    knows_types = "prediction_type" in inspect.signature(type(scheduler).__init__).parameters
    if knows_types or not predicts_sample(scheduler):
        return prediction
    return (noisy - prediction) / (timestep / scheduler.config.num_train_timesteps)


def token_dimension(denoiser: nn.Module) -> tuple[int, int]:
    """Values of the latents that a denoiser's first layer sees at one place, and its width there."""
    config = denoiser.config
    if "patch_size" in config:
        return config.in_channels * config.patch_size**2, config.num_attention_heads * config.attention_head_dim
    return config.in_channels, config.block_out_channels[0]
