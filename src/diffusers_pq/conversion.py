"""Checkpoints of the original VQGAN, PQGAN and latent diffusion code as diffusers models.

diffusers' own conversion (`AutoencoderKL.from_single_file`) is for Stable Diffusion's autoencoders: it knows neither
attention inside the levels nor codebooks.
"""

import logging
import math
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, ModelMixin, VQModel
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import httpx
from safetensors.torch import load_file

from .files import check_new, hub_tried_once
from .models.autoencoder_pq import PQModel


logger = logging.getLogger(__name__)

AUTHORS_REPOSITORY = "CVL-Heidelberg/PQGAN"
# The checkpoints in it by the names that `diffusers-pq convert` takes, `CVL-Heidelberg/PQGAN:F8` for one.
AUTHORS_CHECKPOINTS = {
    "F8": "checkpoints/PQGAN_F8_K512_Z128_S64.safetensors",
    "F16": "checkpoints/PQGAN_F16_K128_Z128_S64.safetensors",
}
# Mean and standard deviation of ImageNet's colours in [0, 1], as torchvision has them and PQGAN's code uses them.
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

# What PQGAN's data loaders do to pictures unless `norm_values` of the YAML file says otherwise: `None` is [-1, 1].
_LOADERS = {"ImageNetLoader": (IMAGENET_MEAN, IMAGENET_STD), "FFHQLoader": None, "LSUNLoader": None}

# Whole numbers in the YAML file, each with the largest that is taken for meant.
_NUMBERS = {
    "ch": 2**13,
    "num_res_blocks": 2**6,
    "resolution": 2**16,
    "in_channels": 2**10,
    "out_ch": 2**10,
    "z_channels": 2**14,
    "embed_dim": 2**14,
}
# Lists of them, with the most entries.
_LISTS = {"ch_mult": 12, "attn_resolutions": 12}
_MAX_MULTIPLE = {"ch_mult": 2**8, "attn_resolutions": 2**16}
_MAX_ENTRIES = 2**20
# Channels of the group that the networks normalise together.
_NORM_GROUPS = 32

# Options that change what the network computes but not its tensors, with the one value that diffusers' networks have.
_FIXED_OPTIONS = {"tanh_out": False, "give_pre_end": False, "distance_type": "l2", "disable_quantization": False}

# Losses, the counters of a codebook that is a moving average, a table of used codes that renumbers them, and colours
# for pictures of segmentations. PQGAN's code also makes a vector quantiser and a product quantiser whichever of them
# it uses as `quantize`, and its product quantiser has an `embedding` without use.
_UNUSED_TENSORS = re.compile(r"(loss|vq_standard|vq_split|quantize\.embedding)\.|(quantize\.used|colorize)$")

# The moving average of the weights that latent diffusion keeps with `use_ema: true`.
_EMA = "model_ema."

_SUBSPACE_CODEBOOK = re.compile(r"((?:quantize\.)?embeddings\.)(\d+)\.weight")

# diffusers -> original, applied in this order.
_RENAMED_PARTS = (
    (r"(down|up)_blocks\.(\d+)\.resnets\.", r"\1.\2.block."),
    (r"(down|up)_blocks\.(\d+)\.attentions\.", r"\1.\2.attn."),
    (r"(down|up)_blocks\.(\d+)\.\1samplers\.0\.", r"\1.\2.\1sample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)

# What Lightning wrote beside the tensors of the published checkpoints.
_LIGHTNING_EXTRAS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


class _Skipped:
    """Takes the place of an object that is not read."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def convert_checkpoint(
    checkpoint: str | os.PathLike,
    config: str | os.PathLike | None,
    output_dir: str | os.PathLike,
    target: str | None = None,
    **options,
) -> ModelMixin:
    """
    Convert a checkpoint of the original code to a folder for `from_pretrained`.

    Args:
        checkpoint, config, target: See [`load_original_autoencoder`].
        output_dir: Written whole or not at all; must not exist.
        options: Others of [`load_original_autoencoder`].

    Returns:
        The model that was written.

    Raises:
        FileExistsError: if `output_dir` exists.
        FileNotFoundError, OSError, ValueError: see [`load_original_autoencoder`].
    """
    output_dir = Path(output_dir)
    check_new(output_dir)
    model = load_original_autoencoder(checkpoint, config, target, **options)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent) as scratch:
        unfinished = Path(scratch) / "model"
        model.save_pretrained(unfinished)
        os.replace(unfinished, output_dir)
    return model


def load_original_autoencoder(
    checkpoint: str | os.PathLike,
    config: str | os.PathLike | None = None,
    target: str | None = None,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
    revision: str | None = None,
    use_ema: bool = False,
) -> ModelMixin:
    """
    Load an autoencoder that was trained with the original VQGAN, PQGAN or latent diffusion code.

    Every tensor must have its place, in its shape. Not looked at are `loss.*`, the counters of codebooks that are
    moving averages, the quantisers that PQGAN's code makes but does not use, and, if the autoencoder is the
    `first_stage_model` of a diffusion model, all that is not.

    Args:
        checkpoint: A Lightning checkpoint, a state dict saved by torch, or a `.safetensors` file; here, or as
            `"org/name:file"` in a repository of the Hub. The paper's authors' are `"CVL-Heidelberg/PQGAN:F8"` and
            `"CVL-Heidelberg/PQGAN:F16"`. Pickles are read with `weights_only=True`.
        config (*optional*):
            The YAML file the model was trained with, here or on the Hub. Default: beside the checkpoint, under its
            name with `.yaml`.
        target (`str`, *optional*):
            `"PQModel"` (the default) or `"VQModel"` for a model with codebooks, else `"AutoencoderKL"`.
        image_mean, image_std (`list[float]`, *optional*):
            How the training pictures, of colours in [0, 1], were normalised, for the config of the `PQModel`. Default:
            as the YAML file says, and ImageNet's for the authors' checkpoints.
        revision (`str`, *optional*): Branch, tag or commit of the repository on the Hub.
        use_ema (`bool`, *optional*, defaults to `False`):
            Take the moving average of the autoencoder's weights (`model_ema.*`) in their place.

    Returns:
        `PQModel`, `VQModel` or `AutoencoderKL`: In eval mode and float32. `scaling_factor` is the original's
        `scale_factor`; without one it is 1.0, or diffusers' 0.18215 for an `AutoencoderKL`.

    Raises:
        FileNotFoundError: if one of the files does not exist.
        OSError: if the Hub has no such file or cannot be reached.
        ValueError: if one of them is damaged, the checkpoint holds more than tensors, an option is not a number that a
            network can have, the two do not fit together or `target` cannot hold the model.
    """
    is_authors = str(checkpoint).startswith(f"{AUTHORS_REPOSITORY}:")
    checkpoint, config = _locate(checkpoint, config, revision)
    options = _read_options(config)
    if image_mean is None and image_std is None:
        image_mean, image_std = _image_statistics(options, is_authors) or (None, None)
    options |= {"image_mean": image_mean, "image_std": image_std}
    tensors = _load_tensors(checkpoint)
    # Latent diffusion keeps a measured scale beside the weights.
    scaling_factor = tensors.get("scale_factor", options.get("scale_factor"))
    tensors = _first_stage(tensors)
    _check_not_gumbel(tensors, checkpoint)
    codebooks = _codebook_names(tensors)
    with torch.device("meta"):  # sizes are compared before memory is asked for
        model = _create_model(options, target, len(codebooks), scaling_factor)
    destinations = _destinations(model, codebooks)
    tensors = _choose_average(tensors, destinations, use_ema, checkpoint)
    problems = _mismatches(tensors, destinations)
    if problems:
        raise ValueError(
            f"{checkpoint} does not fit {config} as {type(model).__name__}. {' '.join(problems)} Is it the YAML file "
            "of this checkpoint?"
        )
    model.to_empty(device="cpu")
    for name, destination in _destinations(model, codebooks).items():
        destination.copy_(tensors[name].reshape(destination.shape))
    return model.eval()


def _locate(
    checkpoint: str | os.PathLike, config: str | os.PathLike | None, revision: str | None
) -> tuple[Path, Path]:
    """The files of a checkpoint and its config, fetched if they are on the Hub."""
    repository, _, name = str(checkpoint).partition(":")
    if repository == AUTHORS_REPOSITORY:
        # Other files of it go by their own names, as in any repository.
        name = AUTHORS_CHECKPOINTS.get(name.upper(), name)
        if "." not in name:
            names = " or ".join(f"{AUTHORS_REPOSITORY}:{known}" for known in AUTHORS_CHECKPOINTS)
            raise ValueError(f"{checkpoint} is not one of the authors' checkpoints: choose {names}.")
        checkpoint = f"{repository}:{name}"
    if config is None:
        stem, dot, _ = str(checkpoint).rpartition(".")
        config = f"{stem if dot else checkpoint}.yaml"
    checkpoint = _fetch(checkpoint, revision)
    if not checkpoint.is_file():
        raise FileNotFoundError(f"No such checkpoint: {checkpoint}")
    return checkpoint, _fetch(config, revision)


def _fetch(path: str | os.PathLike, revision: str | None) -> Path:
    found = re.fullmatch(r"([\w.-]+/[\w.-]+):(.+)", str(path))
    if found is None or Path(path).exists():
        return Path(path)
    repository, name = found.groups()
    try:
        with hub_tried_once():
            return Path(hf_hub_download(repository, name, revision=revision))
    except RemoteEntryNotFoundError as error:
        raise FileNotFoundError(f"The repository {repository} has no file {name}.") from error
    except httpx.TransportError as error:
        raise ConnectionError(f"The download of {path} broke off ({error}). Repeat it.") from error


def _read_options(path: Path) -> dict[str, Any]:
    """The options of the autoencoder, those of `ddconfig` among them, and the `scale_factor` of a diffusion model."""
    if not path.is_file():
        raise FileNotFoundError(f"No such config: {path}. Name the YAML file that the model was trained with.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error
    try:
        model = content["model"]
        outer = model["params"] if "params" in model else model["init_args"]
        inner = outer["first_stage_config"]["params"] if "first_stage_config" in outer else outer
        options = outer | inner | inner["ddconfig"]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} has no `ddconfig` in `model.params` (VQGAN, latent diffusion) or `model.init_args` (PQGAN)."
        ) from error
    _check_options(path, options)
    for name, supported in _FIXED_OPTIONS.items():
        if options.get(name, supported) != supported:
            raise ValueError(f"{path}: `{name}: {options[name]}` cannot be converted, only {supported} can.")
    if "init_args" in model:
        options["data"] = content.get("data")
    return options


def _check_options(path: Path, options: dict[str, Any]):
    """A `ValueError` with the first option that is missing or no number that a network can have."""
    missing = [name for name in (*_NUMBERS, *_LISTS) if name not in options]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}.")
    for name, most in _NUMBERS.items():
        _check_number(path, name, options[name], most)
    if "n_embed" in options:
        _check_number(path, "n_embed", options["n_embed"], _MAX_ENTRIES, least=2)
    for name, most in _LISTS.items():
        if not isinstance(options[name], list) or len(options[name]) > most:
            raise ValueError(
                f"{path}: `{name}` must be a list of at most {most} numbers, but is {_shown(options[name])}."
            )
        for value in options[name]:
            _check_number(path, name, value, _MAX_MULTIPLE[name])
    if not options["ch_mult"]:
        raise ValueError(f"{path}: `ch_mult` must have an entry for each level, but is empty.")
    uneven = [multiple for multiple in options["ch_mult"] if options["ch"] * multiple % _NORM_GROUPS]
    if uneven:
        raise ValueError(
            f"{path}: `ch` times each entry of `ch_mult` must be a multiple of {_NORM_GROUPS}, but {options['ch']} "
            f"times {uneven[0]} is not."
        )
    scale = options.get("scale_factor", 1.0)
    try:
        is_scale = 0 < float(scale) < math.inf
    except (TypeError, ValueError):
        is_scale = False
    if not is_scale:
        raise ValueError(f"{path}: `scale_factor` must be a positive number, but is {scale!r}.")


def _check_number(path: Path, name: str, value: Any, most: int, least: int = 1):
    if isinstance(value, str) and "${" in value:
        raise ValueError(f"{path}: `{name}` is the interpolation {value}: write the number that it stands for.")
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{path}: `{name}` must be a whole number from {least} to {most}, but is {_shown(value)}.")


def _shown(value: Any) -> str:
    """In a message; YAML's references can make a value of a few lines that fills the memory as text."""
    return f"a {type(value).__name__}" if isinstance(value, list | dict) else repr(value)


def _image_statistics(options: dict[str, Any], is_authors: bool) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation by which the training pictures were normalised; `None` for [-1, 1]."""
    if "data" not in options:
        return (IMAGENET_MEAN, IMAGENET_STD) if is_authors else None
    data = options["data"] if isinstance(options["data"], dict) else {}
    norm_values = (data.get("init_args") or {}).get("norm_values")
    if norm_values is not None:
        try:
            mean, std = ([float(value)] * options["in_channels"] for value in norm_values)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`data.init_args.norm_values` of the YAML file must be two numbers, but is {norm_values!r}."
            ) from error
        return None if mean[0] == std[0] == 0.5 else (mean, std)
    loader = str(data.get("class_path", "")).rpartition(".")[-1]
    if is_authors or loader in _LOADERS:
        return _LOADERS.get(loader, (IMAGENET_MEAN, IMAGENET_STD))
    logger.warning(
        "The YAML file does not say how the training pictures were normalised, so [-1, 1] is assumed. If it was "
        "otherwise, set `image_mean` and `image_std`."
    )
    return None


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
    except Exception as error:  # a damaged file can raise anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                f"{path} holds more than tensors ({refused[1]}), which could run code and is not loaded. If you trust "
                "the file, save its `state_dict` alone, in the environment it comes from."
            ) from error
        raise ValueError(f"{path} is damaged or no checkpoint ({type(error).__name__}).") from error
    tensors = content.get("state_dict", content) if isinstance(content, dict) else None
    if not tensors or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} holds no `state_dict` of tensors.")
    return tensors


def _load_pickle(path: Path) -> Any:
    with torch.serialization.safe_globals([(_Skipped, name) for name in _LIGHTNING_EXTRAS]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _first_stage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = "first_stage_model."
    inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return inner or tensors


def _check_not_gumbel(tensors: dict[str, torch.Tensor], checkpoint: Path):
    if {"quantize.proj.weight", "quantize.embed.weight"} & tensors.keys():
        raise ValueError(
            f"{checkpoint} has a Gumbel quantiser (`quantize.proj`, `quantize.embed`), which chooses entries by a "
            "convolution and not by their distance: neither PQModel nor VQModel can hold it."
        )


def _choose_average(
    tensors: dict[str, torch.Tensor], names: Iterable[str], use_ema: bool, checkpoint: Path
) -> dict[str, torch.Tensor]:
    """The tensors without the moving averages beside them, or with these in their place."""
    averages = {name: value for name, value in tensors.items() if name.startswith(_EMA)}
    plain = {name: value for name, value in tensors.items() if name not in averages}
    if not use_ema:
        if averages:
            logger.warning("%s also holds a moving average of the weights, which `use_ema` would take.", checkpoint)
        return plain
    if not averages:
        raise ValueError(f"{checkpoint} holds no moving average of the autoencoder (`{_EMA}*`): leave `use_ema` out.")
    # Averages go by the names of their tensors without dots; a codebook that is not trained has none.
    chosen = {name: averages.get(_EMA + name.replace(".", "")) for name in names}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    codebooks = {name: value for name, value in plain.items() if re.match(r"quantize\.|embeddings\.", name)}
    return codebooks | chosen


def _codebook_names(tensors: dict[str, torch.Tensor]) -> list[str]:
    """One name for each subspace, in order; gaps in the numbers are filled, to be found missing."""
    found = [match for match in map(_SUBSPACE_CODEBOOK.fullmatch, tensors) if match]
    if not found:
        return ["quantize.embedding.weight"]
    count = 1 + max(int(match[2]) for match in found)
    return [f"{found[0][1]}{subspace}.weight" for subspace in range(count)]


def _create_model(
    options: dict[str, Any], target: str | None, num_subspaces: int, scaling_factor: float | None
) -> ModelMixin:
    has_codebooks = "n_embed" in options
    target = target or ("PQModel" if has_codebooks else "AutoencoderKL")
    possible = ("PQModel", "VQModel") if has_codebooks else ("AutoencoderKL",)
    if target not in possible:
        raise ValueError(
            f"`target` is {target!r}, but a model with{'' if has_codebooks else 'out'} `n_embed` (codebooks) in its "
            f"YAML file can only become a {' or '.join(possible)}."
        )
    if target == "VQModel" and num_subspaces > 1:
        raise ValueError(f"A VQModel has one codebook, but the checkpoint has {num_subspaces}: choose PQModel.")

    if target != "PQModel" and options["image_mean"] is not None:
        logger.warning(
            "A %s has no place for the normalisation of pictures: give it pictures normalised with mean %s and "
            "standard deviation %s.",
            target,
            options["image_mean"],
            options["image_std"],
        )
    config = _backbone(options)
    if scaling_factor is not None:
        config["scaling_factor"] = float(scaling_factor)
    if target == "AutoencoderKL":
        return AutoencoderKL(**config, latent_channels=options["z_channels"])
    config.setdefault("scaling_factor", 1.0)
    if target == "VQModel":
        return VQModel(
            **config,
            latent_channels=options["z_channels"],
            vq_embed_dim=options["embed_dim"],
            num_vq_embeddings=options["n_embed"],
        )
    return PQModel(
        **config,
        z_channels=options["z_channels"],
        latent_channels=options["embed_dim"],
        num_subspaces=num_subspaces,
        codebook_size=options["n_embed"],
        image_mean=options["image_mean"],
        image_std=options["image_std"],
    )


def _backbone(options: dict[str, Any]) -> dict[str, Any]:
    """The part of the config that the three classes share."""
    has_attention = options.get("attn_type") != "none"
    resolutions = [options["resolution"] // 2**level for level in range(len(options["ch_mult"]))]
    kinds = ["Attn" if has_attention and side in options["attn_resolutions"] else "" for side in resolutions]
    return {
        "in_channels": options["in_channels"],
        "out_channels": options["out_ch"],
        "block_out_channels": [options["ch"] * multiple for multiple in options["ch_mult"]],
        "layers_per_block": options["num_res_blocks"],
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
        "mid_block_add_attention": has_attention,
        "sample_size": options["resolution"],
    }


def _destinations(model: ModelMixin, codebooks: list[str]) -> dict[str, torch.Tensor]:
    """The original's names for the model's tensors, which share their memory with the model."""
    tensors = model.state_dict()
    entries = []
    if isinstance(model, PQModel):
        entries = tensors.pop("quantizer.codebooks").unbind()
    elif isinstance(model, VQModel):
        entries = [tensors.pop("quantize.embedding.weight")]
    levels = len(model.config.block_out_channels)
    return {_original_name(name, levels): tensor for name, tensor in tensors.items()} | dict(zip(codebooks, entries))


def _original_name(name: str, levels: int) -> str:
    for part, original in _RENAMED_PARTS:
        name = re.sub(part, original, name)
    # The original counts the decoder's levels from the finest.
    return re.sub(r"(?<=decoder\.up\.)\d+", lambda level: str(levels - 1 - int(level[0])), name)


def _mismatches(tensors: dict[str, torch.Tensor], destinations: dict[str, torch.Tensor]) -> list[str]:
    """A sentence for each kind of mismatch, with all names."""
    missing = sorted(destinations.keys() - tensors.keys())
    left_over = sorted(name for name in tensors.keys() - destinations.keys() if not _UNUSED_TENSORS.match(name))
    misshapen = [
        f"{name} is {list(tensors[name].shape)}, not {list(destination.shape)}"
        for name, destination in destinations.items()
        if name in tensors and not _fits(tensors[name].shape, destination.shape)
    ]
    found = {"Missing": missing, "Left over": left_over, "Of another shape": misshapen}
    return [f"{kind}: {', '.join(names)}." for kind, names in found.items() if names]


def _fits(shape: torch.Size, expected: torch.Size) -> bool:
    """The original's 1 x 1 convolutions in attention are diffusers' linear layers."""
    return shape[: len(expected)] == expected and shape.numel() == expected.numel()
