"""Command-line flags of the evaluations."""

import argparse

from ..data.pictures import INTERPOLATION_MODES
from ..flags import COUNT, COUNT_OR_NONE, SCALE, SEED, FlagParser, number, output_folder
from ..metrics import DEFAULT_METRICS, METRICS
from .data import PROTOCOLS, RESIZE_MODES, resize_mode
from .systems import KNOWN, references_table, systems_table


def parse_reconstruction_args(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """The flags of `evaluate_reconstruction.py`."""
    parser = FlagParser(description=description)
    model = parser.add_argument_group("model")
    which = model.add_mutually_exclusive_group(required=True)
    which.add_argument("--pretrained_model_name_or_path", help="autoencoder; folder or Hub repository")
    which.add_argument(
        "--systems",
        nargs="+",
        metavar="NAME[=FOLDER]",
        help="autoencoders of Tables 1 and 2 and of today's diffusion models, from the Hub or a converted folder; "
        "published scores stand beside",
    )
    model.add_argument(
        "--list_systems",
        action="version",
        version=f"{systems_table()}\n{references_table([])}",
        help="print what --systems knows, and exit",
    )
    model.add_argument("--subfolder", help='folder of the model in its repository, "vae" of a pipeline')
    model.add_argument("--revision", help="branch, tag or commit of the model on the Hub; default: main")
    model.add_argument("--variant", help='of the model\'s files, such as "fp16"')
    model.add_argument("--name", help="name of the model in the table; default: the last part of its path")
    data = parser.add_argument_group("data")
    _add_data_arguments(data)
    data.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="measure as the paper's authors do: the validation split, whole pictures made square with a bilinear "
        "filter, all metrics, resized for Inception and CLIP as theirs, LPIPS and CMMD before rounding; psnr_pooled "
        "is their PSNR",
    )
    data.add_argument("--resolution", type=COUNT, default=256, help="side of the pictures, in pixels")
    data.add_argument(
        "--resize_mode",
        type=resize_mode,
        choices=RESIZE_MODES,
        default="short_side",
        help="to a square: resize the short side and take the centre, or resize to a square as the paper's authors do",
    )
    data.add_argument(
        "--image_interpolation_mode",
        choices=INTERPOLATION_MODES,
        default="bicubic",
        help="filter of the resizing",
    )
    data.add_argument(
        "--max_samples", type=COUNT, help="only so many pictures; the paper: 10000 of FFHQ, 3000 of LSUN; default: all"
    )
    data.add_argument("--streaming", action="store_true", help="read while evaluating instead of downloading first")
    data.add_argument("--cache_dir", help="where datasets are kept; default: the Hub's cache")
    run = parser.add_argument_group("run")
    run.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        default=list(DEFAULT_METRICS),
        help="what to measure; default: all but kid and inception_score, with --protocol all",
    )
    run.add_argument("--batch_size", type=COUNT, default=16, help="pictures at once, per process")
    run.add_argument(
        "--dataloader_num_workers", type=COUNT_OR_NONE, default=4, help="processes that read pictures, per process"
    )
    run.add_argument("--checkpointing_steps", type=COUNT, default=50, help="batches between two savings")
    run.add_argument(
        "--output_dir", type=output_folder, default="evaluation", help="folder of the results and of unfinished work"
    )
    parser.set_defaults(as_authors=False)
    args = parser.parse_args(argv)
    if args.protocol is not None:
        args = _parse_with_protocol(parser, argv, args.protocol)
    args.systems = dict(_named_system(parser, entry) for entry in args.systems or ())
    return args


def parse_generation_args(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """The flags of `evaluate_generation.py`."""
    parser = FlagParser(description=description)
    model = parser.add_argument_group("model")
    model.add_argument("--pretrained_model_name_or_path", required=True, help="pipeline; folder or Hub repository")
    model.add_argument("--revision", help="branch, tag or commit of the model on the Hub; default: main")
    model.add_argument("--variant", help='of the model\'s files, such as "fp16"')
    model.add_argument("--name", help="name of the results' folder; default: the last part of the model's path")
    samples = parser.add_argument_group("samples")
    samples.add_argument("--num_samples", type=number(int, minimum=2), default=5000, help="pictures that are made")
    samples.add_argument("--guidance_scale", type=SCALE, default=1.0, help="of classifier-free guidance; 1: without")
    samples.add_argument("--num_inference_steps", type=COUNT, default=50, help="denoising steps of each sample")
    samples.add_argument("--seed", type=SEED, default=0, help="seed of the samples")
    samples.add_argument("--batch_size", type=COUNT, default=16, help="pictures at once, per process")
    samples.add_argument("--label_column", help="draw the classes of the dataset's rows; default: all in turn")
    data = parser.add_argument_group("data to compare with")
    _add_data_arguments(data)
    data.add_argument(
        "--resolution", type=COUNT, help="side of the pictures, in pixels; default: of those that the model makes"
    )
    data.add_argument("--max_samples", type=COUNT, help="only so many pictures; default: all")
    data.add_argument("--streaming", action="store_true", help="read while measuring instead of downloading first")
    data.add_argument("--cache_dir", help="where datasets are kept; default: the Hub's cache")
    data.add_argument("--reference_dir", help="folder of the dataset's statistics; default: in --output_dir")
    data.add_argument(
        "--dataloader_num_workers", type=COUNT_OR_NONE, default=4, help="processes that read pictures, per process"
    )
    parser.add_argument(
        "--output_dir", type=output_folder, default="generation", help="folder of the results and of unfinished work"
    )
    return parser.parse_args(argv)


def _parse_with_protocol(parser: argparse.ArgumentParser, argv: list[str] | None, protocol: str) -> argparse.Namespace:
    """The flags, with the protocol's values as defaults that none may contradict."""
    parser.set_defaults(**PROTOCOLS[protocol], metrics=list(METRICS))
    args = parser.parse_args(argv)
    for name, value in PROTOCOLS[protocol].items():
        if getattr(args, name) != value:
            parser.error(f"--protocol {protocol} is with --{name} {value}, but {getattr(args, name)} was given")
    return args


def _add_data_arguments(data):
    """Flags of [`EvaluationData`] that all evaluations have, for a group of the parser."""
    source = data.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset_name", help="Hub dataset or local dataset folder")
    source.add_argument("--data_dir", help="folder in the imagefolder layout")
    data.add_argument("--dataset_config_name", help="configuration of the dataset, where it has several")
    data.add_argument("--split", default="validation", help="part of the dataset to compare with")
    data.add_argument("--image_column", default="image", help="column of the pictures")


def _named_system(parser, entry):
    """The name of a system and what to load it from."""
    name, _, folder = entry.partition("=")
    if name not in KNOWN:
        parser.error(f"--systems {name} is not known; known are {', '.join(KNOWN)}")
    return name, folder or name
