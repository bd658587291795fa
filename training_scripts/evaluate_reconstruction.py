#!/usr/bin/env python
"""Measure the reconstructions of an image autoencoder as the paper does (section 4.4): any `PQModel`, `VQModel`,
`AutoencoderKL`, `AutoencoderTiny` or `AutoencoderDC`, any image dataset; and the systems of Tables 1 and 2 by name.

    accelerate launch training_scripts/evaluate_reconstruction.py --dataset_name ILSVRC/imagenet-1k --streaming \\
        --pretrained_model_name_or_path model_cards/pqgan-f8 --output_dir runs/evaluation
    accelerate launch training_scripts/evaluate_reconstruction.py --dataset_name ILSVRC/imagenet-1k --streaming \\
        --resize_mode stretch --systems sd21-vae sdxl-vae pqgan-f16 pqgan-f8 ldm-kl-f4=runs/ldm-kl-f4 \\
        --output_dir runs/evaluation

The defaults are for ImageNet's 50,000 validation pictures at 256 x 256 (Table 1), as centre crops; the paper's authors
resize whole pictures to a square: `--resize_mode stretch`. Table 2 takes FFHQ and LSUN, without training on them:

    accelerate launch training_scripts/evaluate_reconstruction.py --data_dir ffhq --split train --max_samples 10000 \\
        --resize_mode stretch --systems sd21-vae sdxl-vae pqgan-f16 pqgan-f8 --output_dir runs/evaluation

Runs with the same `--output_dir` share a table, `results.md`. A run that was stopped goes on where it was when it is
started again with the same arguments.
"""

import argparse

from accelerate import Accelerator

from diffusers_pq.evaluation.reconstruction import RESIZE_MODES, EvaluationData, run_evaluation, write_table
from diffusers_pq.evaluation.systems import SYSTEMS, systems_table
from diffusers_pq.metrics import METRICS
from diffusers_pq.training.options import add_evaluation_data_arguments


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model = parser.add_argument_group("model")
    which = model.add_mutually_exclusive_group(required=True)
    which.add_argument("--pretrained_model_name_or_path", help="folder or Hub repository")
    which.add_argument(
        "--systems",
        nargs="+",
        metavar="NAME[=FOLDER]",
        help="of Tables 1 and 2, from the Hub or a converted folder; the paper's scores are printed beside",
    )
    model.add_argument(
        "--list_systems", action="version", version=systems_table(), help="print what --systems knows, and exit"
    )
    model.add_argument("--subfolder", help='of the model, "vae" of a pipeline')
    model.add_argument("--revision")
    model.add_argument("--variant")
    model.add_argument("--name", help="of the model in the table; default: the last part of its path")
    data = parser.add_argument_group("data")
    add_evaluation_data_arguments(data)
    data.add_argument(
        "--resize_mode",
        choices=RESIZE_MODES,
        default="crop",
        help="to a square: resize the short side and take the centre, or resize to a square as the paper's authors do",
    )
    data.add_argument(
        "--image_interpolation_mode",
        choices=("bicubic", "bilinear", "box", "lanczos"),
        default="bicubic",
        help="filter of the resizing",
    )
    data.add_argument("--max_samples", type=int, help="only the first; the paper: 10000 of FFHQ, 3000 of LSUN")
    data.add_argument("--streaming", action="store_true", help="read while evaluating instead of downloading first")
    data.add_argument("--cache_dir", help="of the dataset")
    run = parser.add_argument_group("run")
    run.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS), help="default: all")
    run.add_argument("--batch_size", type=int, default=16, help="per process")
    run.add_argument("--dataloader_num_workers", type=int, default=4, help="per process")
    run.add_argument("--checkpointing_steps", type=int, default=50, help="batches between two savings")
    run.add_argument("--output_dir", default="evaluation")
    args = parser.parse_args(argv)
    args.systems = dict(_named_system(parser, entry) for entry in args.systems or ())
    return args


def _named_system(parser, entry):
    """The name of a system and what to load it from."""
    name, _, folder = entry.partition("=")
    if name not in SYSTEMS:
        parser.error(f"--systems {name} is not known; known are {', '.join(SYSTEMS)}")
    return name, folder or name


def main(args):
    accelerator = Accelerator()
    data = EvaluationData(
        dataset_name=args.dataset_name,
        data_dir=args.data_dir,
        dataset_config_name=args.dataset_config_name,
        split=args.split,
        image_column=args.image_column,
        resolution=args.resolution,
        resize_mode=args.resize_mode,
        image_interpolation_mode=args.image_interpolation_mode,
        max_samples=args.max_samples,
    )
    for name, source in (args.systems or {args.name: args.pretrained_model_name_or_path}).items():
        run_evaluation(
            accelerator,
            source,
            data,
            args.output_dir,
            name=name,
            metrics=args.metrics,
            batch_size=args.batch_size,
            num_workers=args.dataloader_num_workers,
            streaming=args.streaming,
            cache_dir=args.cache_dir,
            checkpointing_steps=args.checkpointing_steps,
            subfolder=args.subfolder,
            revision=args.revision,
            variant=args.variant,
        )
    if accelerator.is_main_process:
        print(write_table(args.output_dir))
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
