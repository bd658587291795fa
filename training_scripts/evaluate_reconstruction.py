#!/usr/bin/env python
"""Measure the reconstructions of an image autoencoder as the paper does (section 4.4): any `PQModel`, `VQModel`,
`AutoencoderKL`, `AutoencoderTiny` or `AutoencoderDC`, any image dataset; and the systems of Tables 1 and 2 by name.

    accelerate launch training_scripts/evaluate_reconstruction.py --dataset_name ILSVRC/imagenet-1k --streaming \\
        --pretrained_model_name_or_path model_cards/pqgan-f8 --output_dir runs/evaluation
    accelerate launch training_scripts/evaluate_reconstruction.py --dataset_name ILSVRC/imagenet-1k --streaming \\
        --protocol paper --systems sd21-vae sdxl-vae pqgan-f16 pqgan-f8 ldm-kl-f4=runs/ldm-kl-f4 \\
        --output_dir runs/evaluation

The defaults are for ImageNet's 50,000 validation pictures at 256 x 256 (Table 1), as centre crops. `--protocol paper`
measures as the paper's authors do: it is what compares with their numbers. Table 2 takes FFHQ and LSUN, without
training on them:

    accelerate launch training_scripts/evaluate_reconstruction.py --data_dir ffhq --max_samples 10000 \\
        --protocol paper --systems sd21-vae sdxl-vae pqgan-f16 pqgan-f8 --output_dir runs/evaluation

Runs with the same `--output_dir` share a table, `results.md`. An interrupted run resumes where it stopped when it is
started again with the same arguments.
"""

from accelerate import Accelerator

from diffusers_pq.console import one_line_errors
from diffusers_pq.evaluation.data import EvaluationData
from diffusers_pq.evaluation.options import parse_reconstruction_args
from diffusers_pq.evaluation.reconstruction import run_evaluation
from diffusers_pq.evaluation.tables import write_table


def parse_args(argv=None):
    return parse_reconstruction_args(argv, __doc__)


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
            as_authors=args.as_authors,
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
    with one_line_errors():
        main(parse_args())
