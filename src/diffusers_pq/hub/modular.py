"""Repositories of modular diffusers with product-quantised latents, which load without this package."""

import os
from pathlib import Path

from diffusers import ClassifierFreeGuidance, DiffusionPipeline, ModularPipeline

import diffusers_pq

from ..files import read_json, write_json
from ..models.auto_class import AutoModelMixin


# The blocks of a pipeline, by what the name of its class begins with.
_BLOCKS = {
    "StableDiffusionXLPQ": "StableDiffusionXLPQBlocks",
    "StableDiffusion3PQ": "StableDiffusion3PQBlocks",
}
_NAMES = "StableDiffusionXLPQ... and StableDiffusion3PQ..."


def load_pipeline(path_or_repo: str) -> DiffusionPipeline:
    """
    A pipeline of this package that has modular blocks, from a folder or the Hub. No code of the repository is run.

    Raises:
        OSError: if there is no such pipeline.
        ValueError: if it is of another class.
    """
    name = DiffusionPipeline.load_config(path_or_repo).get("_class_name")
    # A pipeline that brings code along names its module, too.
    name = str(name[-1] if isinstance(name, list) else name)
    if not name.startswith(tuple(_BLOCKS)):
        raise ValueError(f"{path_or_repo} holds a {name}: only pipelines of {_NAMES} have modular blocks.")
    return getattr(diffusers_pq, name).from_pretrained(path_or_repo)


def to_modular(pipeline: DiffusionPipeline) -> ModularPipeline:
    """
    The modular pipeline of diffusers with the parts of a pipeline on product-quantised latents, which both then share.

    Args:
        pipeline ([`StableDiffusionXLPQPipeline`] or [`StableDiffusion3PQPipeline`]): Or one of their siblings.

    Returns:
        `ModularPipeline`: With the blocks of the family, and the pipeline's guidance scale.

    Raises:
        TypeError: if the pipeline's family has no blocks.
    """
    name = type(pipeline).__name__
    found = [blocks for beginning, blocks in _BLOCKS.items() if name.startswith(beginning)]
    if not found:
        raise TypeError(f"A {name} has no modular blocks: only pipelines of {_NAMES} have them.")
    blocks = getattr(diffusers_pq, found[0])()
    # A part that is saved, as diffusers' own guiders are not: else the guidance scale would be lost.
    guider = ["diffusers", "ClassifierFreeGuidance"]
    index = {"guider": [*guider, {"type_hint": guider}]}
    modular = type(blocks.init_pipeline())(blocks=blocks, modular_config_dict=index)
    parts = {name: part for name, part in pipeline.components.items() if name in modular.components}
    parts = {name: part for name, part in parts.items() if part is not None}
    parts["guider"] = ClassifierFreeGuidance(guidance_scale=pipeline.config.guidance_scale)
    configs = {spec.name for spec in blocks.expected_configs}
    settings = {name: value for name, value in pipeline.parameters.items() if name in configs}
    modular.update_components(**parts, **settings)
    return modular


def save_modular(pipeline: ModularPipeline, save_directory: str | os.PathLike, repo_id: str | None = None):
    """
    Save a modular pipeline with all its parts and the code of its blocks and models, so that
    `ModularPipeline.from_pretrained(..., trust_remote_code=True)` loads it where this package is not installed.

    Args:
        pipeline (`ModularPipeline`): Of [`to_modular`], or of blocks of this package.
        save_directory (`str` or `os.PathLike`): Its index names the folder; a moved or downloaded copy loads as well.
        repo_id (`str`, *optional*): The repository into which the folder will be uploaded: the index must name it.

    Raises:
        ValueError: if a part is missing; the message names it.
    """
    folder = Path(save_directory)
    missing = [name for name in ("vae", "scheduler") if getattr(pipeline, name, None) is None]
    if missing:
        raise ValueError(f"The pipeline lacks {', '.join(missing)}: `update_components` before saving.")
    pipeline.blocks.save_pretrained(folder)
    pipeline.save_pretrained(str(folder), overwrite_modular_index=True)
    path = folder / pipeline.config_name
    write_json(path, {name: _entry(pipeline, name, value, repo_id) for name, value in read_json(path).items()})


def _entry(pipeline: ModularPipeline, name: str, value, repo_id: str | None):
    """What the index says of a part: where it is, and no class where that is of this package."""
    if not (isinstance(value, list) and len(value) == 3):
        return value
    part, (library, class_name, loading) = getattr(pipeline, name), value
    if part is None:
        return [None, None, loading | {"pretrained_model_name_or_path": None}]
    if repo_id is not None:
        loading = loading | {"pretrained_model_name_or_path": repo_id}
    if isinstance(part, AutoModelMixin):
        # `AutoModel` loads it, by the code beside its weights.
        return [None, None, loading | {"type_hint": [None, None]}]
    return [library, class_name, loading]
