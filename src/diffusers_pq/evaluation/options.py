"""Command-line flags of the evaluations."""

import argparse

from ..metrics import DEFAULT_METRICS, METRICS
from .reconstruction import PROTOCOLS, RESIZE_MODES
from .systems import SYSTEMS, systems_table


def parse_reconstruction_args(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """The flags of `evaluate_reconstruction.py`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
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
    _add_data_arguments(data)
    data.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="measure as the paper's authors do: the validation split, whole pictures made square with a bilinear "
        "filter, all metrics, those of Inception as torchmetrics resizes for it; psnr_pooled is their PSNR",
    )
    data.add_argument("--resolution", type=int, default=256, help="side of the pictures")
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
    run.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        default=list(DEFAULT_METRICS),
        help="default: all but kid and inception_score, with --protocol all",
    )
    run.add_argument("--batch_size", type=int, default=16, help="per process")
    run.add_argument("--dataloader_num_workers", type=int, default=4, help="per process")
    run.add_argument("--checkpointing_steps", type=int, default=50, help="batches between two savings")
    run.add_argument("--output_dir", default="evaluation")
    parser.set_defaults(inception_antialias=False)
    args = parser.parse_args(argv)
    if args.protocol is not None:
        args = _parse_with_protocol(parser, argv, args.protocol)
    args.systems = dict(_named_system(parser, entry) for entry in args.systems or ())
    return args


def parse_generation_args(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """The flags of `evaluate_generation.py`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
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
    _add_data_arguments(data)
    data.add_argument("--resolution", type=int, help="side of the pictures; default: of those that the model makes")
    data.add_argument("--max_samples", type=int, help="only the first pictures")
    data.add_argument("--streaming", action="store_true", help="read while measuring instead of downloading first")
    data.add_argument("--cache_dir", help="of the dataset")
    data.add_argument("--reference_dir", help="of the dataset's statistics; default: in --output_dir")
    data.add_argument("--dataloader_num_workers", type=int, default=4, help="per process")
    parser.add_argument("--output_dir", default="generation")
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
    data.add_argument("--dataset_config_name")
    data.add_argument("--split", default="validation")
    data.add_argument("--image_column", default="image", help="column of the pictures")


def _named_system(parser, entry):
    """The name of a system and what to load it from."""
    name, _, folder = entry.partition("=")
    if name not in SYSTEMS:
        parser.error(f"--systems {name} is not known; known are {', '.join(SYSTEMS)}")
    return name, folder or name
