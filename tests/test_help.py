"""`--help` and the ranges of the flags of every command, script, experiment and benchmark."""

import argparse
import ast
import functools
import re
import runpy
import sys
from pathlib import Path

import pytest
from test_console import SCRIPTS

from diffusers_pq.cli import _build_parser
from diffusers_pq.flags import FlagParser, device, output_file, output_folder
from diffusers_pq.training.latent_diffusion import LatentDiffusionOptions
from diffusers_pq.training.masked import MaskedOptions
from diffusers_pq.training.options import RunOptions
from diffusers_pq.training.pqgan import PQGANOptions
from diffusers_pq.training.stable_diffusion import AdaptationOptions


ROOT = Path(__file__).parents[1]
COMMANDS = next(action for action in _build_parser()._actions if action.dest == "command").choices
TRAININGS = {
    "train_pqgan.py": PQGANOptions,
    "train_ldm.py": LatentDiffusionOptions,
    "train_masked.py": MaskedOptions,
    "train_pqsd.py": AdaptationOptions,
}
# Numbers that may be anything: the sign of the power says which channels weigh more.
UNBOUNDED = {"channel_weighting"}


@pytest.fixture
def parser_of(monkeypatch):
    """Makes the parser of a script, which is caught before it reads anything."""

    def make(script):
        caught = []
        monkeypatch.setattr(FlagParser, "parse_known_args", lambda self, *_: caught.append(self) or sys.exit(0))
        program = runpy.run_path(str(script))
        with pytest.raises(SystemExit):
            program["parse_args"]([]) if "parse_args" in program else program["main"]()
        return caught[0]

    return make


def unexplained(parser):
    """The flags without a sentence, or whose default one cannot see."""
    formatter = parser._get_formatter()
    flags = [action for action in parser._actions if action.default is not argparse.SUPPRESS]
    for action in flags:
        text = formatter._expand_help(action) if action.help else ""
        is_optional = action.option_strings and not action.required
        if len(text.split()) < 3 or (is_optional and "default" not in text):
            yield action.option_strings or action.dest, text


def unbounded(parser):
    return [action.dest for action in parser._actions if action.type in (int, float)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_flag_of_a_script_has_a_sentence_its_default_and_bounds(script, parser_of):
    parser = parser_of(script)
    assert not list(unexplained(parser))
    assert script.name in TRAININGS or not unbounded(parser)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_a_command_has_a_sentence_its_default_and_bounds(name):
    assert not list(unexplained(COMMANDS[name]))
    assert set(unbounded(COMMANDS[name])) <= {"image_mean", "image_std"}, "the conversion looks at them together"


@pytest.mark.parametrize("command", TRAININGS.values())
def test_every_number_of_a_training_has_bounds(command):
    bounds = ("minimum", "above", "maximum", "below")
    for name, field in command.flags().items():
        is_number = field.type in (int, float, int | None, float | None)
        has_bounds = any(field.metadata[bound] is not None for bound in bounds)
        assert has_bounds or not is_number or name in UNBOUNDED, name


@pytest.mark.parametrize("text, shown", [("none", None), ("on", True), ("off", False), ("1 2", [1, 2]), ("5%", "5%")])
def test_a_default_is_shown_as_one_would_give_it(text, shown):
    parser = FlagParser()
    parser.add_argument("--flag", default=shown, help="what it does")
    assert f"what it does (default: {text})" in parser.format_help()


# Where a user or a test meets a flag. A script's own lines do not count as use of its flags, but its introduction is.
GUIDES = [ROOT / "README.md", ROOT / "Makefile"]
for folder in ("docs", "tests", "training_scripts", "experiments", "benchmarks"):
    for suffix in ("md", "yaml", "ipynb", "py"):
        GUIDES += sorted((ROOT / folder).rglob(f"*.{suffix}"))


@functools.cache
def used_in(path):
    """The flags in a file; of a recipe, its keys."""
    text = path.read_text(encoding="utf-8")
    keys = re.findall(r"^(\w+):", text, re.MULTILINE) if path.suffix == ".yaml" else []
    return {*re.findall(r"(?<![\w-])--[a-z][\w-]*", text), *(f"--{key}" for key in keys)}


def unused(parser, script=None):
    introduction = ast.get_docstring(ast.parse(script.read_text())) if script else ""
    used = {*re.findall(r"--[a-z][\w-]*", introduction)}.union(*(used_in(path) for path in GUIDES if path != script))
    flags = [action.option_strings for action in parser._actions if action.option_strings and action.dest != "help"]
    return [names[0] for names in flags if not used.intersection(names)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_flag_of_a_script_is_in_a_recipe_a_guide_or_a_test(script, parser_of):
    assert not unused(parser_of(script), script)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_a_command_is_in_a_guide_or_a_test(name):
    assert not unused(COMMANDS[name])


NONSENSE = [
    ("train_pqgan.py", "--ema_decay", "2"),
    ("train_pqgan.py", "--max_grad_norm", "-1"),
    ("train_pqgan.py", "--max_train_steps", "-5"),
    ("train_pqgan.py", "--checkpoints_total_limit", "-1"),
    ("train_pqgan.py", "--learning_rate", "inf"),
    ("train_pqgan.py", "--learning_rate", "nan"),
    ("train_pqsd.py", "--stages", "32:-2:1e-3:all"),
    ("train_pqsd.py", "--stages", "32:2:nan:all"),
    ("train_pqsd.py", "--stages", "32:2:inf:all"),
    ("train_pqsd.py", "--lora_rank", "0"),
    ("train_pqsd.py", "--noise_offset", "-0.1"),
    ("train_ldm.py", "--noise_shift", "nan"),
    ("train_masked.py", "--label_smoothing", "1"),
    ("encode_dataset.py", "--batch_size", "0"),
    ("evaluate_reconstruction.py", "--max_samples", "-3"),
    ("evaluate_generation.py", "--num_inference_steps", "0"),
    ("create_stable_diffusion.py", "--vocab_size", "many"),
    ("sweep_pqgan.py", "--codebook_size", "0"),
    ("rate_distortion.py", "--qualities", "101"),
]


@pytest.mark.parametrize("name, flag, value", NONSENSE)
def test_an_absurd_value_ends_in_one_line_that_names_flag_and_value(name, flag, value, capsys):
    script = next(path for path in SCRIPTS if path.name == name)
    needed = ("--pretrained_model_name_or_path", "m") if name == "train_pqsd.py" else ()
    if name in ("train_ldm.py", "train_masked.py"):
        needed = ("--vae_name_or_path", "m", "--model_config_name_or_path", "c")
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script))["parse_args"]([*needed, flag, value])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and flag in line and value in line


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_output_is_checked_before_anything_is_done(script, parser_of):
    actions = [action for action in parser_of(script)._actions if action.dest == "output_dir"]
    assert script.name in TRAININGS or all(action.type is output_folder for action in actions)
    assert all(action.type is output_file for action in parser_of(script)._actions if action.dest == "output")


MEASURING = [path for path in SCRIPTS if path.parent.name in ("benchmarks", "experiments")]
MEASURING = [path for path in MEASURING if path.name != "update_pages.py"]  # which renders what is there


def calls(tree, *names):
    """The calls of functions or methods by these names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None)) in names:
            yield node


@pytest.mark.parametrize("script", MEASURING, ids=lambda path: path.name)
def test_results_are_written_by_default_only_and_never_in_small(script):
    tree = ast.parse(script.read_text())
    introduction = ast.get_docstring(tree, clean=False)
    with_defaults = calls(tree, "add_argument", "results_folder", "MeasuringParser")
    defaults = {node for call in with_defaults for node in ast.walk(call)}
    joined = {node.right for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node not in defaults and node.value != introduction:
            assert not re.search(r"(benchmarks|experiments)/results\b", str(node.value))
            assert node.value != "results" or node not in joined
    has_small = any(call.args[0].value == "--small" for call in calls(tree, "add_argument"))
    has_small = has_small or any(calls(tree, "MeasuringParser"))
    for call in calls(tree, "results_folder"):
        assert [ast.unparse(part) for part in call.args[2:]] == (["args.small"] if has_small else [])


@pytest.mark.parametrize("script", MEASURING, ids=lambda path: path.name)
def test_what_is_tried_in_small_is_not_among_the_results(script, parser_of):
    actions = {action.dest: action for action in parser_of(script)._actions}
    if "small" in actions and actions["output_dir"].default is not None:
        assert "results" not in Path(actions["output_dir"].default).parts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_devices_and_precisions_are_checked_by_their_flags(script, parser_of):
    _check_devices_and_precisions(parser_of(script))


@pytest.mark.parametrize("name", COMMANDS)
def test_devices_and_precisions_of_the_command_are_checked_by_their_flags(name):
    _check_devices_and_precisions(COMMANDS[name])


def _check_devices_and_precisions(parser):
    for action in parser._actions:
        assert action.dest != "device" or action.type is device
        assert action.dest not in ("dtype", "mixed_precision") or action.choices


def test_an_output_that_cannot_be_written_is_named_with_its_flag(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(argparse.ArgumentTypeError, match="file is a file"):
        output_folder(str(tmp_path / "file" / "folder"))
    with pytest.raises(argparse.ArgumentTypeError, match="file is a file"):
        output_file(str(tmp_path / "file" / "picture.png"))
    with pytest.raises(ValueError, match="--output_dir: .*file is a file"):
        RunOptions(output_dir=str(tmp_path / "file"))
    assert output_folder(str(tmp_path / "new")) == tmp_path / "new"
