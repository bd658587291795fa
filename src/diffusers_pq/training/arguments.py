"""Recipes: command-line flags kept in a YAML file."""

import argparse
from pathlib import Path

import yaml


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
