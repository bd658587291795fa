"""
The paper's evaluation of image autoencoders (section 4.4, Tables 1 and 2): any autoencoder of diffusers, any image
dataset, on many processes, resumable.
"""

import datetime
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import datasets
import torch
import torch.nn as nn
from accelerate import Accelerator, skip_first_batches
from datasets.distributed import split_dataset_by_node
from huggingface_hub import EvalResult, ModelCardData
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from tqdm.auto import tqdm

from ..autoencoders import weights_digest
from ..data.fingerprints import fingerprint_files, fingerprint_rows
from ..data.pictures import PictureSource, decode_image
from ..files import read_json, replacing, write_json, write_text
from ..images import to_tensor, to_uint8
from ..measuring import describe_machine
from ..metrics import DEFAULT_METRICS, CodebookUsage, load_metrics
from ..reconstruction import codebook_shape, reconstruct, stored_bits_per_pixel
from .systems import KNOWN, load_for_evaluation


logger = logging.getLogger(__name__)

RESULTS_FILE = "results.json"
RESIZE_MODES = ("short_side", "stretch")
PROTOCOLS = {
    "paper": {
        "split": "validation",
        "resize_mode": "stretch",
        "image_interpolation_mode": "bilinear",
        "inception_antialias": True,
    }
}
"""How others measure: settings by the protocol's name."""

# key of a result -> column of the table, format
_SCORE_COLUMNS = {
    "psnr": ("PSNR (dB)", ".2f"),
    "psnr_pooled": ("PSNR, pooled (dB)", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "rfid": ("rFID", ".4g"),
    "kid": ("KID", ".4g"),
    "inception_score": ("IS", ".2f"),
    "cmmd": ("CMMD", ".4g"),
    "lpips_alex": ("LPIPS (alex)", ".4f"),
    "lpips_vgg": ("LPIPS (vgg)", ".4f"),
    "fd_efficientnet_lite0": ("FD, EfficientNet-Lite0", ".4g"),
    "H_n": ("H_n", ".3f"),
    "P_n": ("P_n", ".3f"),
}
_LATENT_COLUMNS = {
    "downsampling_factor": ("F", "d"),
    "latent_channels": ("d", "d"),
    "num_subspaces": ("S", "d"),
    "codebook_size": ("K", "d"),
    "bits_per_pixel": ("bits per pixel", ".4g"),
}
# Names of the paper's scores -> of what they are to be compared with.
_AS_IN_THE_PAPER = {"psnr": "psnr_pooled"}
# The metric types that the Hub knows.
_HUB_METRICS = {"rfid": "fid", "lpips_alex": "lpips", "lpips_vgg": "lpips"}


@dataclass(frozen=True)
class EvaluationData:
    """
    The pictures to evaluate on, made square.

    Args:
        dataset_name (`str`, *optional*): A Hub dataset or a local dataset folder (parquet files, say).
        data_dir (`str`, *optional*): A folder in the `imagefolder` layout; exclusive with `dataset_name`.
        dataset_config_name (`str`, *optional*)
        split (`str`): `"validation"`, `"test"`, ...
        image_column (`str`): The column that holds the pictures.
        resolution (`int`): Side of the squares, in pixels. `None`, with generated pictures only, is theirs.
        resize_mode (`str`): `"short_side"` resizes the short side and takes the centre; `"stretch"` resizes whole
            pictures, whose proportions change, as the paper's authors do.
        image_interpolation_mode (`str`): Filter of the resizing, antialiased.
        max_samples (`int`, *optional*): Only the first pictures; default: all.

    Raises:
        ValueError: if neither or both sources are given, or the `resize_mode` is unknown.
    """

    dataset_name: str | None = None
    data_dir: str | None = None
    dataset_config_name: str | None = None
    split: str = "validation"
    image_column: str = "image"
    resolution: int | None = 256
    resize_mode: str = "short_side"
    image_interpolation_mode: str = "bicubic"
    max_samples: int | None = None

    def __post_init__(self):
        if (self.dataset_name is None) == (self.data_dir is None):
            raise ValueError("Give exactly one of `--dataset_name` and `--data_dir`.")
        if self.resize_mode not in RESIZE_MODES:
            raise ValueError(f"`--resize_mode` must be one of {', '.join(RESIZE_MODES)}, but is {self.resize_mode!r}.")

    @property
    def name(self) -> str:
        """The dataset's name or folder without what precedes the last slash."""
        return Path(self.dataset_name or self.data_dir).name

    @property
    def source(self) -> PictureSource:
        """Where the pictures come from."""
        return PictureSource(self.dataset_name, self.data_dir, self.image_column, self.dataset_config_name)

    def rows(
        self, streaming: bool = False, cache_dir: str | None = None, other_columns: Sequence[str] = ()
    ) -> datasets.Dataset | datasets.IterableDataset:
        """
        The pictures, left encoded, with further columns.

        Raises:
            ValueError: if the split or a column does not exist.
        """
        dataset = replace(self.source, cache_dir=cache_dir, streaming=streaming).load(self.split, *other_columns)
        if dataset is None:
            raise ValueError(f"`--split` is {self.split!r}, but {self.name} has no such split.")
        if self.max_samples is not None:
            dataset = dataset.take(self.max_samples if streaming else min(self.max_samples, len(dataset)))
        return dataset

    def fingerprint(
        self, streaming: bool = False, cache_dir: str | None = None, other_columns: tuple[str, ...] = ()
    ) -> dict[str, str]:
        """
        What tells these pictures from others of the same name: `rows_sha256`, or `files_sha256` of a stream of shards,
        as [`~diffusers_pq.data.fingerprints`] makes them.
        """
        if not streaming or self.source.folder is not None:
            return {"rows_sha256": fingerprint_rows(self.rows(False, cache_dir, other_columns))}
        builder = datasets.load_dataset_builder(self.dataset_name, self.dataset_config_name, cache_dir=cache_dir)
        return {"files_sha256": fingerprint_files((builder.config.data_files or {}).get(self.split, ()))}

    def loader(
        self,
        batch_size: int,
        num_workers: int = 0,
        streaming: bool = False,
        cache_dir: str | None = None,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> DataLoader:
        """
        A loader of one process's share of the pictures, as `[B, 3, R, R]` in [-1, 1]; the shares of all processes
        hold every picture once. The last batch may be smaller.

        Raises:
            ValueError: if the split or the column does not exist; while loading, if a picture is damaged.
        """
        dataset = self.rows(streaming, cache_dir)
        strategy = "auto"
        if streaming and self.max_samples is not None:
            # Otherwise the first pictures of each shard would be taken, and more shares mean other pictures.
            strategy, num_workers = "examples", min(num_workers, 1)
        return DataLoader(
            split_dataset_by_node(dataset, process_index, num_processes, strategy),
            batch_size=batch_size,
            collate_fn=partial(_squares, self),
            num_workers=num_workers,
        )


# Of settings: see `EvaluationData.fingerprint`.
_FINGERPRINTS = {"rows_sha256", "files_sha256"}
_DATA_DEFAULTS = {field.name: field.default for field in fields(EvaluationData)}


def _squares(data: EvaluationData, rows: list[dict]) -> torch.Tensor:
    side = data.resolution if data.resize_mode == "short_side" else (data.resolution, data.resolution)
    resize = Resize(side, InterpolationMode(data.image_interpolation_mode))
    square = Compose([resize, CenterCrop(data.resolution), to_tensor])
    return torch.stack([square(decode_image(row[data.image_column])) for row in rows])


def describe_latents(model: nn.Module, resolution: int) -> dict[str, int | float]:
    """
    `downsampling_factor` F, `latent_channels` d, `bits_per_pixel` and, if there are codes, `num_subspaces` S and
    `codebook_size` K, for square pictures.

    Raises:
        ValueError: if the model cannot reconstruct pictures of this side.
    """
    blank = torch.zeros(1, 3, resolution, resolution, device=model.device, dtype=model.dtype)
    try:
        output = reconstruct(model, blank)
    except ValueError as error:
        raise ValueError(f"`--resolution {resolution}` does not suit the model: {error}") from error
    if output.sample.shape != blank.shape:
        raise ValueError(
            f"`--resolution {resolution}` does not suit the model: its reconstruction has the shape "
            f"{list(output.sample.shape)}. Choose a multiple of its downsampling factor."
        )
    latents = {
        "downsampling_factor": resolution // output.latents.shape[-1],
        "latent_channels": output.latents.shape[1],
    }
    if output.codes is not None:
        latents |= dict(zip(("num_subspaces", "codebook_size"), codebook_shape(model)))
    return latents | {"bits_per_pixel": stored_bits_per_pixel(model, output, blank)}


class EvaluationProgress:
    """
    What one process has counted so far, kept in a file (`evaluation-<process>.safetensors`) for a later run to go on.

    Args:
        folder (`Path`): Where the file is.
        process_index (`int`): Of this process.
        settings (`dict`): What must be the same for a run to go on, as JSON values.
    """

    def __init__(self, folder: Path, process_index: int, settings: dict):
        self.path = folder / f"evaluation-{process_index:05}.safetensors"
        self.settings = settings

    def save(self, metrics: MetricCollection, batches: int, pictures: int):
        """Write the state after so many batches, whole or not at all."""
        states = {
            f"{name}.{key}": torch.cat(state) if isinstance(state, list) else state
            for name, metric in metrics.items()
            for key, state in metric.metric_state.items()
            if not isinstance(state, list) or state
        }
        record = {"batches": batches, "pictures": pictures, "settings": self.settings}
        with replacing(self.path) as unfinished:
            save_file(states, unfinished, metadata={"progress": json.dumps(record)})

    def restore(self, metrics: MetricCollection) -> tuple[int, int]:
        """
        Add the state to fresh metrics.

        Returns:
            `tuple`: the batches and pictures in it, 0 if there is no file.

        Raises:
            ValueError: if the file comes from a run with other settings.
        """
        if not self.path.is_file():
            return 0, 0
        with safe_open(self.path, "pt") as file:
            record = json.loads(file.metadata()["progress"])
            check_settings(record["settings"], self.settings, self.path.parent)
            states = {key: file.get_tensor(key) for key in file.keys()}
        for name, metric in metrics.items():
            saved = {}
            for key, fresh in metric.metric_state.items():
                state = states.get(f"{name}.{key}")
                state = None if state is None else state.to(metric.device)
                saved[key] = ([] if state is None else [state]) if isinstance(fresh, list) else state
            metric.merge_state(saved)
        return record["batches"], record["pictures"]

    def remove(self):
        self.path.unlink(missing_ok=True)


def check_settings(found: dict, wanted: dict, folder: Path):
    """
    Raise a `ValueError` that names what differs between two evaluations' settings. A fingerprint of the pictures is
    compared if both have it.
    """
    # Settings of the data that an earlier version did not know had their defaults.
    found = {key: value for key, value in _DATA_DEFAULTS.items() if key in wanted} | found
    one_sided = _FINGERPRINTS & (found.keys() ^ wanted.keys())
    if one_sided:
        logger.warning("%s does not say which pictures it is of; they are taken for these.", folder)
    found, wanted = ({key: settings[key] for key in settings.keys() - one_sided} for settings in (found, wanted))
    differences = [
        f"{key} {found.get(key)!r} there, {wanted.get(key)!r} now"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if differences:
        pictures = "of other pictures or " if _FINGERPRINTS & {text.split()[0] for text in differences} else ""
        raise ValueError(
            f"{folder} holds an evaluation {pictures}with other settings ({'; '.join(differences)}). Use the same, "
            "choose another `--output_dir`, or remove the folder."
        )


@torch.no_grad()
def evaluate_autoencoder(
    accelerator: Accelerator,
    model: nn.Module,
    loader: DataLoader,
    metrics: MetricCollection,
    progress: EvaluationProgress | None = None,
    checkpointing_steps: int = 50,
) -> tuple[dict[str, float], int]:
    """
    Reconstruct all pictures of the processes' loaders. To be called by all processes.

    Args:
        accelerator (`Accelerator`)
        model (`nn.Module`): What [`load_for_evaluation`] returns, on the accelerator's device.
        loader (`DataLoader`): This process's share of the pictures, `[B, 3, H, W]` in [-1, 1].
        metrics (`MetricCollection`): What [`~diffusers_pq.metrics.load_metrics`] returns; H_n and P_n (Eq. 3) are
            added if the model has codebooks.
        progress ([`EvaluationProgress`], *optional*): Where to go on from, and to save to.
        checkpointing_steps (`int`): Batches between two savings.

    Returns:
        `tuple`: the scores by name, and the number of pictures, of all processes together.
    """
    if codebook_shape(model) is not None:
        metrics.add_metrics({"codebooks": CodebookUsage(*codebook_shape(model))})
    metrics.to(accelerator.device)
    batches, pictures = (0, 0) if progress is None else progress.restore(metrics)
    for images in _show_progress(accelerator, loader, batches):
        images = images.to(accelerator.device)
        output = reconstruct(model, images)
        stored = {"images": to_uint8(output.sample), "references": to_uint8(images)}
        metrics.update(**stored, samples=output.sample, originals=images, codes=output.codes)
        batches, pictures = batches + 1, pictures + len(images)
        if progress is not None and batches % checkpointing_steps == 0:
            progress.save(metrics, batches, pictures)
    scores = {name: float(value) for name, value in metrics.compute().items()}
    return scores, int(accelerator.reduce(torch.tensor(pictures, device=accelerator.device)))


def _show_progress(accelerator: Accelerator, loader: DataLoader, done: int) -> Iterable[torch.Tensor]:
    is_stream = isinstance(loader.dataset, datasets.IterableDataset)
    return tqdm(
        skip_first_batches(loader, done),
        total=None if is_stream else len(loader),
        initial=done,
        unit="batch",
        disable=not accelerator.is_local_main_process,
    )


def run_evaluation(
    accelerator: Accelerator,
    pretrained_model_name_or_path: str,
    data: EvaluationData,
    output_dir: str | os.PathLike,
    name: str | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    inception_antialias: bool = False,
    batch_size: int = 16,
    num_workers: int = 0,
    streaming: bool = False,
    cache_dir: str | None = None,
    checkpointing_steps: int = 50,
    **hub_kwargs,
) -> dict:
    """
    Evaluate an autoencoder on a dataset, or read the result if that was done. To be called by all processes.

    A run that was stopped is taken up again where it last saved. `<output_dir>/<name>/<dataset>-<split>-<resolution>`
    (`...-stretch` in that mode, `...-paper` by that protocol) gets `results.json` and, for the head of a model card,
    `model-index.yml`.

    Args:
        accelerator (`Accelerator`)
        pretrained_model_name_or_path (`str`): See [`load_for_evaluation`].
        data ([`EvaluationData`])
        output_dir (`str` or `PathLike`): Of all evaluations that belong in one table.
        name (`str`, *optional*): Of the model in the table; default: the last part of its path.
        metrics: Names out of [`~diffusers_pq.metrics.METRICS`]; those that cannot be had are listed as unavailable.
        inception_antialias (`bool`): See [`~diffusers_pq.metrics.FID`].
        batch_size, num_workers (`int`): Of each process.
        streaming (`bool`): Read the dataset while evaluating instead of downloading it first.
        cache_dir (`str`, *optional*): Of the dataset.
        checkpointing_steps (`int`): Batches between two savings.
        hub_kwargs: See [`load_for_evaluation`].

    Returns:
        `dict`: what `results.json` holds, with `scores` by metric and what the `unavailable` ones want.

    Raises:
        ValueError: if an argument is wrong, or the folder holds an evaluation with other settings.
    """
    name = name or Path(pretrained_model_name_or_path).name
    antialias = {"inception_antialias": True} if inception_antialias else {}
    protocol = protocol_of(asdict(data) | antialias)
    suffix = f"-{protocol or data.resize_mode}" if data.resize_mode != "short_side" or protocol else ""
    folder = Path(output_dir, name.replace("/", "--"), f"{data.name}-{data.split}-{data.resolution}{suffix}")
    share = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    with accelerator.local_main_process_first():  # what must be downloaded, is so once
        model = load_for_evaluation(pretrained_model_name_or_path, **hub_kwargs)
    model.to(accelerator.device, torch.float32)
    latents = describe_latents(model, data.resolution)  # refuses a resolution that does not suit the model
    with accelerator.local_main_process_first():
        loader = data.loader(batch_size, num_workers, streaming, cache_dir, **share)
        collection, unavailable = load_metrics(metrics, inception_antialias)
    settings = asdict(data) | antialias | {"metrics": sorted(collection), "weights_sha256": weights_digest(model)}
    settings |= data.fingerprint(streaming, cache_dir)
    if (folder / RESULTS_FILE).is_file():
        result = read_json(folder / RESULTS_FILE)
        check_settings(result["settings"], settings, folder)
        return result

    folder.mkdir(parents=True, exist_ok=True)
    # Which pictures a process has seen after so many batches.
    layout = {"batch_size": batch_size, "num_workers": num_workers, "streaming": streaming}
    layout["num_processes"] = accelerator.num_processes
    progress = EvaluationProgress(folder, accelerator.process_index, settings | layout)
    scores, pictures = evaluate_autoencoder(accelerator, model, loader, collection, progress, checkpointing_steps)
    result = {
        "name": name,
        "model": pretrained_model_name_or_path,
        "model_class": type(model).__name__,
        **hub_kwargs,
        "settings": settings,
        "pictures": pictures,
        "latents": latents,
        "scores": scores,
        "unavailable": unavailable,
        "date": datetime.date.today().isoformat(),
        "machine": f"{accelerator.num_processes} x {describe_machine(accelerator.device.type)}",
    }
    if accelerator.is_main_process:
        write_text(folder / "model-index.yml", model_index(result) + "\n")
        write_json(folder / RESULTS_FILE, result)
    accelerator.wait_for_everyone()
    progress.remove()
    return result


def data_flags(result: dict) -> dict[str, str | int]:
    """The flags, by name, of a result's data and protocol that differ from their defaults."""
    data = asdict(_data(result))
    protocol = protocol_of(result["settings"])
    flags = {name: data[name] for name, default in _DATA_DEFAULTS.items() if data[name] != default}
    if protocol is None:
        return flags
    return {"protocol": protocol} | {name: flag for name, flag in flags.items() if name not in PROTOCOLS[protocol]}


def protocol_of(settings: dict) -> str | None:
    """The name of the protocol that an evaluation's settings follow, if they follow one."""
    return next((name for name, values in PROTOCOLS.items() if values.items() <= settings.items()), None)


def _data(result: dict) -> EvaluationData:
    return EvaluationData(**{name: value for name, value in result["settings"].items() if name in _DATA_DEFAULTS})


def model_index(result: dict) -> str:
    """The YAML lines of a model card that tell the Hub an evaluation's scores."""
    data = _data(result)
    hub_results = [
        EvalResult(
            task_type="image-to-image",
            task_name="Image reconstruction",
            dataset_type=data.dataset_name or "imagefolder",
            dataset_name=data.name,
            dataset_config=data.dataset_config_name,
            dataset_split=data.split,
            dataset_args={
                "resolution": data.resolution,
                "resize_mode": data.resize_mode,
                "pictures": result["pictures"],
            },
            metric_type=_HUB_METRICS.get(name, name),
            metric_name=label,
            metric_value=result["scores"][name],
        )
        for name, (label, _) in _SCORE_COLUMNS.items()
        if name in result["scores"]
    ]
    return ModelCardData(model_name=result["name"], eval_results=hub_results).to_yaml()


def read_results(output_dir: str | os.PathLike) -> list[dict]:
    """The results of all evaluations in a folder, in the order of their names."""
    paths = sorted(Path(output_dir).glob(f"*/*/{RESULTS_FILE}"))
    return [read_json(path) for path in paths]


def write_table(output_dir: str | os.PathLike) -> str:
    """Write the table of all evaluations in a folder to its `results.md`, and return it."""
    table = results_table(read_results(output_dir))
    write_text(Path(output_dir, "results.md"), table)
    return table


def results_table(results: list[dict]) -> str:
    """
    Markdown: a table for each dataset with a row for each model, and what unavailable metrics want. Models with the
    name of a known system are followed by the scores that were published
    for it.
    """
    sections = {}
    for result in results:
        data = _data(result)
        side = f"{data.resolution} x {data.resolution}" + (", stretched" if data.resize_mode == "stretch" else "")
        if protocol := protocol_of(result["settings"]):
            side += f", by the protocol of the {protocol}"
        title = f"{data.name}, {data.split}, {side}, {result['pictures']} pictures"
        sections.setdefault(title, []).append(result)
    return "\n\n".join(f"### {title}\n\n{_section(rows)}" for title, rows in sections.items()) + "\n"


def _section(results: list[dict]) -> str:
    rows = [row for result in results for row in _rows(result)]
    known = (_LATENT_COLUMNS | _SCORE_COLUMNS).items()
    columns = {name: column for name, column in known if any(name in row for _, row in rows)}
    lines = [["model", *(label for label, _ in columns.values())], ["---"] * (len(columns) + 1)]
    for title, row in rows:
        lines.append([title, *(_cell(row, name, spec) for name, (_, spec) in columns.items())])
    wanted = {name: weights for result in results for name, weights in result["unavailable"].items()}
    notes = [f"- n/a: {_SCORE_COLUMNS[name][0]} needs {weights}" for name, weights in wanted.items()]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), *([""] if notes else []), *notes])


def _rows(result: dict) -> Iterable[tuple[str, dict]]:
    """First cells and values of a result's row and, for a known system, of the paper's."""
    yield result["name"], result["latents"] | result["scores"] | dict.fromkeys(result["unavailable"])
    system = KNOWN.get(result["name"])
    if system is not None and system.published_by is not None:
        dataset, scores = system.published_scores(_data(result).name)
        title = f"*{system.published_by}'s, {dataset}*"
        yield title, {_AS_IN_THE_PAPER.get(name, name): score for name, score in scores.items()}


def _cell(row: dict, name: str, spec: str) -> str:
    if name not in row:
        return "-"
    if isinstance(row[name], str):  # as the paper prints it
        return row[name]
    return "n/a" if row[name] is None else format(row[name], spec)
