#!/usr/bin/env python
"""Measure the samples of a class-conditional pipeline of `train_ldm.py` or `train_masked.py` as the paper does (Table
5): gFID and CMMD of 5000 samples against a dataset.

    accelerate launch training_scripts/evaluate_generation.py --pretrained_model_name_or_path runs/ldm-f8 \\
        --dataset_name ILSVRC/imagenet-1k --streaming --output_dir runs/generation

Sample i is the same whatever the number of processes. An interrupted run resumes where it stopped when it is started
again with the same arguments; the dataset's statistics are kept in `--reference_dir` for the next pipeline.
"""

import json

from accelerate import Accelerator

from diffusers_pq.console import one_line_errors
from diffusers_pq.evaluation.data import EvaluationData
from diffusers_pq.evaluation.generation import Sampling, run_generation_evaluation
from diffusers_pq.evaluation.options import parse_generation_args


def parse_args(argv=None):
    return parse_generation_args(argv, __doc__)


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
    with one_line_errors():
        main(parse_args())
