#!/usr/bin/env python
"""Train a PQGAN (or a VQ or KL autoencoder on the same backbone) on any image dataset.

    accelerate launch training_scripts/train_pqgan.py --model_config_name_or_path model_cards/pqgan-f8 \\
        --dataset_name ILSVRC/imagenet-1k --output_dir runs/pqgan-f8

The defaults are the paper's (Table 4, appendix A.1) for one process, except that pictures are cropped;
`training_scripts/README.md` has the recipes, which resize them as the paper's authors do.
"""

from diffusers_pq.console import one_line_errors
from diffusers_pq.flags import parse
from diffusers_pq.training.pqgan import PQGANOptions, train_pqgan


def parse_args(argv=None):
    return parse(PQGANOptions, argv, __doc__)


def main(args):
    train_pqgan(PQGANOptions.of(args))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
