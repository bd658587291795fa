"""Pushing a folder with a model or a pipeline to the Hugging Face Hub."""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import httpx, validate_repo_id
from safetensors import SafetensorError

import diffusers_pq

from ..autoencoders import load_whole_model
from ..files import read_json
from .code import write_present_code


logger = logging.getLogger(__name__)

# Of a training run's output folder: checkpoints, logs, and what a killed run has left behind.
NOT_UPLOADED = (".lock", "checkpoint-*", "unfinished-*", "old-*", "upload-*", "logs")

# Weights of diffusers or transformers, whole or in shards, and between dots the variant.
_WEIGHTS_FILE = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.([\w-]+?))?(?:-\d{5}-of-\d{5})?\.safetensors")


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """
    Upload a folder with a model or a pipeline to the Hub, after [`check_folder`]. The code of models of this package
    is brought up to date first, see [`~hub.code.write_code`]; else the folder stays as it is. Of the output folder of
    a training run, checkpoints and logs stay behind.

    Repeating a push that broke off sends only what has not arrived; a folder that is there already makes no commit.

    Args:
        folder (`str` or `os.PathLike`): Holds a `README.md`, and a `config.json` or a `model_index.json` with weights.
        repo_id (`str`): `"org/name"` of a model repository, which is created if it does not exist.
        private (`bool`, *optional*, defaults to `False`): Whether to create the repository private.
        revision (`str`, *optional*): The branch to push to, created from `main` if it does not exist.
        token (`str`, *optional*): Default: the one of `HF_TOKEN` or `hf auth login`.

    Returns:
        `str`: The address of the commit.

    Raises:
        OSError: if something in the folder is missing or damaged, or the Hub refuses or cannot be reached.
        ValueError: if the folder's files do not fit each other, the card's metadata is invalid, or `private` is asked
            for a repository that exists and is public.
    """
    card = check_folder(folder)
    write_present_code(Path(folder))
    api = HfApi(token=token)
    try:
        _validate(card, folder)
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError(f"{repo_id} exists already and is public: push without `private` or to another name.")
        if revision is not None:
            _ensure_revision(api, repo_id, revision)
        message = f"Upload {Path(folder).resolve().name}"
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            ignore_patterns=[*NOT_UPLOADED, *(f"{name}/*" for name in NOT_UPLOADED)],
        ).commit_url
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            error.append_to_message(" Use a token that may write there: `--token`, `HF_TOKEN` or `hf auth login`.")
        raise
    except (httpx.TransportError, RuntimeError) as error:
        # The client wraps what breaks the transfer of a large file in a RuntimeError.
        reason = error.__cause__ or error
        raise ConnectionError(
            f"The push of {folder} to {repo_id} broke off ({reason}). Repeat it: what has arrived is not sent again."
        ) from error


def _validate(card: ModelCard, folder: str | os.PathLike):
    try:
        card.validate()
    except ValueError as error:
        raise ValueError(f"The Hub refuses the metadata of {Path(folder) / 'README.md'}: {error}") from error


def _ensure_revision(api: HfApi, repo_id: str, revision: str):
    try:
        api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def check_folder(folder: str | os.PathLike) -> ModelCard:
    """
    Check that a folder is fit to be pushed: a model or a pipeline whose weights load, in all variants that are there,
    and a card with metadata.

    Both may come without weights, as a configuration alone. A warning says so, and what the card's metadata lacks for
    the Hub to show the model as one of diffusers.

    Returns:
        `ModelCard`: The card.

    Raises:
        OSError: if a file is missing or damaged, or the weights are not safetensors.
        ValueError: if a class is unknown, weights do not fit their configuration, or the card has no metadata or
            metadata that cannot be read (results in its `model-index`, names in `base_model` and `datasets`).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"No such folder: {folder}")
    card = _load_card(folder / "README.md")
    load_part = _load_model if has_weights(folder) else build_model
    if (folder / "model_index.json").is_file():
        _load_pipeline(folder, load_part)
    elif has_weights(folder) or (folder / "config.json").is_file():
        load_part(folder)
    else:
        raise FileNotFoundError(f"{folder} holds neither a config.json nor a model_index.json.")
    if not has_weights(folder):
        logger.warning("%s holds no weights: the configuration is pushed alone.", folder)
    return card


def has_weights(folder: str | os.PathLike) -> bool:
    """Whether the folder of a model, or of a pipeline with any part of it, holds weights, in whatever format."""
    is_pipeline = Path(folder, "model_index.json").is_file()
    return any(Path(folder).glob("*/diffusion_pytorch_model*" if is_pipeline else "diffusion_pytorch_model*"))


def _load_card(path: Path) -> ModelCard:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: write a model card, with metadata such as `license:` at its top.")
    try:
        card = ModelCard.load(path)
    except yaml.YAMLError as error:
        raise ValueError(f"The metadata at the top of {path} is not valid YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"The metadata at the top of {path} cannot be read: {error}") from error
    if not card.data.to_dict():
        raise ValueError(f"{path} has no metadata: begin it with a block such as `---`, `license: apache-2.0`, `---`.")
    _check_metadata(card, path)
    return card


def _check_metadata(card: ModelCard, path: Path):
    missing = [field for field in ("license", "library_name", "pipeline_tag") if card.data.get(field) is None]
    if missing:
        logger.warning("The metadata of %s lacks %s, by which the Hub sorts models.", path, ", ".join(missing))
    for field in ("base_model", "datasets"):
        names = card.data.get(field, [])
        for name in [names] if isinstance(names, str) else names:
            try:
                validate_repo_id(name)
            except ValueError as error:
                raise ValueError(f"`{field}` of {path} must hold names on the Hub: {error}") from error


def _load_pipeline(folder: Path, load_part: Callable[[Path], diffusers.ModelMixin]):
    index = read_json(folder / "model_index.json")
    components = {name: None for name, value in index.items() if value == [None, None]}
    for config_file in folder.glob("*/config.json"):
        if "_class_name" in read_json(config_file):
            components[config_file.parent.name] = load_part(config_file.parent)
    others = {variant for name in index.keys() - components.keys() for variant in _variants(folder / name)}
    for variant in others or {None}:
        try:
            _named_class(folder / "model_index.json").from_pretrained(
                folder, use_safetensors=True, variant=variant, **components
            )
        except SafetensorError as error:
            raise OSError(f"The weights in {folder} are damaged: {error}") from error


def _load_model(folder: Path) -> diffusers.ModelMixin:
    """The model in a folder, after all variants of its weights there have been loaded."""
    model_class = _named_class(folder / "config.json")
    models = [load_whole_model(model_class, folder, variant=variant) for variant in _variants(folder) or [None]]
    return models[0]


def _variants(folder: Path) -> list[str | None]:
    """The variants in which a folder holds weights, `"fp16"` for one; first `None`, what loads without a `variant`."""
    found = {match[1] for path in folder.glob("*") if (match := _WEIGHTS_FILE.fullmatch(path.name))}
    return sorted(found, key=lambda variant: variant or "")


def build_model(folder: Path) -> diffusers.ModelMixin:
    """The model that a folder's `config.json` describes, without memory for its weights (on the meta device)."""
    with torch.device("meta"):
        return _named_class(folder / "config.json").from_config(read_json(folder / "config.json"))


def class_name(config_file: Path) -> str | None:
    """The class that a `config.json` or `model_index.json` names."""
    name = read_json(config_file).get("_class_name")
    # A pipeline that brings code along names its module, too.
    return name[-1] if isinstance(name, list) else name


def _named_class(config_file: Path) -> type:
    name = class_name(config_file)
    for library in (diffusers_pq, diffusers):
        if isinstance(name, str) and hasattr(library, name):
            return getattr(library, name)
    raise ValueError(f"{config_file} names the class {name!r}, which neither diffusers_pq nor diffusers has.")
