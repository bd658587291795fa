import argparse
from dataclasses import dataclass, fields
from typing import ClassVar

import pytest

from diffusers_pq.flags import Command, Options, changed_on_resuming, flag, parse, trained_unlike, unlike
from diffusers_pq.training.denoiser import Stage, parse_stages
from diffusers_pq.training.latent_diffusion import LatentDiffusionOptions
from diffusers_pq.training.pqgan import PQGANOptions
from diffusers_pq.training.stable_diffusion import AdaptationOptions


@dataclass(kw_only=True)
class Learning(Options):
    title: ClassVar[str] = "learning"

    rate: float = flag(0.1, "how fast", above=0, below=1)
    steps: int = flag(3, "how long", minimum=1, fixed=True)
    kind: str = flag("a", "which", choices=("a", "b"))
    names: list[str] = flag([], "of what", differs="always")
    workers: int = flag(0, "readers", minimum=0, differs="between machines")


@dataclass(kw_only=True)
class Program(Command):
    learning: Learning


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--rate", "1"], "--rate: must be above 0 and below 1, but is 1.0"),
        (["--steps", "-5"], "--steps: must be at least 1, but is -5"),
        (["--kind", "c"], "argument --kind: invalid choice: 'c'"),
        (["--rate", "nan"], "--rate: must be above 0 and below 1, but is nan"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_flag(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse(Program, argv)
    assert message in capsys.readouterr().err


def test_values_are_checked_without_a_command_line_too():
    with pytest.raises(ValueError, match="--kind: must be one of a, b, but is 'c'"):
        Program.of({"kind": "c"})


def test_help_shows_a_sentence_and_the_default(capsys):
    with pytest.raises(SystemExit):
        parse(Program, ["--help"])
    assert "how fast (default: 0.1)" in capsys.readouterr().out


def test_options_are_grouped_values_and_go_back_to_flags():
    options = Program.of(parse(Program, ["--rate", "0.5", "--names", "x", "y"]))
    assert options.learning == Learning(rate=0.5, names=["x", "y"])
    assert Program.of(options.settings()) == options


def test_runs_that_are_compared_may_differ_in_what_the_fields_say():
    one, other = (Program.of({"rate": rate, "names": [str(rate)], "workers": int(rate * 10)}) for rate in (0.1, 0.5))
    found, wanted = one.settings(), other.settings()
    assert trained_unlike(Program, found, wanted) == {"rate": (0.1, 0.5)}
    assert trained_unlike(Program, found, wanted, between_machines=False).keys() == {"rate", "workers"}
    assert trained_unlike(Program, found, wanted, own=("rate",)) == {}
    assert changed_on_resuming(Program, found, wanted | {"steps": 4}) == {"steps": (3, 4)}


def test_settings_of_an_earlier_version_have_the_defaults_of_what_they_lack():
    assert trained_unlike(Program, {"steps": 3}, Program.of({}).settings()) == {}
    assert unlike({}, {"a": 1}) == {"a": (None, 1)}


@pytest.mark.parametrize("command", [PQGANOptions, LatentDiffusionOptions, AdaptationOptions])
def test_every_flag_of_training_is_explained_once(command):
    names = [name for group in command.groups().values() for name in (field.name for field in fields(group))]
    assert len(names) == len(set(names))
    assert all(field.metadata["help"] for field in command.flags().values())


def test_stages_are_read_as_a_string_and_as_mappings():
    mapping = {"resolution": "384", "steps": "20000", "learning_rate": "8e-5", "trained": "conv"}
    assert parse_stages([mapping]) == parse_stages("384:20000:8e-5:conv") == (Stage(384, 20000, 8e-5, "conv"),)
    for bad in ("", [], [{"resolution": 1}], [mapping | {"steps": "-2"}], [mapping | {"trained": "some"}]):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_stages(bad)
