"""
Model cards: one template for the models of this repository and for those that the training scripts write.

`python -m diffusers_pq.hub.cards [FOLDER]` writes the README.md of each model that `cards.yaml` there describes.
"""

import os
from pathlib import Path

import torch
import yaml
from diffusers import DDIMScheduler, UNet2DConditionModel
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..autoencoders import AUTOENCODERS, downsampling_factor, load_autoencoder, weights_digest
from ..console import one_line_errors
from ..evaluation.systems import SYSTEMS
from ..files import read_json, replacing
from ..flags import FlagParser
from ..models.autoencoder_pq import PQModel
from ..models.widening import widen_unet
from ..tables import markdown_table
from .code import write_present_code
from .push import build_model, class_name, has_weights


TEMPLATE = Path(__file__).with_name("model_card_template.md")

# Where a repository keeps what its cards are made of.
_FACTS = "cards.yaml"
_RECIPES = "training_scripts/recipes"
_EVALUATIONS = "benchmarks/results/evaluation"
_PHOTOGRAPHS = "benchmarks/results/cpu/photographs.json"
_ADAPTATION = "experiments/results/adaptation.json"

_ADAPTER = "adapter"


def build_card(
    folder: str | os.PathLike,
    name: str,
    path: str,
    metadata: dict,
    validation: dict | None = None,
    evaluations: tuple[dict, ...] = (),
    **texts,
) -> ModelCard:
    """
    The card of an autoencoder, a pipeline or a LoRA adapter, from the template that all share.

    Args:
        folder (`str` or `os.PathLike`): With the model's configuration, and weights if there are.
        name (`str`): Title, and name in the `model-index`.
        path (`str`): What the example loads the model from: a folder or a Hub repository.
        metadata (`dict`): Of `ModelCardData`: `license`, `base_model`, `datasets`, `tags`, ...
        validation (`dict`, *optional*): What the training measured: `dataset` (its `dataset_type` and `dataset_name`),
            `note` and, by name, the `scores` of runs at a `step`; those of the first go into the `model-index`.
        evaluations (`tuple[dict]`, *optional*): What was measured afterwards: `table`, `command`, `date`, `machine`
            and the `entries` of the `model-index`.
        texts: Other variables of the template; those left out leave out their section.
    """
    kind = _kind(folder)
    task = "image-to-image" if kind in AUTOENCODERS else "text-to-image"
    results = [entry for evaluation in evaluations for entry in evaluation["entries"]]
    if validation is not None:
        results += _validation_entries(validation, task)
        texts["validation"] = f"{validation['note']}\n\n{_scores_table(validation['scores'])}"
    data = ModelCardData(
        **{"library_name": "diffusers", "pipeline_tag": task} | metadata,
        # Without results the Hub takes no `model-index`.
        **({"model_name": name, "eval_results": results} if results else {}),
    )
    variables = {
        "name": name,
        "path": path,
        "kind": kind,
        "has_weights": kind == _ADAPTER or has_weights(folder),
        "description": _describe(Path(folder), kind),
        "argument": _example_argument(Path(folder), kind, texts.get("prompt")),
        "evaluations": evaluations,
    }
    return ModelCard.from_template(data, template_path=str(TEMPLATE), **variables | texts)


def save_card(card: ModelCard, folder: str | os.PathLike) -> Path:
    """Write a card to a folder's `README.md`, whole or not at all."""
    path = Path(folder, "README.md")
    with replacing(path) as unfinished:
        card.save(unfinished)
    return path


def hub_id(name_or_path: str | None) -> str | None:
    """What `from_pretrained` or `load_dataset` would take from the Hub; `None` if it is a local path, or nothing."""
    if name_or_path is None or os.path.exists(name_or_path):
        return None
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return None
    return name_or_path


def _kind(folder: str | os.PathLike) -> str:
    """The class of an autoencoder or a pipeline; `train_pqsd.py --lora_rank` writes neither."""
    for name in ("model_index.json", "config.json"):
        if Path(folder, name).is_file():
            return class_name(Path(folder, name))
    return _ADAPTER


def _example_argument(folder: Path, kind: str, prompt: str | None) -> str:
    """What the example's pipeline is called with."""
    if kind == "LatentDiffusionPQPipeline":
        return "0"
    if kind == "MaskedPQPipeline" and not (folder / "text_encoder").is_dir():
        return "class_labels=0"
    return f'"{prompt or "A photograph."}"'


def _describe(folder: Path, kind: str) -> dict[str, str | int]:
    """What a card says of a model before all else, by label; read off its configuration."""
    if kind in AUTOENCODERS:
        return {"class": f"`{kind}`"} | _describe_autoencoder(build_model(folder))
    vae = build_model(folder / "vae")
    rows = {"class": "LoRA layers and two convolutions"}
    if kind != _ADAPTER:
        name, part = ("UNet", "unet") if (folder / "unet").is_dir() else ("transformer", "transformer")
        denoiser = build_model(folder / part)
        side = denoiser.config.sample_size * downsampling_factor(vae)
        rows = {"class": f"`{kind}`", "pictures": f"{side} x {side} pixels"}
        rows[f"parameters of the {name}"] = _millions(denoiser)
    return rows | {f"{label} of the autoencoder": value for label, value in _describe_autoencoder(vae).items()}


def _describe_autoencoder(model: torch.nn.Module) -> dict[str, str | int]:
    rows = {"downsampling factor F": downsampling_factor(model), "latent channels d": model.config.latent_channels}
    if isinstance(model, PQModel):
        rows |= {"subspaces S": model.config.num_subspaces, "codebook entries K": model.config.codebook_size}
        rows["bits per pixel"] = f"{model.bits_per_pixel:.4g}"
    return rows | {"parameters": _millions(model)}


def _millions(model: torch.nn.Module) -> str:
    return f"{model.num_parameters() / 1e6:.1f}M"


def _validation_entries(validation: dict, task: str) -> list[EvalResult]:
    """Entries of a `model-index` for the scores of the first run, which is the card's own."""
    scores = next(iter(validation["scores"].values()))
    data = {
        **validation["dataset"],
        "dataset_split": "validation",
        "dataset_args": {"step": scores["step"]},
    }
    return [
        EvalResult(task_type=task, metric_type=name, metric_name=name, metric_value=value, **data)
        for name, value in scores.items()
        if name != "step"
    ]


def _scores_table(scores: dict[str, dict[str, float]]) -> str:
    """Markdown: a row for each run, of the first run's scores."""
    names = list(next(iter(scores.values())))
    lines = [[run, *(f"{row[name]:.5g}" for name in names)] for run, row in scores.items()]
    return markdown_table(["run", *names], lines)


def write_configuration(
    folder: str | os.PathLike, vae: str | os.PathLike, unet: dict, scheduler: dict, resolution: int
):
    """
    Write a [`StableDiffusionPQPipeline`] without weights: what the adaptation of section 4.5 makes of a Stable
    Diffusion, whose text encoder and tokenizer it leaves as they are.

    Args:
        folder (`str` or `os.PathLike`): To write to.
        vae (`str` or `os.PathLike`): Folder of the [`PQModel`] to work on.
        unet, scheduler (`dict`): Stable Diffusion's configurations of `UNet2DConditionModel` and `DDIMScheduler`.
        resolution (`int`): Side of the pictures to generate, in pixels.
    """
    from ..pipelines.pipeline_stable_diffusion_pq import StableDiffusionPQPipeline

    autoencoder = build_model(Path(vae))
    with torch.device("meta"):
        widened = widen_unet(UNet2DConditionModel(**unet), autoencoder.config.latent_channels)
    widened.register_to_config(sample_size=resolution // autoencoder.downsampling_factor)
    parts = {"vae": autoencoder, "unet": widened, "scheduler": DDIMScheduler(**scheduler)}
    unused = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    StableDiffusionPQPipeline(**parts, **unused, requires_safety_checker=False).save_config(folder)
    for name, part in parts.items():
        part.save_config(Path(folder, name))


class CardRepository:
    """
    The cards of a folder of models: each sub-folder is what is pushed, and `cards.yaml` beside them holds the facts
    that no other file does.

    Args:
        folder (`str` or `os.PathLike`): Holds `cards.yaml` and a sub-folder for each model; recipes and results are
            looked for in the folder above it.

    Raises:
        OSError: if there is no `cards.yaml`.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.root = self.folder.resolve().parent
        facts = self.folder / _FACTS
        if not facts.is_file():
            raise FileNotFoundError(f"{facts} is missing: it holds the facts that the cards are made of.")
        self.facts = yaml.safe_load(facts.read_text(encoding="utf-8"))["cards"]

    def names(self) -> list[str]:
        """The models whose card can be written; others in `cards.yaml` have no folder yet."""
        return [name for name in self.facts if "configuration" in self.facts[name] or (self.folder / name).is_dir()]

    def write(self, name: str) -> Path:
        """Write a model's `README.md`, its code and, of a pipeline without weights, its configuration."""
        configuration = self.facts[name].get("configuration")
        if configuration is not None:
            write_configuration(self.folder / name, **configuration | {"vae": self.folder / configuration["vae"]})
        card = self.card(name)
        write_present_code(self.folder / name)
        return save_card(card, self.folder / name)

    def card(self, name: str) -> ModelCard:
        """
        A model's card.

        Raises:
            OSError: if a file that the card is made of is missing.
            ValueError: if an evaluation measured other weights than those in the model's folder.
        """
        facts = dict(self.facts[name])
        facts.pop("configuration", None)
        recipes = {f"{_RECIPES}/{recipe}.yaml": self._recipe(recipe) for recipe in facts.pop("recipes")}
        return build_card(
            self.folder / name,
            name,
            f"{self.folder.resolve().name}/{name}",
            facts.pop("metadata"),
            self._validation(name, facts.pop("validation", None)),
            self._evaluations(name),
            recipes=recipes,
            photographs=self._photographs(name),
            system=SYSTEMS.get(name),
            **facts,
        )

    def _recipe(self, name: str) -> str:
        return (self.root / _RECIPES / f"{name}.yaml").read_text(encoding="utf-8").strip()

    def _validation(self, name: str, facts: dict | None) -> dict | None:
        """The scores that lie beside the weights, and the lowest losses of other runs out of `adaptation.py`'s."""
        if facts is None:
            return None
        scores = {"this model": read_json(self.folder / name / "validation.json")}
        for title, run in facts["others"].items():
            losses = read_json(self.root / _ADAPTATION)["runs"][run]["validation/loss"]
            step, loss = min(losses, key=lambda entry: entry[1])
            scores[title] = {"step": step, "loss": loss}
        return {"dataset": facts["dataset"], "note": facts["note"], "scores": scores}

    def _photographs(self, name: str) -> dict | None:
        """What `reconstruct_photographs.py` found for a model, if it was among those measured."""
        record = read_json(self.root / _PHOTOGRAPHS)
        for label, source in (model.split("=", 1) for model in record["models"]):
            if Path(source).name == name:
                return record["results"][label] | {key: record[key] for key in ("date", "machine")}
        return None

    def _evaluations(self, name: str) -> tuple[dict, ...]:
        """What `evaluate_reconstruction.py` found for a model's weights; without, its name stands for the authors'."""
        if not has_weights(self.folder / name):
            return ()
        return tuple(
            self._evaluation(self.folder / name, path)
            for path in sorted((self.root / _EVALUATIONS / name).glob("*/results.json"))
        )

    def _evaluation(self, folder: Path, path: Path) -> dict:
        from ..evaluation.tables import results_table  # which needs the libraries of `diffusers_pq[eval]`

        result = read_json(path)
        if result["settings"]["weights_sha256"] != weights_digest(load_autoencoder(str(folder))):
            raise ValueError(f"{path} is about other weights than those in {folder}: evaluate them again.")
        index = yaml.safe_load(path.with_name("model-index.yml").read_text(encoding="utf-8"))
        return {
            "table": results_table([result]).strip(),
            "command": _evaluation_command(result),
            "date": result["date"],
            "machine": result["machine"],
            "entries": ModelCardData(**index).eval_results,
        }


def _evaluation_command(result: dict) -> str:
    from ..evaluation.data import data_flags

    flags = {"pretrained_model_name_or_path": result["model"]} | data_flags(result["settings"])
    given = [f"--{name} {value}" for name, value in flags.items()]
    return " \\\n    ".join(["accelerate launch training_scripts/evaluate_reconstruction.py", *given])


def main(argv: list[str] | None = None):
    """Render the cards of a folder."""
    parser = FlagParser(prog="python -m diffusers_pq.hub.cards", description=main.__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("model_cards"), help="default: model_cards")
    repository = CardRepository(parser.parse_args(argv).folder)
    for name in repository.names():
        print(repository.write(name))


if __name__ == "__main__":
    with one_line_errors():
        main()
