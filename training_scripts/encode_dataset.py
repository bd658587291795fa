#!/usr/bin/env python
"""Encode a dataset's pictures once to packed codes of a PQModel, for `--latents_dir` of `train_pqsd.py`,
`train_ldm.py` and `train_masked.py`.

    accelerate launch training_scripts/encode_dataset.py --vae_name_or_path runs/pqgan-f8-768 \\
        --train_data_dir data/unsplash-full --resolution 768 --output_dir data/unsplash-codes

Run it once for each resolution that is trained at. An interrupted run resumes where it stopped.
"""

import argparse

from accelerate import Accelerator

from diffusers_pq.autoencoders import load_pq_model
from diffusers_pq.console import one_line_errors
from diffusers_pq.data.latent_cache import encode_dataset
from diffusers_pq.data.pictures import INTERPOLATION_MODES, RESIZE_MODES, Crops, PictureSource
from diffusers_pq.flags import COUNT, FlagParser, output_folder


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument("--vae_name_or_path", required=True, help="PQModel; folder or Hub repository")
    parser.add_argument("--dataset_name", help="Hub dataset, or local folder of parquet files or webdataset tars")
    parser.add_argument("--dataset_config_name", help="configuration of the dataset, where it has several")
    parser.add_argument("--train_data_dir", help="folder in the imagefolder layout")
    parser.add_argument("--image_column", default="image", help="column of the pictures")
    parser.add_argument(
        "--caption_column",
        "--label_column",
        dest="condition_column",
        default="text",
        help="column that is kept beside the codes",
    )
    parser.add_argument("--cache_dir", help="where datasets are kept; default: the Hub's cache")
    parser.add_argument("--resolution", type=COUNT, required=True, help="side of the pictures, in pixels")
    parser.add_argument("--min_image_side", type=COUNT, help="smaller pictures are skipped; default: the resolution")
    parser.add_argument(
        "--resize_mode",
        choices=RESIZE_MODES,
        default="short_side",
        help="how pictures are made square, as in training",
    )
    parser.add_argument(
        "--image_interpolation_mode", choices=INTERPOLATION_MODES, default="bicubic", help="filter of the resizing"
    )
    parser.add_argument(
        "--center_crop",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take the middle of each picture, not a random part; by default it is taken",
    )
    parser.add_argument(
        "--random_flip",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="mirror half the pictures; by default none is",
    )
    parser.add_argument("--batch_size", type=COUNT, default=8, help="pictures encoded at once, per process")
    parser.add_argument("--rows_per_shard", type=COUNT, default=1000, help="pictures in each file")
    parser.add_argument(
        "--output_dir",
        type=output_folder,
        required=True,
        help="folder of the codes, in a sub-folder for each resolution",
    )
    return parser.parse_args(argv)


def main(args):
    accelerator = Accelerator()
    vae = load_pq_model(args.vae_name_or_path).to(accelerator.device)
    source = args.dataset_name, args.train_data_dir, args.image_column, args.dataset_config_name, args.cache_dir
    rows = PictureSource(*source).load("train", args.condition_column)
    if rows is None:
        raise ValueError("The dataset has no `train` split.")
    crops = Crops(
        args.image_column,
        args.resolution,
        resize_mode=args.resize_mode,
        image_interpolation_mode=args.image_interpolation_mode,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        min_image_side=args.min_image_side,
    )
    sizes = args.batch_size, args.rows_per_shard
    counts = encode_dataset(vae, rows, crops, args.condition_column, args.output_dir, accelerator, *sizes)
    print(f"{args.output_dir}: {counts['written']} shards written, {counts['skipped']} pictures skipped")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
