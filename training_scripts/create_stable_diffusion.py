#!/usr/bin/env python
"""Make an untrained Stable Diffusion pipeline around an autoencoder, its tokenizer fitted to a dataset's captions.

    python training_scripts/create_stable_diffusion.py --train_data_dir data/stamps \\
        --vae_name_or_path model_cards/pqgan-mini-f8-kl --config_dir training_scripts/recipes/sd-mini \\
        --output_dir runs/sd-mini-untrained

`train_pqsd.py` trains it. `--config_dir` holds `unet.json` and `text_encoder.json`.
"""

import argparse
from pathlib import Path

import torch

from diffusers_pq.autoencoders import load_autoencoder
from diffusers_pq.console import one_line_errors
from diffusers_pq.data.conditions import caption_texts
from diffusers_pq.data.pictures import PictureSource
from diffusers_pq.files import read_json
from diffusers_pq.training.stable_diffusion import create_stable_diffusion, train_clip_tokenizer


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name")
    parser.add_argument("--train_data_dir")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--caption_column", default="text")
    parser.add_argument("--vae_name_or_path", required=True)
    parser.add_argument("--config_dir", type=Path, required=True)
    parser.add_argument("--vocab_size", type=int, default=2000)
    parser.add_argument("--max_length", type=int, default=24, help="tokens of a prompt")
    parser.add_argument("--prediction_type", choices=("epsilon", "v_prediction"), default="v_prediction")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", required=True)
    return parser.parse_args(argv)


def main(args):
    torch.manual_seed(args.seed)
    column = args.caption_column
    rows = PictureSource(args.dataset_name, args.train_data_dir, args.image_column).load("train", column)
    if rows is None:
        raise ValueError("The dataset has no `train` split.")
    captions = [caption for value in rows[column] for caption in caption_texts(value, column)]
    tokenizer = train_clip_tokenizer(captions, args.vocab_size, args.max_length)
    configs = (read_json(args.config_dir / f"{name}.json") for name in ("unet", "text_encoder"))
    vae = load_autoencoder(args.vae_name_or_path)
    create_stable_diffusion(vae, tokenizer, *configs, args.prediction_type).save_pretrained(args.output_dir)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
