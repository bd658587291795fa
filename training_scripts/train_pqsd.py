#!/usr/bin/env python
"""Adapt Stable Diffusion to the latents of a PQModel (paper, section 4.5 and Table 4), on any captioned dataset.

    accelerate launch training_scripts/train_pqsd.py --config training_scripts/recipes/pqsd-quick.yaml

The UNet's first and last convolution are widened; the stages of `--stages` follow each other in one resumable run.
`training_scripts/README.md` explains the flags.
"""

from diffusers_pq.console import one_line_errors
from diffusers_pq.flags import parse
from diffusers_pq.training.stable_diffusion import AdaptationOptions, adapt_stable_diffusion


def parse_args(argv=None):
    return parse(AdaptationOptions, argv, __doc__)


def main(args):
    adapt_stable_diffusion(AdaptationOptions.of(args))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
