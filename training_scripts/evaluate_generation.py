#!/usr/bin/env python
"""Measure the samples of a class-conditional pipeline of `train_ldm.py` as the paper does (Table 5): gFID and CMMD of
5000 samples against a dataset.

    accelerate launch training_scripts/evaluate_generation.py --pretrained_model_name_or_path runs/ldm-f8 \\
        --dataset_name ILSVRC/imagenet-1k --streaming --output_dir runs/generation

Sample i is the same whatever the number of processes. A run that was stopped goes on where it was when it is started
again with the same arguments; the dataset's statistics are kept in `--reference_dir` for the next pipeline.
"""

import argparse
import json

from accelerate import Accelerator

from diffusers_pq.evaluation.generation import Sampling, run_generation_evaluation
from diffusers_pq.evaluation.reconstruction import EvaluationData
from diffusers_pq.training.options import add_evaluation_data_arguments


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model = parser.add_argument_group("model")
    model.add_argument("--pretrained_model_name_or_path", required=True, help="folder or Hub repository")
    model.add_argument("--revision")
    model.add_argument("--variant")
    model.add_argument("--name", help="of the results' folder; default: the last part of the model's path")
    samples = parser.add_argument_group("samples")
    samples.add_argument("--num_samples", type=int, default=5000)
    samples.add_argument("--guidance_scale", type=float, default=1.0, help="1: without; the paper does not say")
    samples.add_argument("--num_inference_steps", type=int, default=50)
    samples.add_argument("--seed", type=int, default=0)
    samples.add_argument("--batch_size", type=int, default=16, help="per process")
    samples.add_argument("--label_column", help="draw the classes of the dataset's rows; default: all in turn")
    data = parser.add_argument_group("data to compare with")
    add_evaluation_data_arguments(data)
    data.add_argument("--max_samples", type=int, help="only the first pictures")
    data.add_argument("--streaming", action="store_true", help="read while measuring instead of downloading first")
    data.add_argument("--cache_dir", help="of the dataset")
    data.add_argument("--reference_dir", help="of the dataset's statistics; default: in --output_dir")
    data.add_argument("--dataloader_num_workers", type=int, default=4, help="per process")
    parser.add_argument("--output_dir", default="generation")
    return parser.parse_args(argv)


def main(args):
    accelerator = Accelerator()
    data = EvaluationData(
        dataset_name=args.dataset_name,
        data_dir=args.data_dir,
        dataset_config_name=args.dataset_config_name,
        split=args.split,
        image_column=args.image_column,
        resolution=args.resolution,
        max_samples=args.max_samples,
    )
    sampling = Sampling(
        num_samples=args.num_samples,
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.num_inference_steps,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    result = run_generation_evaluation(
        accelerator,
        args.pretrained_model_name_or_path,
        data,
        args.output_dir,
        sampling,
        label_column=args.label_column,
        name=args.name,
        reference_dir=args.reference_dir,
        num_workers=args.dataloader_num_workers,
        streaming=args.streaming,
        cache_dir=args.cache_dir,
        revision=args.revision,
        variant=args.variant,
    )
    if accelerator.is_main_process:
        print(json.dumps({key: result[key] for key in ("scores", "unavailable")}, indent=2))
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
