import argparse
import runpy
from pathlib import Path

import pytest

from diffusers_pq.flags import parse_args_with_recipe
from diffusers_pq.training.latent_diffusion import LatentDiffusionOptions
from diffusers_pq.training.options import OptimisationOptions
from diffusers_pq.training.pqgan import AutoencoderOptimisationOptions, PQGANOptions
from diffusers_pq.training.stable_diffusion import AdaptationOptions


ROOT = Path(__file__).parents[2]
RECIPE_FOLDER = ROOT / "training_scripts" / "recipes"
RECIPES = sorted(RECIPE_FOLDER.glob("*.yaml"))


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
        ("flip: 7", "`flip` must be true or false, but is '7'"),
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
SCRIPTS = {kind: f"training_scripts/train_{kind}.py" for kind in ("pqgan", "ldm", "masked")}


def parse_recipe(recipe, *needed):
    script = runpy.run_path(SCRIPTS.get(recipe.stem.split("-")[0], TRAIN_PQSD))
    return script["parse_args"](["--config", str(recipe), *needed])


# As printed; a row of PQSD is a stage of its training.
TABLE_4 = """
PQGAN (All)         | ImageNet      | 256 x 256   | 1M   | 20 | 4.5e-6
PQGAN (Fine-Tuning) | ImageNet      | 768 x 768   | 200k | 15 | 4.5e-6
PQSD-Precise        | Unsplash-Full | 384 x 384   | 20k  | 32 | 8e-5
PQSD-Precise        | Unsplash-Full | 768 x 768   | 800k | 32 | 8e-5
PQSD-Precise        | Unsplash-Full | 768 x 768   | 200k | 32 | 2e-5
PQSD-Quick          | Unsplash-Full | 384 x 384   | 20k  | 32 | 8e-5
PQSD-Quick          | Unsplash-Full | 768 x 768   | 800k | 32 | 8e-5
PQSD-Quick          | Unsplash-Full | 768 x 768   | 200k | 32 | 2e-5
PQSD-HR             | Unsplash-Full | 384 x 384   | 20k  | 32 | 8e-5
PQSD-HR             | Unsplash-Full | 768 x 768   | 400k | 32 | 8e-5
PQSD-HR             | Unsplash-Full | 1024 x 1024 | 400k | 32 | 8e-5
PQSD-HR             | Unsplash-Full | 1536 x 1536 | 200k | 32 | 2e-5
"""
# Recipe -> row of Table 4
PAPERS_RECIPES = {
    **dict.fromkeys(("pqgan-f8", "pqgan-f16", "pqgan-f16-d256", "pqgan-f32"), "PQGAN (All)"),
    **dict.fromkeys(("pqgan-f8-768", "pqgan-f16-768", "pqgan-f16-d256-768", "pqgan-f32-768"), "PQGAN (Fine-Tuning)"),
    **{"pqsd-precise": "PQSD-Precise", "pqsd-quick": "PQSD-Quick", "pqsd-hr": "PQSD-HR"},
}
# Table 5: batch size and steps
LDM = ("ldm-f8", "ldm-f16", "ldm-sd-vae", "ldm-dit-f8", "ldm-dit-f16")
# What the mini recipes leave to the command line
MINI = {
    "pqgan-mini": ("--model_config_name_or_path", "model_cards/pqgan-mini-f8-pq"),
    "pqgan-mini-sweep": (),
    "sd-mini": ("--pretrained_model_name_or_path", "runs/sd-mini-untrained"),
    "sd-emoji": ("--pretrained_model_name_or_path", "runs/sd-emoji-untrained"),
    "ldm-mini": ("--vae_name_or_path", "model_cards/pqgan-mini-f8-pq"),
    "masked-mini": (),
}
# Of what the paper does not train
OWN = {"masked-f16": (), "pqsdxl-quick": (), "pqsdxl-hr": ()}


def table_4():
    """Model -> its rows as (side, steps, batch size, learning rate)."""
    rows = {}
    for line in TABLE_4.strip().splitlines():
        model, _, resolution, steps, batch, rate = (cell.strip() for cell in line.split("|"))
        thousands = int(steps.replace("M", "000").rstrip("k"))
        side = int(resolution.split(" x ")[0])
        rows.setdefault(model, []).append((side, 1000 * thousands, int(batch), float(rate)))
    return rows


@pytest.fixture
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_every_recipe_is_compared_with_the_paper_or_is_a_small_one_or_our_own():
    assert {path.stem for path in RECIPES} == {*PAPERS_RECIPES, *LDM, *MINI, *OWN}


@pytest.mark.parametrize("name, flags", (MINI | OWN).items(), ids=MINI | OWN)
def test_small_recipes_and_our_own_fit_their_scripts(name, flags, at_the_root):
    parse_recipe(RECIPE_FOLDER / f"{name}.yaml", *flags)


@pytest.mark.parametrize("name", [name for name in PAPERS_RECIPES if name.startswith("pqgan")])
def test_recipes_of_pqgan_are_those_of_table_4(name, at_the_root):
    args = parse_recipe(RECIPE_FOLDER / f"{name}.yaml")
    (row,) = table_4()[PAPERS_RECIPES[name]]
    assert (args.resolution, args.max_train_steps, args.total_batch_size, args.learning_rate) == row
    assert args.train_batch_size is None and args.dataset_name == "ILSVRC/imagenet-1k"
    # The authors' loader: every picture, whole, to a square, by torchvision's default filter
    assert (args.resize_mode, args.image_interpolation_mode) == ("stretch", "bilinear")
    assert not args.random_flip and args.min_image_side == args.crops_per_image == 1
    # VQGAN's, which appendix A.1 takes over
    assert (args.perceptual_weight, args.codebook_weight, args.discriminator_weight) == (1.0, 1.0, 0.8)
    assert (args.lr_scheduler, args.lr_warmup_steps, args.adam_beta1, args.adam_beta2) == ("constant", 0, 0.5, 0.9)
    assert (args.weight_init, args.codebook_init, args.quantize_from_step) == ("default", "normal", 0)
    if name.endswith("-768"):
        assert args.pretrained_model_name_or_path == f"runs/{name.removesuffix('-768')}"
    else:
        assert args.model_config_name_or_path == f"model_cards/{name}/config.json"
        assert Path(args.model_config_name_or_path).exists()


@pytest.mark.parametrize("name", [name for name in PAPERS_RECIPES if name.startswith("pqsd")])
def test_recipes_of_pqsd_are_those_of_table_4(name, at_the_root):
    args = parse_recipe(RECIPE_FOLDER / f"{name}.yaml")
    rows = table_4()[PAPERS_RECIPES[name]]
    stages = [(stage.resolution, stage.steps, stage.learning_rate) for stage in args.stages]
    assert stages == [(side, steps, rate) for side, steps, _, rate in rows]
    assert {args.total_batch_size} == {batch for _, _, batch, _ in rows} and args.train_batch_size is None
    # Section 3.2: the outer convolutions first, then everything; "copying the previous pre-trained weights"
    assert [stage.trained for stage in args.stages] == ["conv"] + ["all"] * (len(rows) - 1)
    assert args.unet_init == "copy"
    assert args.max_train_steps == sum(steps for _, steps, _, _ in rows) == 1_020_000
    assert not args.random_flip and args.resize_mode == "short_side"
    factor = {"pqsd-precise": "f8"}.get(name, "f16-d256")
    assert args.vae_name_or_path == f"runs/pqgan-{factor}-768"


@pytest.mark.parametrize(("name", "side"), [("pqsdxl-quick", 1024), ("pqsdxl-hr", 2048)])
def test_recipes_of_stable_diffusion_xl_begin_with_the_outer_layers_and_end_at_their_size(name, side, at_the_root):
    args = parse_recipe(RECIPE_FOLDER / f"{name}.yaml")
    assert [stage.trained for stage in args.stages] == ["conv"] + ["all"] * (len(args.stages) - 1)
    assert args.stages[-1].resolution == side and args.vae_name_or_path == "runs/pqgan-f16-d256-768"
    assert args.max_train_steps == sum(stage.steps for stage in args.stages)


@pytest.mark.parametrize("name", LDM)
def test_recipes_of_latent_diffusion_are_those_of_table_5(name, at_the_root):
    args = parse_recipe(RECIPE_FOLDER / f"{name}.yaml")
    assert (args.resolution, args.total_batch_size, args.max_train_steps) == (256, 64, 2_000_000)
    assert args.train_batch_size is None and Path(args.model_config_name_or_path).exists()


def test_the_total_batch_is_shared_out_or_refused():
    def share_out(num_processes, **given):
        options = AutoencoderOptimisationOptions(**given)
        options.share_out_batch(num_processes)
        return options.train_batch_size

    assert share_out(1) == 20 and OptimisationOptions.usual_batch_size == 8
    assert share_out(4, total_batch_size=20) == 5
    assert share_out(2, total_batch_size=20, gradient_accumulation_steps=5) == 2
    assert share_out(4, train_batch_size=3) == 3
    assert share_out(2, train_batch_size=5, total_batch_size=20, gradient_accumulation_steps=2) == 5
    with pytest.raises(ValueError, match="20 does not divide by 3 processes x --gradient_accumulation_steps 1"):
        share_out(3, total_batch_size=20)
    with pytest.raises(ValueError, match="20 is not --train_batch_size 8 x 1 processes .* leave out"):
        share_out(1, total_batch_size=20, train_batch_size=8)


def test_the_table_of_flags_says_what_each_script_takes():
    text = (ROOT / "training_scripts" / "README.md").read_text(encoding="utf-8")
    lines = text.partition("## Flags of diffusers' scripts\n")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip(" `-") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `--")]
    assert len(rows) > 10
    commands = PQGANOptions, AdaptationOptions, LatentDiffusionOptions
    for flag, *scripts, reason in rows:
        expected = ["yes" * (flag in command.flags()) for command in commands]
        assert scripts == expected and bool(reason) == ("" in expected), flag
