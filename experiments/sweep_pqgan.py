#!/usr/bin/env python
"""Train and evaluate a `PQModel` for every d, S and K of a grid (section 4.2, Figures 3 and 6).

    # The paper's grid, one of many workers, each on a machine of its own; all see the folder
    python experiments/sweep_pqgan.py --output_dir /shared/sweep --launcher "accelerate launch" \\
        --config training_scripts/recipes/pqgan-f16.yaml --streaming

Flags that are not listed here go to `train_pqgan.py`; of its model only d, S and K are varied. Start a worker on each
machine, at any time and again after a crash: it takes the next free configuration, skips what is done and goes on
where another worker was killed. `experiments/sweep_figures.py` draws the figures.
"""

import logging
import shlex
import signal
import sys
from pathlib import Path

import torch
from sweep import Sweep, grid

from diffusers_pq import PQModel, ProductQuantizer
from diffusers_pq.console import one_line_errors
from diffusers_pq.evaluation.options import parse_reconstruction_args
from diffusers_pq.files import read_json
from diffusers_pq.flags import COUNT, FlagParser, number, output_folder, parse
from diffusers_pq.training.pqgan import PQGANOptions


SCRIPTS = Path(__file__).resolve().parents[1] / "training_scripts"
TRAIN = SCRIPTS / "train_pqgan.py"
EVALUATE = SCRIPTS / "evaluate_reconstruction.py"
# Flags of the evaluation that take over a value of the training's.
DATA_FLAGS = {
    "--dataset_name": "dataset_name",
    "--data_dir": "train_data_dir",
    "--dataset_config_name": "dataset_config_name",
    "--image_column": "image_column",
    "--cache_dir": "cache_dir",
}


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument(
        "--latent_channels", nargs="+", type=COUNT, default=[4, 8, 16, 32, 64, 128, 256], help="latent channels d"
    )
    parser.add_argument(
        "--num_subspaces", nargs="+", default=["1", "d/8", "d/4", "d/2", "d"], help="subspaces S, of each d"
    )
    parser.add_argument(
        "--codebook_size", nargs="+", type=COUNT, default=[128, 512, 1024, 8192, 16384], help="sizes of a codebook K"
    )
    parser.add_argument(
        "--output_dir", type=output_folder, required=True, help="folder of the trainings, shared by all workers"
    )
    parser.add_argument(
        "--evaluation",
        action="append",
        metavar="FLAGS",
        help="flags of evaluate_reconstruction.py, in one string; repeat it for several evaluations. Default for the "
        "data: the `validation` split of the training data, at its resolution",
    )
    parser.add_argument(
        "--launcher",
        default=shlex.quote(sys.executable),
        help='what starts a script, such as "accelerate launch --num_processes 4"',
    )
    parser.add_argument(
        "--claim_timeout",
        type=number(float, above=0),
        default=600,
        help="seconds without a sign of life after which a worker's configuration is taken over",
    )
    args, args.train_flags = parser.parse_known_args(argv)
    args.train_args = parse(PQGANOptions, args.train_flags)
    if args.train_args.pretrained_model_name_or_path or args.train_args.dry_run or args.train_args.push_to_hub:
        parser.error("a sweep needs --model_config_name_or_path, and goes without --dry_run and --push_to_hub")
    args.evaluation_flags = [evaluation_flags(text, args.train_args) for text in args.evaluation or [""]]
    try:
        args.configurations = grid(args.latent_channels, args.num_subspaces, args.codebook_size)
        check_quantizers(args.configurations, codebook_distance=args.train_args.codebook_distance or "euclidean")
    except ValueError as error:
        parser.error(str(error))
    return args


def evaluation_flags(text, train_args):
    """The flags of one evaluation, completed by the training's data and checked."""
    flags = ["--resolution", str(train_args.resolution), *shlex.split(text)]
    if not {"--dataset_name", "--data_dir"} & set(flags):
        given = {flag: getattr(train_args, name) for flag, name in DATA_FLAGS.items()}
        flags += [part for flag, value in given.items() if value is not None for part in (flag, value)]
        flags += ["--streaming"] if train_args.streaming else []
    model = ["--pretrained_model_name_or_path", "each"]
    parse_reconstruction_args([*flags, *model])
    return flags


def check_quantizers(configurations, **kwargs):
    """Raise what the quantiser raises, before anything is trained."""
    with torch.device("meta"):
        for one in configurations:
            ProductQuantizer(one.latent_channels, one.num_subspaces, one.codebook_size, **kwargs)


def load_model_config(path):
    config = read_json(path) if path.endswith(".json") else PQModel.load_config(path)
    if config.get("_class_name") != "PQModel":
        raise ValueError(f"--model_config_name_or_path {path} must be of a PQModel.")
    return config


def main(args):
    logging.basicConfig(format="%(asctime)s %(levelname)s: %(message)s", level=logging.INFO)
    launcher = shlex.split(args.launcher)
    sweep = Sweep(
        args.output_dir,
        load_model_config(args.train_args.model_config_name_or_path),
        [*launcher, str(TRAIN), *args.train_flags],
        [*launcher, str(EVALUATE)],
        args.evaluation_flags,
        args.claim_timeout,
    )
    sweep.check_earlier_runs(args.configurations, vars(args.train_args))
    # So that a worker that is told to end lets go of its configuration.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    failed = sweep.run(args.configurations)
    done = sum(map(sweep.is_done, args.configurations))
    print(f"{done} of {len(args.configurations)} configurations are done, {len(failed)} failed here.", *failed)
    return 1 if failed else 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(parse_args()))
