"""The model card of a training run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..flags import SECRETS, as_flag
from .cards import build_card, hub_id, save_card


# In the template, beside what removing it means.
_GENERATED = "<!-- Written by the training script"
_BASES = ("pretrained_model_name_or_path", "backbone_name_or_path", "vae_name_or_path")


def write_run_card(
    folder: Path,
    settings: Mapping[str, Any],
    step: int,
    scores: dict[str, float] | None,
    changes: Sequence[Mapping[str, Any]] = (),
):
    """
    A model card with the settings and results of the run, unless there is one that somebody has edited.

    Args:
        folder (`Path`): With the trained model.
        settings (`Mapping`): The flags of the run; secrets are left out.
        step (`int`): After which the model was saved.
        scores (`dict`, *optional*): Of the last validation, with its `step`.
        changes (`Sequence[Mapping]`): `settings` that were others `until_step`, where the run was resumed.
    """
    path = folder / "README.md"
    if path.is_file() and _GENERATED not in path.read_text(encoding="utf-8"):
        return
    dataset = settings["dataset_name"] or settings["train_data_dir"]
    metadata = {
        "base_model": [base for name in _BASES if (base := hub_id(settings.get(name)))] or None,
        "datasets": [settings["dataset_name"]] if hub_id(settings["dataset_name"]) else None,
        "tags": ["diffusers", "diffusers_pq", "diffusers-training"],
    }
    facts = {"dataset_type": hub_id(dataset) or "imagefolder", "dataset_name": Path(dataset).name}
    validation = {"dataset": facts, "scores": {"this model": scores}}
    pictures = settings["num_validation_images"]
    validation["note"] = f"On {pictures} held-out pictures, or as many as there are."
    repo_id = settings["hub_model_id"]
    card = build_card(
        folder,
        Path(repo_id or settings["output_dir"]).name,
        repo_id if settings["push_to_hub"] and repo_id else str(folder),
        metadata,
        validation if scores is not None else None,
        is_generated=True,
        summary=f"Trained with `diffusers_pq` on {dataset}.",
        training=_describe(settings, step, changes),
        recipes={"Settings": _as_recipe(settings)},
        base=settings.get("pretrained_model_name_or_path"),
    )
    save_card(card, folder)


def _describe(settings, step, changes):
    text = f"{step} of {settings['max_train_steps']} steps, with these settings"
    if not changes:
        return f"{text}:"
    lines = [f"{text}. Resumed, it had had others before:", ""]
    for change in changes:
        others = ", ".join(f"`{as_flag(name, value)}`" for name, value in change["settings"].items())
        lines.append(f"- until step {change['until_step']} {others}")
    return "\n".join(lines)


def _as_recipe(settings):
    given = {name: value for name, value in settings.items() if value is not None and name not in SECRETS}
    return yaml.safe_dump(json.loads(json.dumps(given, default=str)), sort_keys=False).strip()
