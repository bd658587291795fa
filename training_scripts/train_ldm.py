#!/usr/bin/env python
"""Train class-conditional latent diffusion from scratch on the latents of an autoencoder (paper, supplement D and
Table 5), on any labelled dataset.

    accelerate launch training_scripts/train_ldm.py --config training_scripts/recipes/ldm-f8.yaml

The autoencoder is a PQModel or any other image autoencoder of diffusers, the denoiser a UNet as in LDM or a DiT.
`training_scripts/README.md` explains the flags.
"""

from diffusers_pq.console import one_line_errors
from diffusers_pq.flags import parse
from diffusers_pq.training.latent_diffusion import LatentDiffusionOptions, train_latent_diffusion


def parse_args(argv=None):
    return parse(LatentDiffusionOptions, argv, __doc__)


def main(args):
    train_latent_diffusion(LatentDiffusionOptions.of(args))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
