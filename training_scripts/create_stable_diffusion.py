#!/usr/bin/env python
"""Make an untrained Stable Diffusion pipeline around an autoencoder, its tokenizer fitted to a dataset's captions.

    python training_scripts/create_stable_diffusion.py --train_data_dir data/stamps \\
        --vae_name_or_path model_cards/pqgan-mini-f8-kl --config_dir training_scripts/recipes/sd-mini \\
        --output_dir runs/sd-mini-untrained

`train_pqsd.py` trains it. `--config_dir` holds `unet.json` and `text_encoder.json`.
"""

from pathlib import Path

import torch

from diffusers_pq.autoencoders import load_autoencoder
from diffusers_pq.console import one_line_errors
from diffusers_pq.data.conditions import caption_texts
from diffusers_pq.data.pictures import PictureSource
from diffusers_pq.files import naming, read_json
from diffusers_pq.flags import COUNT, SEED, FlagParser, number, output_folder
from diffusers_pq.training.stable_diffusion import create_stable_diffusion, train_clip_tokenizer


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument("--dataset_name", help="Hub dataset, or local folder of parquet files or webdataset tars")
    parser.add_argument("--train_data_dir", help="folder in the imagefolder layout")
    parser.add_argument("--image_column", default="image", help="column of the pictures")
    parser.add_argument("--caption_column", default="text", help="column of the captions")
    parser.add_argument("--vae_name_or_path", required=True, help="autoencoder; folder or Hub repository")
    parser.add_argument("--config_dir", type=Path, required=True, help="folder with unet.json and text_encoder.json")
    parser.add_argument("--vocab_size", type=COUNT, default=2000, help="entries of the tokenizer")
    parser.add_argument("--max_length", type=number(int, minimum=3), default=24, help="tokens of a prompt")
    parser.add_argument(
        "--prediction_type",
        choices=("epsilon", "v_prediction", "sample"),
        default="v_prediction",
        help="what the UNet is to predict",
    )
    parser.add_argument("--seed", type=SEED, default=0, help="seed of the weights")
    parser.add_argument("--output_dir", type=output_folder, required=True, help="folder of the pipeline")
    return parser.parse_args(argv)


def main(args):
    torch.manual_seed(args.seed)
    column = args.caption_column
    rows = PictureSource(args.dataset_name, args.train_data_dir, args.image_column).load("train", column)
    if rows is None:
        raise ValueError("The dataset has no `train` split.")
    captions = [caption for value in rows[column] for caption in caption_texts(value, column)]
    if not any(captions):
        raise ValueError(f"The column {column!r} holds no captions to fit a tokenizer to.")
    tokenizer = train_clip_tokenizer(captions, args.vocab_size, args.max_length)
    configs = [read_json(args.config_dir / f"{name}.json", dict) for name in ("unet", "text_encoder")]
    vae = load_autoencoder(args.vae_name_or_path)
    with naming(args.config_dir):
        pipeline = create_stable_diffusion(vae, tokenizer, *configs, args.prediction_type)
    pipeline.save_pretrained(args.output_dir)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
