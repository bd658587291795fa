"""Command-line flags that the training scripts share, and recipes: flags kept in a YAML file."""

import argparse
from pathlib import Path

import yaml


def positive(text: str) -> int:
    """The type of flags that count something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {value}")
    return value


def add_data_arguments(parser: argparse.ArgumentParser):
    """Flags of [`load_images`] and [`build_train_loader`]."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Hub dataset, or local folder of parquet files or webdataset tars")
    data.add_argument("--dataset_config_name")
    data.add_argument("--train_data_dir", help="folder in the imagefolder layout")
    data.add_argument("--image_column", default="image")
    data.add_argument("--cache_dir")
    data.add_argument(
        "--streaming",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="read the dataset while training instead of downloading it first",
    )
    data.add_argument("--shuffle_buffer", type=positive, default=1000, help="pictures of a stream shuffled together")
    data.add_argument("--on_bad_image", choices=("skip", "raise"), default="skip")
    data.add_argument(
        "--min_image_side",
        type=int,
        help="pictures with a shorter side are bad; default: the resolution, so that none is enlarged",
    )
    data.add_argument("--random_flip", action=argparse.BooleanOptionalAction, default=False)
    data.add_argument("--dataloader_num_workers", type=int, default=0)
    return data


def add_optimisation_arguments(parser: argparse.ArgumentParser):
    """Flags of the optimiser, precision and accumulation, without those whose defaults differ between the scripts."""
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--gradient_accumulation_steps", type=positive, default=1)
    optim.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=False)
    optim.add_argument("--lr_scheduler", default="constant")
    optim.add_argument("--lr_warmup_steps", type=int, default=0)
    optim.add_argument(
        "--max_skipped_steps",
        type=positive,
        default=10,
        help="steps without a finite gradient are left out; so many in a row end the run",
    )
    optim.add_argument("--use_ema", action=argparse.BooleanOptionalAction, default=False)
    optim.add_argument("--ema_decay", type=float, default=0.9999)
    optim.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"))
    optim.add_argument("--allow_tf32", action=argparse.BooleanOptionalAction, default=False)
    optim.add_argument(
        "--channels_last",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="memory format that convolutions prefer",
    )
    optim.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the model"
    )
    optim.add_argument("--seed", type=int, default=0)
    return optim


def add_denoising_arguments(data, optim, run):
    """Flags of `train_denoiser`, for the groups that the other functions return."""
    data.add_argument(
        "--latents_dir", help="what `encode_dataset.py` wrote; pictures are then read for validation only"
    )
    data.add_argument("--center_crop", action=argparse.BooleanOptionalAction, default=False)
    data.add_argument(
        "--num_statistics_images",
        type=int,
        default=1000,
        help="pictures that the latents' mean and std are taken of; 0 keeps those in the autoencoder's config",
    )
    optim.add_argument("--train_batch_size", type=int, default=8, help="pictures per process and step")
    optim.add_argument("--adam_beta1", type=float, default=0.9)
    optim.add_argument("--adam_beta2", type=float, default=0.999)
    optim.add_argument("--adam_weight_decay", type=float, default=1e-2)
    optim.add_argument("--max_grad_norm", type=float, default=1.0)
    optim.add_argument("--snr_gamma", type=float, help="min-SNR weighting; 5.0 is usual")
    optim.add_argument(
        "--channel_weighting",
        type=float,
        default=0.0,
        help="weigh each latent channel's loss by its standard deviation to this power; 0: all alike, as the paper",
    )
    optim.add_argument(
        "--noise_shift",
        type=noise_shift,
        default=1.0,
        help='more noise for larger latents: "auto", by their size and channels, or a number; 1 shifts nothing',
    )
    optim.add_argument(
        "--rescale_betas_zero_snr",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="end in pure noise; needs v prediction",
    )
    run.add_argument("--num_validation_images", type=int, default=256, help="of the validation loss")


def noise_shift(text: str) -> float | str:
    """A number above 0, or `"auto"`."""
    if text == "auto":
        return text
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f'must be above 0 or "auto", but is {value}')
    return value


def add_run_arguments(parser: argparse.ArgumentParser, output_dir: str, steps: int):
    """Flags of output, logging, checkpoints and the Hub; `steps` is the default of all intervals but the logs'."""
    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", default=output_dir)
    run.add_argument("--logging_dir", default="logs")
    run.add_argument("--logging_steps", type=positive, default=10, help="steps between two lines of the log")
    run.add_argument("--report_to", default="tensorboard")
    run.add_argument("--checkpointing_steps", type=positive, default=steps)
    run.add_argument("--checkpoints_total_limit", type=int)
    run.add_argument("--resume_from_checkpoint", help='"latest", a checkpoint, or "none"')
    run.add_argument("--validation_steps", type=positive, default=steps)
    run.add_argument("--push_to_hub", action=argparse.BooleanOptionalAction, default=False)
    run.add_argument("--hub_model_id")
    run.add_argument("--hub_token")
    run.add_argument(
        "--dry_run",
        action="store_true",
        help="print configuration, sizes, memory and an estimate of the time, from a few real steps; writes nothing",
    )
    return run


def parse_args_with_recipe(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """
    Parse a command line whose `--config recipe.yaml` may hold further flags; those of the command line win.

    A recipe maps flags, without their dashes, to values. `true` and `false` set and clear a boolean flag, which must
    be an `argparse.BooleanOptionalAction` so that the command line can turn it back.

    Args:
        parser (`argparse.ArgumentParser`): With `allow_abbrev=False`; gets the flag `--config`.
        argv (`list[str]`, *optional*): Default: the process's own arguments.

    Raises:
        SystemExit: after a message, if the recipe cannot be read or holds an unknown flag or a bad value.
    """
    parser.add_argument("--config", help="YAML file of flags; flags on the command line win")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    found, given = finder.parse_known_args(argv)
    if found.config is None:
        return parser.parse_args(given)
    try:
        flags = _read_recipe(Path(found.config))
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"--config {found.config}: {error}")
    return parser.parse_args([*flags, *given, "--config", found.config])


def _read_recipe(path: Path) -> list[str]:
    # Scalars stay strings, for the parser to convert: YAML itself would make `no` a boolean.
    values = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    if not isinstance(values, dict):
        raise ValueError("a recipe must map flags to values")
    return [_flag(name, value) for name, value in values.items()]


def _flag(name: str, value) -> str:
    if value in ("true", "false"):
        return f"--{name}" if value == "true" else f"--no-{name}"
    if not isinstance(value, str):
        raise ValueError(f"`{name}` must be a number, a string, true or false, but is {value!r}")
    return f"--{name}={value}"
