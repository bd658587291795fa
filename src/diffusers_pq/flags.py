"""
Options as values: dataclasses whose fields say what a command line, a recipe and a comparison of runs need to know.

A class derived from [`Options`] is a group of flags; one derived from [`Command`] holds the groups of a program, and
[`parse`] makes its values from a command line and a recipe, flags kept in a YAML file.
"""

import argparse
import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


DTYPES = ("float32", "float16", "bfloat16")
REQUIRED = object()
SECRETS = ("hub_token",)  # never written to a file
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def named(text: str) -> tuple[str, str]:
    """The type of flags that give a name to something: `NAME=VALUE`."""
    name, _, value = text.partition("=")
    if not (name and value):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, but is {text!r}")
    return name, value


def number(
    kind: type,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> Callable[[str], int | float]:
    """
    The type of flags that are numbers within bounds, for parsers that are not made of [`Options`].

    Args:
        kind (`type`): `int` or `float`.
        minimum, above, maximum, below (`float`, *optional*): Bounds of the value, the first and the third included.
    """

    def convert(text):
        value = kind(text)
        if complaint := _out_of_range(value, minimum, above, maximum, below):
            raise argparse.ArgumentTypeError(f"{complaint}, but is {text}")
        return value

    convert.__name__ = kind.__name__  # argparse's "invalid int value"
    return convert


COUNT = number(int, minimum=1)
COUNT_OR_NONE = number(int, minimum=0)
SEED = number(int, minimum=0, maximum=2**32 - 1)
SCALE = number(float, minimum=0)


def device(text: str) -> str:
    """The type of flags that name a device of this machine."""
    from .devices import usable_device  # which imports torch

    try:
        return usable_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def output_folder(text: str) -> Path:
    """The type of flags that name a folder to write to, which may not exist yet."""
    from .files import check_output_folder  # which imports more than `--help` needs

    return _checked_path(text, check_output_folder)


def output_file(text: str) -> Path:
    """The type of flags that name a file to write, or to replace."""
    from .files import check_output

    return _checked_path(text, check_output)


def _checked_path(text, check):
    try:
        check(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


class FlagParser(argparse.ArgumentParser):
    """A parser whose `--help` shows the defaults of all flags, and whose errors are one line."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": _HelpFormatter, "allow_abbrev": False} | options)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (`--help` explains the flags)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        text = action.help or ""
        stated = not action.option_strings or action.required or "default" in text
        if stated or action.default is argparse.SUPPRESS:
            return text
        return f"{text} (default: {_shown(action.default)})"


def _shown(default):
    if default in (None, "", []):
        return "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, list | tuple):
        return " ".join(map(str, default))
    return str(default).replace("%", "%%")


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    parse: Callable[[Any], Any] | None = None,
    structured: bool = False,
    differs: str = "never",
    fixed: bool = False,
) -> Any:
    """
    A field of an [`Options`] class. Its annotation is `bool`, `int`, `float`, `str`, one of these or `None`, a `list`
    of these, or what `parse` makes.

    Args:
        default: `REQUIRED` if there is none.
        help (`str`): What the flag does; its default is added.
        choices (*optional*): The only values that are allowed.
        minimum, above, maximum, below (`float`, *optional*): Bounds of the value, the first and the third included.
        parse (*optional*): Makes the value, or each of a list, from a command line's text.
        structured (`bool`): Whether `parse` also takes the lists and mappings of a recipe.
        differs (`str`): Whether two runs that are compared may differ in it. `"never"`: what is learned depends on it.
            `"between machines"`: it is how a machine does the same work. `"always"`: it is about names, files or logs.
        fixed (`bool`): Whether a run that is resumed must keep it.
    """
    given = {"choices": choices, "minimum": minimum, "above": above, "maximum": maximum, "below": below}
    given |= {"parse": parse, "structured": structured, "help": help, "differs": differs, "fixed": fixed}
    return _field(default, given)


def with_default(group: type["Options"], name: str, default: Any) -> Any:
    """The same flag as in another group, but for its default; for derived groups."""
    (field,) = (field for field in dataclasses.fields(group) if field.name == name)
    return _field(default, field.metadata)


def _field(default, metadata):
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Options:
    """
    A group of flags.

    Raises:
        ValueError: if a value lies out of the range or the choices of its field, or values contradict each other; the
            message names the flag.
    """

    title: typing.ClassVar[str] = "options"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_value(field.name, getattr(self, field.name), field.metadata)
        self.check()

    def check(self):
        """Raise a `ValueError` if values of the group contradict each other."""


@dataclass(kw_only=True)
class Command:
    """The groups of flags of a program; raises a `ValueError` if they contradict each other."""

    def __post_init__(self):
        self.check()

    def check(self):
        """Raise a `ValueError` if values of different groups contradict each other."""

    @classmethod
    def groups(cls) -> dict[str, type[Options]]:
        """The classes of the groups, by their names."""
        return {name: kind for name, kind in typing.get_type_hints(cls).items() if isinstance(kind, type)}

    @classmethod
    def flags(cls) -> dict[str, dataclasses.Field]:
        """All fields of all groups, by their names."""
        return {field.name: field for group in cls.groups().values() for field in dataclasses.fields(group)}

    @classmethod
    def of(cls, args: argparse.Namespace | Mapping[str, Any]) -> "Command":
        """The values of flags that are given by name; the others have their defaults."""
        given = args if isinstance(args, Mapping) else vars(args)
        return cls(**{name: _from(group, given) for name, group in cls.groups().items()})

    def values(self) -> dict[str, Any]:
        """The values of all flags, by their names."""
        groups = (getattr(self, name) for name in self.groups())
        return {field.name: getattr(group, field.name) for group in groups for field in dataclasses.fields(group)}

    def settings(self) -> dict[str, Any]:
        """[`values`] as JSON has them, without secrets."""
        public = {name: value for name, value in self.values().items() if name not in SECRETS}
        return json.loads(json.dumps(public, default=str))


def _from(group, given):
    return group(**{field.name: given[field.name] for field in dataclasses.fields(group) if field.name in given})


def _check_value(name, value, metadata):
    if value is None:
        return
    choices = metadata["choices"]
    for one in value if isinstance(value, list) else [value]:
        if choices is not None and one not in choices:
            raise ValueError(f"--{name}: must be one of {', '.join(map(str, choices))}, but is {one!r}")
        complaint = _out_of_range(one, *(metadata[bound] for bound in ("minimum", "above", "maximum", "below")))
        if complaint:
            raise ValueError(f"--{name}: {complaint}, but is {one}")


def _out_of_range(value, minimum, above, maximum, below) -> str | None:
    """What a number must be, if it is not; others are in range."""
    if not isinstance(value, int | float):
        return None
    bounds = {"at least": minimum, "above": above, "at most": maximum, "below": below}
    held = (
        minimum is None or value >= minimum,
        above is None or value > above,
        maximum is None or value <= maximum,
        below is None or value < below,
    )
    if all(held) and math.isfinite(value):
        return None
    return "must be " + (
        " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None) or "finite"
    )


def unlike(
    found: Mapping[str, Any], wanted: Mapping[str, Any], names: Collection[str] | None = None, defaults: Mapping = {}
) -> dict[str, tuple[Any, Any]]:
    """
    What differs between two settings, as JSON has them.

    Args:
        found, wanted (`Mapping`): The two settings.
        names (*optional*): Compare only these. Default: those of `wanted`.
        defaults (`Mapping`): Values of settings that one of them lacks, such as files of earlier versions do.

    Returns:
        `dict[str, tuple]`: The values in `found` and in `wanted`, by name.
    """
    pairs = {}
    for name in wanted if names is None else names:
        pair = tuple(json.loads(json.dumps(one.get(name, defaults.get(name)), default=str)) for one in (found, wanted))
        if pair[0] != pair[1]:
            pairs[name] = pair
    return pairs


def trained_unlike(
    command: type[Command],
    found: Mapping[str, Any],
    wanted: Mapping[str, Any],
    between_machines: bool = True,
    own: Collection[str] = (),
) -> dict[str, tuple[Any, Any]]:
    """
    In which flags two runs differ although they are compared.

    Args:
        command (`type[Command]`): Of both runs.
        found, wanted (`Mapping`): Settings of the two.
        between_machines (`bool`): Whether they may differ in how a machine does its work.
        own: Flags in which they may differ, since that is what is compared.

    Returns:
        `dict[str, tuple]`: See [`unlike`].
    """
    allowed = {"always", "between machines"} if between_machines else {"always"}
    flags = {name: field for name, field in command.flags().items() if field.metadata["differs"] not in allowed}
    return unlike(found, wanted, [name for name in flags if name not in own], _defaults(command))


def as_flag(name: str, value: Any) -> str:
    """How a command line says that a flag has a value."""
    if value is None or value == []:
        return f"no --{name}"
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def changed_on_resuming(
    command: type[Command], found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """The flags that a run should have kept when it was resumed, as [`unlike`] returns them."""
    names = [name for name, field in command.flags().items() if field.metadata["fixed"] and name in found]
    return unlike(found, wanted, names, _defaults(command))


def _defaults(command):
    return {name: _default(field) for name, field in command.flags().items()}


def _default(field):
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def add_flags(parser: argparse.ArgumentParser, group: type[Options]):
    """Add a group's flags to a parser, under the group's title."""
    section = next((found for found in parser._action_groups if found.title == group.title), None)
    section = section or parser.add_argument_group(group.title)
    hints = typing.get_type_hints(group)
    for field in dataclasses.fields(group):
        text = field.metadata["help"].replace("%", "%%")
        action = section.add_argument(f"--{field.name}", help=text, **_argument(field, hints[field.name]))
        action.structured = field.metadata["structured"]
        if action.required:
            continue
        action.default = _default(field)


def _argument(field, annotation) -> dict:
    """What argparse is to know of a field."""
    required = {"required": field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING}
    kind = annotation
    if isinstance(annotation, types.UnionType):
        kind = next(one for one in typing.get_args(annotation) if one is not types.NoneType)
    if kind is bool:
        return required | {"action": argparse.BooleanOptionalAction, "default": argparse.SUPPRESS}
    more = {"choices": field.metadata["choices"]} if field.metadata["choices"] else {}
    if typing.get_origin(kind) is list:
        (kind,) = typing.get_args(kind)
        more |= {"nargs": "*"}
    return required | more | {"type": field.metadata["parse"] or kind}


def parse(command: type[Command], argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """
    The flags of a program, each in its range; `command.of` makes the program's options of them.

    Args:
        command (`type[Command]`): The program's options.
        argv (`list[str]`, *optional*): Default: the process's own arguments.
        description (`str`, *optional*): For `--help`.

    Raises:
        SystemExit: after a message of one line, if a flag or the recipe is wrong.
    """
    parser = FlagParser(description=description)
    for group in command.groups().values():
        add_flags(parser, group)
    args = parse_args_with_recipe(parser, argv)
    try:
        options = command.of(args)
    except ValueError as error:
        parser.error(str(error))
    return argparse.Namespace(**options.values(), config=args.config)


def parse_args_with_recipe(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """
    Parse a command line whose `--config recipe.yaml` may hold further flags; those of the command line win.

    A recipe maps flags, without their dashes, to values: numbers, strings, `true` and `false`; lists for flags that
    take several values; and what else a flag documents. An empty value leaves the flag at its default.

    Args:
        parser (`argparse.ArgumentParser`): With `allow_abbrev=False`; gets the flag `--config`.
        argv (`list[str]`, *optional*): Default: the process's own arguments.

    Raises:
        SystemExit: after a message, if the recipe cannot be read or holds an unknown flag or a bad value.
    """
    parser.add_argument("--config", help="YAML file of further flags; those on the command line win")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    found, given = finder.parse_known_args(argv)
    if found.config is None:
        return parser.parse_args(given)
    try:
        flags = _read_recipe(parser, Path(found.config))
    except (OSError, ValueError, RecursionError, argparse.ArgumentTypeError, yaml.YAMLError) as error:
        parser.error(f"--config {found.config}: {error}")
    return parser.parse_args([*flags, *given, "--config", found.config])


def _read_recipe(parser, path: Path) -> list[str]:
    # Scalars stay strings, for the parser to convert: YAML itself would make `no` a boolean.
    values = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    if not isinstance(values, dict):
        raise ValueError("a recipe must map flags to values")
    return [part for name, value in values.items() for part in _recipe_flag(parser, name, value)]


def _recipe_flag(parser, name: str, value) -> list[str]:
    action = parser._option_string_actions.get(f"--{name}")
    if value in ("", "~", "null"):
        return []
    if getattr(action, "structured", False) and not isinstance(value, str):
        action.default = action.type(value)
        action.required = False
        return []
    if isinstance(value, list) and action is not None and action.nargs in ("*", "+"):
        if all(isinstance(one, str) for one in value):
            return [f"--{name}", *value]
    if not isinstance(value, str):
        raise ValueError(f"`{name}` must be a number, a string, true or false, but is {value!r}")
    is_switch = action is not None and action.nargs == 0
    if is_switch and value.lower() not in _WORDS:
        raise ValueError(f"`{name}` must be true or false, but is {value!r}")
    if is_switch:
        return [f"--{name}" if _WORDS[value.lower()] else f"--no-{name}"]
    return [f"--{name}={value}"]
