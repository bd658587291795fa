#!/usr/bin/env python
"""Train a masked transformer on the codes of a PQModel, to generate pictures of classes or of texts from the codes
themselves.

    accelerate launch training_scripts/train_masked.py --config training_scripts/recipes/masked-f16.yaml

Codes that `encode_dataset.py` has packed are read by `--latents_dir`. `training_scripts/README.md` explains the flags.
"""

from diffusers_pq.console import one_line_errors
from diffusers_pq.flags import parse
from diffusers_pq.training.masked import MaskedOptions, train_masked


def parse_args(argv=None):
    return parse(MaskedOptions, argv, __doc__)


def main(args):
    train_masked(MaskedOptions.of(args))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
