#!/usr/bin/env python
"""Whether the loader keeps up with training: pictures a second that it gives by itself and while a model learns.

    python experiments/loader_speed.py --num_workers 0 1
    python experiments/loader_speed.py --device cuda --config model_cards/pqgan-f8/config.json --resolution 256 \\
        --batch_size 20 --mixed_precision bf16 --num_workers 0 4 12

Pictures are JPEG files made of the photographs, which are in the cache of the system. `step` is how many pictures the
model learns from when none has to be read. Writes loader_speed.json.
"""

import datetime
import json
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL.Image import Resampling
from training_speed import add_training_flags, our_trainer

from diffusers_pq import PQModel
from diffusers_pq.console import one_line_errors
from diffusers_pq.data.loaders import build_train_loader
from diffusers_pq.data.pictures import Crops, PictureSource
from diffusers_pq.files import write_json
from diffusers_pq.flags import COUNT, COUNT_OR_NONE, FlagParser
from diffusers_pq.measuring import describe_machine, measure_seconds, results_folder
from diffusers_pq.photographs import load_photographs


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    add_training_flags(parser)
    parser.add_argument("--resolution", type=COUNT, default=256, help="side of the crops, in pixels")
    parser.add_argument("--picture_side", type=COUNT, default=512, help="side of the pictures, in pixels")
    parser.add_argument("--pictures", type=COUNT, default=200, help="number of pictures")
    parser.add_argument("--batch_size", type=COUNT, default=20, help="pictures at once")
    parser.add_argument("--batches", type=COUNT, default=20, help="batches that are timed")
    parser.add_argument(
        "--num_workers", nargs="+", type=COUNT_OR_NONE, default=[0, 1], help="processes that read pictures"
    )
    return parser.parse_args(argv)


def write_pictures(folder, count, side):
    photographs = [*load_photographs().values()]
    (folder / "train").mkdir()
    for number in range(count):
        photo = photographs[number % len(photographs)].resize((side, side), Resampling.BICUBIC)
        photo.save(folder / "train" / f"{number}.jpg", quality=90)


def pictures_per_second(batches, learn, args):
    """Of the batches after the first two, with which workers and device warm up."""

    def learn_from(count):
        for _ in range(count):
            learn(next(batches).to(args.device, non_blocking=True))

    learn_from(2)
    seconds = measure_seconds(lambda: learn_from(args.batches), 1, args.device, warm_up=0)
    return args.batches * args.batch_size / seconds


def main(args):
    torch.backends.cudnn.benchmark = True  # as in a training
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=args.mixed_precision)
    torch.manual_seed(0)
    trainer = our_trainer(PQModel.load_config(args.config), accelerator, {})
    images = torch.rand(args.batch_size, 3, args.resolution, args.resolution, device=args.device) * 2 - 1
    step = args.batch_size / measure_seconds(lambda: trainer.step(images), 3, args.device, warm_up=2)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), args.pictures, args.picture_side)
        rows_of_pictures = PictureSource(data_dir=folder, cache_dir=f"{folder}/cache").load("train")
        crops = Crops("image", args.resolution, random_flip=True)
        for workers in args.num_workers:
            row = {"num_workers": workers}
            for name, learn in (("alone", lambda batch: batch), ("training", trainer.step)):
                loader = build_train_loader(
                    rows_of_pictures,
                    crops,
                    accelerator,
                    args.batch_size,
                    collate_fn=torch.cat,
                    seed=0,
                    num_workers=workers,
                )
                row[name] = pictures_per_second(iter(loader), learn, args)
            rows.append(row)
            print(json.dumps(row), flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{describe_machine(args.device)}, mixed precision {args.mixed_precision}",
        "settings": {key: str(value) for key, value in vars(args).items() if key != "output_dir"},
        "step": step,
        "pictures_per_second": rows,
    }
    folder = args.output_dir or results_folder("experiments/results", args.device)
    write_json(folder / "loader_speed.json", record)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
