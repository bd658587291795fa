"""The patch discriminator of VQGAN."""

import torch
import torch.nn as nn
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin


class PatchDiscriminator(ModelMixin, ConfigMixin):
    r"""
    PatchGAN discriminator (Isola et al., 2017) as VQGAN trains against: 4 x 4 convolutions, `num_layers` of them with
    stride 2, one logit for each overlapping patch. With the defaults a logit sees 70 x 70 pixels.

    Parameters:
        in_channels (`int`, *optional*, defaults to 3): Channels of the images.
        base_channels (`int`, *optional*, defaults to 64): Channels after the first convolution, doubled up to 8 times.
        num_layers (`int`, *optional*, defaults to 3): Convolutions of stride 2.
    """

    @register_to_config
    def __init__(self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3):
        super().__init__()
        channels = [base_channels * min(2**level, 8) for level in range(num_layers + 1)]
        layers = [nn.Conv2d(in_channels, channels[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, num_layers + 1):
            stride = 2 if level < num_layers else 1
            layers += [
                nn.Conv2d(channels[level - 1], channels[level], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(channels[level]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(channels[-1], 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_init_weights)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] to patch logits `[B, 1, about H/8, about W/8]`; positive means real."""
        return self.main(image)


def _init_weights(module: nn.Module):
    # As in pix2pix, which the VQGAN discriminator comes from.
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
