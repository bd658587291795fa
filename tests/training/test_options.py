import argparse
import runpy
from pathlib import Path

import pytest

from diffusers_pq.flags import parse_args_with_recipe


ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "training_scripts" / "recipes").glob("*.yaml"))


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--learning_rate", type=float, default=1.0)
    parser.add_argument("--kind", choices=("a", "b", "no"), default="a")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, default=False)
    return parser


def write(folder, text):
    (folder / "recipe.yaml").write_text(text)
    return ["--config", str(folder / "recipe.yaml")]


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_defaults(parser, tmp_path):
    config = write(tmp_path, "learning_rate: 8e-5\nflip: true\n")
    args = parse_args_with_recipe(parser, [*config, "--kind", "b", "--no-flip"])
    assert (args.learning_rate, args.kind, args.flip) == (8e-5, "b", False)
    assert args.config == config[1]


def test_values_are_what_the_flag_makes_of_them(parser, tmp_path):
    args = parse_args_with_recipe(parser, write(tmp_path, "kind: no\nlearning_rate: 8e-5\n"))
    assert (args.kind, args.learning_rate) == ("no", 8e-5), "YAML 1.1 would read False and a string"


def test_works_without_a_recipe(parser):
    assert parse_args_with_recipe(parser, ["--flip"]).flip and parser.parse_args([]).config is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rat: 1", "unrecognized arguments: --learning_rat=1"),
        ("kind: c", "invalid choice: 'c'"),
        ("kind: [a, b]", r"`kind` must be a number, a string, true or false, but is ['a', 'b']"),
        ("just a string", "a recipe must map flags to values"),
        ("a: b: c", "mapping values are not allowed"),
    ],
)
def test_mistakes_in_a_recipe_are_named(parser, tmp_path, capsys, text, message):
    with pytest.raises(SystemExit):
        parse_args_with_recipe(parser, write(tmp_path, text))
    assert message in capsys.readouterr().err


def test_a_missing_recipe_is_named(parser, capsys):
    with pytest.raises(SystemExit):
        parse_args_with_recipe(parser, ["--config", "nowhere.yaml"])
    assert "--config nowhere.yaml" in capsys.readouterr().err


TRAIN_PQSD = "training_scripts/train_pqsd.py"
SCRIPTS = {"pqgan": "training_scripts/train_pqgan.py", "ldm": "training_scripts/train_ldm.py"}


def parse_recipe(recipe, *needed):
    script = runpy.run_path(SCRIPTS.get(recipe.stem.split("-")[0], TRAIN_PQSD))
    return script["parse_args"](["--config", str(recipe), *needed])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_fit_their_scripts(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    if recipe.stem.startswith("pqgan-mini"):
        parse_recipe(recipe, "--model_config_name_or_path", "model_cards/pqgan-mini-f8-pq")
    elif recipe.stem == "sd-mini":
        parse_recipe(recipe, "--pretrained_model_name_or_path", "runs/sd-mini-untrained")
    elif recipe.stem == "ldm-mini":
        parse_recipe(recipe, "--vae_name_or_path", "model_cards/pqgan-mini-f8-pq")
    elif recipe.stem.startswith("ldm"):
        # Table 5
        args = parse_recipe(recipe)
        assert (args.resolution, args.train_batch_size, args.max_train_steps) == (256, 64, 2_000_000)
        assert Path(args.model_config_name_or_path).exists()
    elif recipe.stem.startswith("pqsd"):
        # Table 4: a million steps after the 20,000 of the convolutions
        assert parse_recipe(recipe).max_train_steps == 1_020_000
    else:
        check_pqgan_recipe(recipe, parse_recipe(recipe))


def check_pqgan_recipe(recipe, args):
    source = args.model_config_name_or_path
    assert source is None or Path(source).exists()
    # Table 4 and appendix A.1
    fine_tuning = recipe.stem.endswith("-768")
    expected = (768, 15, 200_000) if fine_tuning else (256, 20, 1_000_000)
    assert (args.resolution, args.train_batch_size, args.max_train_steps) == expected
    assert (args.learning_rate, args.lr_scheduler, args.adam_beta1, args.adam_beta2) == (4.5e-6, "constant", 0.5, 0.9)
    if fine_tuning:
        assert args.pretrained_model_name_or_path == f"runs/{recipe.stem.removesuffix('-768')}"
