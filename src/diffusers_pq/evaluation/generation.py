"""
The paper's evaluation of generated pictures (supplement D, Table 5): samples of a class-conditional pipeline against a
dataset, drawn and measured on many processes, resumable.
"""

import datetime
import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torchmetrics import MetricCollection
from tqdm.auto import tqdm

from ..autoencoders import downsampling_factor, weights_digest
from ..files import folder_or_hub, read_json, write_json
from ..images import load_image, save_image, to_tensor, to_uint8
from ..measuring import describe_machine
from ..metrics import load_metrics
from ..pipelines.pipeline_latent_diffusion_pq import LatentDiffusionPQPipeline
from ..pipelines.pipeline_masked_pq import MaskedPQPipeline
from .data import EvaluationData
from .progress import EvaluationProgress, check_settings
from .tables import RESULTS_FILE


# What a distance of generated pictures is called -> its name among the metrics of reconstructions.
GENERATION_METRICS = {"gfid": "rfid", "cmmd": "cmmd"}
PIPELINES = (LatentDiffusionPQPipeline, MaskedPQPipeline)


@dataclass(frozen=True)
class Sampling:
    """
    How samples are drawn. Sample i depends on these settings and i only, not on the number of processes.

    Args:
        num_samples (`int`)
        guidance_scale (`float`): Of classifier-free guidance; 1 is without.
        num_inference_steps (`int`)
        seed (`int`): Sample i begins with the noise of a generator that is seeded with it and i; no two of the first
            million samples of one seed are the same.
        batch_size (`int`): Samples i ... i + batch_size - 1 are drawn together; rounding depends on it.
    """

    num_samples: int = 5000
    guidance_scale: float = 1.0
    num_inference_steps: int = 50
    seed: int = 0
    batch_size: int = 16


def draw_samples(
    accelerator: Accelerator,
    pipeline: DiffusionPipeline,
    conditions: Sequence[int | str],
    folder: str | os.PathLike,
    sampling: Sampling,
    condition: str = "class_labels",
    **options,
) -> list[Path]:
    """
    Write samples as `<folder>/<number>.png`; batches that are there already are left alone. To be called by all
    processes, which share the batches out.

    Args:
        accelerator (`Accelerator`)
        pipeline ([`~diffusers.DiffusionPipeline`]): On the accelerator's device.
        conditions (sequence of `int` or `str`): Of the first samples, and again from the beginning.
        folder (`str` or `os.PathLike`)
        sampling ([`Sampling`])
        condition (`str`): What the pipeline calls them.
        options: Further arguments of the pipeline.

    Returns:
        `list[Path]`: The files of all processes.
    """
    paths = [Path(folder, f"{number:06d}.png") for number in range(sampling.num_samples)]
    pipeline.set_progress_bar_config(disable=True)
    share = range(0, len(paths), sampling.batch_size)[accelerator.process_index :: accelerator.num_processes]
    for start in tqdm(share, unit="batch", desc="Samples", disable=not accelerator.is_local_main_process):
        numbers = range(start, min(start + sampling.batch_size, len(paths)))
        if all(paths[number].is_file() for number in numbers):
            continue
        pictures = pipeline(
            guidance_scale=sampling.guidance_scale,
            num_inference_steps=sampling.num_inference_steps,
            generator=[_generator(sampling.seed, number) for number in numbers],
            **{condition: [conditions[number % len(conditions)] for number in numbers]},
            **options,
        ).images
        for number, picture in zip(numbers, pictures):
            save_image(picture, paths[number])
    accelerator.wait_for_everyone()
    return paths


def _generator(seed: int, number: int) -> torch.Generator:
    # torch's generator on the CPU reads the lowest 32 bits of a seed only.
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**32)


def measure_samples(
    accelerator: Accelerator, metrics: MetricCollection, paths: Sequence[Path], batch_size: int
) -> dict[str, float]:
    """Distances of the pictures in files to those that `metrics` hold already; to be called by all processes."""
    share = paths[accelerator.process_index :: accelerator.num_processes]
    for pictures in _batches(share, batch_size):
        metrics.update(images=pictures.to(accelerator.device))
    return {name: float(value) for name, value in metrics.compute().items()}


def add_references(
    accelerator: Accelerator,
    metrics: MetricCollection,
    data: EvaluationData,
    folder: str | os.PathLike,
    batch_size: int = 16,
    num_workers: int = 0,
    streaming: bool = False,
    cache_dir: str | None = None,
):
    """
    Add the pictures to compare with to fresh metrics: from the statistics in a folder, or from the dataset, whose
    statistics are then written there. To be called by all processes.

    Args:
        accelerator (`Accelerator`)
        metrics (`MetricCollection`): Of [`load_metrics`].
        data ([`EvaluationData`]): The pictures.
        folder (`str` or `os.PathLike`): Of these pictures' statistics alone.
        batch_size, num_workers (`int`): Of each process.
        streaming (`bool`): Read the dataset while measuring.
        cache_dir (`str`, *optional*): Of the dataset.

    Raises:
        ValueError: if the folder holds statistics of other pictures or metrics, or the dataset lacks something.
    """
    settings = asdict(data) | {"metrics": sorted(metrics)} | data.fingerprint(streaming, cache_dir)
    statistics = EvaluationProgress(Path(folder), 0, settings)
    is_there = statistics.path.is_file()
    accelerator.wait_for_everyone()  # before one process writes it
    if is_there:
        if accelerator.is_main_process:
            statistics.restore(metrics)
        return
    share = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    loader = data.loader(batch_size, num_workers, streaming, cache_dir, **share)
    for pictures in tqdm(loader, unit="batch", desc="References", disable=not accelerator.is_local_main_process):
        metrics.update(references=to_uint8(pictures).to(accelerator.device))
    with ExitStack() as stack:
        for metric in metrics.values():
            stack.enter_context(metric.sync_context())
        if accelerator.is_main_process:
            statistics.path.parent.mkdir(parents=True, exist_ok=True)
            statistics.save(metrics, 0, 0)
    accelerator.wait_for_everyone()


def run_generation_evaluation(
    accelerator: Accelerator,
    pretrained_model_name_or_path: str,
    data: EvaluationData,
    output_dir: str | os.PathLike,
    sampling: Sampling = Sampling(),  # noqa: B008, it is frozen
    label_column: str | None = None,
    name: str | None = None,
    reference_dir: str | os.PathLike | None = None,
    num_workers: int = 0,
    streaming: bool = False,
    cache_dir: str | None = None,
    **hub_kwargs,
) -> dict:
    """
    Draw samples of a pipeline and compare them with a dataset, or read the result if that was done. To be called by
    all processes. A run that was stopped is taken up again.

    `<output_dir>/<name>` gets the `samples` and `results.json`.

    Args:
        accelerator (`Accelerator`)
        pretrained_model_name_or_path (`str`):
            A [`LatentDiffusionPQPipeline`] or a [`MaskedPQPipeline`] of classes, in a folder or on the Hub.
        data ([`EvaluationData`]): The pictures to compare with.
        output_dir (`str` or `os.PathLike`)
        sampling ([`Sampling`])
        label_column (`str`, *optional*): The samples' classes are those of the dataset's rows in this column, in an
            order that the seed gives. Default: all classes in turn.
        name (`str`, *optional*): Of the pipeline; default: the last part of its path.
        reference_dir (`str` or `os.PathLike`, *optional*): Of the dataset's statistics, see [`add_references`].
            Default: in `<output_dir>/references`.
        num_workers (`int`): Of each process.
        streaming (`bool`): Read the dataset while measuring.
        cache_dir (`str`, *optional*): Of the dataset.
        hub_kwargs: Of `from_pretrained`.

    Returns:
        `dict`: what `results.json` holds, with the `scores` `gfid` and `cmmd` and what the `unavailable` ones want.

    Raises:
        ValueError: if the folder holds samples with other settings, the pictures to compare with have another
            resolution than the pipeline's, or an argument is wrong.
    """
    name = name or Path(pretrained_model_name_or_path).name
    folder = Path(output_dir, name.replace("/", "--"))
    with accelerator.local_main_process_first():  # what must be downloaded, is so once
        pipeline = _load_pipeline(pretrained_model_name_or_path, **hub_kwargs)
    resolution = pipeline.denoiser.config.sample_size * downsampling_factor(pipeline.vae)
    if data.resolution is None:
        data = replace(data, resolution=resolution)
    if data.resolution != resolution:
        raise ValueError(f"`resolution` is {data.resolution}, but {name} makes pictures of {resolution} pixels.")
    with accelerator.local_main_process_first():
        metrics, unavailable = load_metrics(tuple(GENERATION_METRICS.values()))
    pipeline.to(accelerator.device)
    metrics.to(accelerator.device)
    labels = range(pipeline.num_classes)
    if label_column is not None:
        labels = _dataset_labels(data, label_column, streaming, cache_dir)
        random.Random(sampling.seed).shuffle(labels)  # rows are often sorted by class
    settings = asdict(sampling) | {"label_column": label_column, "reference": asdict(data)}
    settings |= {"metrics": sorted(metrics), "vae_sha256": weights_digest(pipeline.vae)}
    settings |= {"denoiser_sha256": weights_digest(pipeline.denoiser), "scheduler": type(pipeline.scheduler).__name__}
    settings["configs_sha256"] = _digest([dict(pipeline.scheduler.config), dict(pipeline.vae.config)])
    fingerprint = data.fingerprint(streaming, cache_dir, () if label_column is None else (label_column,))
    settings |= fingerprint
    # Which samples these are; how many, and what they are compared with and by, may change.
    may_change = {"num_samples", "metrics"}
    if label_column is None:
        may_change |= {"reference", *fingerprint}
    drawn = {key: value for key, value in settings.items() if key not in may_change}
    _check_record(accelerator, folder / "sampling.json", drawn)
    if (folder / RESULTS_FILE).is_file():
        result = read_json(folder / RESULTS_FILE)
        if result["settings"] == json.loads(json.dumps(settings)):
            return result
    paths = draw_samples(accelerator, pipeline, labels, folder / "samples", sampling)
    scores = {}
    if metrics:
        place = f"{data.name}-{data.split}-{data.resolution}-{_digest([asdict(data)])[:8]}"
        source = Path(reference_dir or Path(output_dir, "references", place), "-".join(sorted(metrics)))
        options = {"num_workers": num_workers, "streaming": streaming, "cache_dir": cache_dir}
        add_references(accelerator, metrics, data, source, sampling.batch_size, **options)
        scores = measure_samples(accelerator, metrics, paths, sampling.batch_size)
    result = {
        "name": name,
        "model": pretrained_model_name_or_path,
        **hub_kwargs,
        "settings": settings,
        "scores": {called: scores[metric] for called, metric in GENERATION_METRICS.items() if metric in scores},
        "unavailable": {
            called: unavailable[metric] for called, metric in GENERATION_METRICS.items() if metric in unavailable
        },
        "date": datetime.date.today().isoformat(),
        "machine": f"{accelerator.num_processes} x {describe_machine(accelerator.device.type)}",
    }
    if accelerator.is_main_process:
        write_json(folder / RESULTS_FILE, result)
    accelerator.wait_for_everyone()
    return result


def _load_pipeline(path_or_repo: str, **hub_kwargs) -> LatentDiffusionPQPipeline | MaskedPQPipeline:
    with folder_or_hub(path_or_repo):
        name = DiffusionPipeline.load_config(path_or_repo, revision=hub_kwargs.get("revision")).get("_class_name")
        name = name[-1] if isinstance(name, list) else name  # of a pipeline that brings its code along
        known = {kind.__name__: kind for kind in PIPELINES}
        if name not in known:
            raise ValueError(f"{path_or_repo} holds a {name!r}; samples are drawn of {', '.join(known)}.")
        pipeline = known[name].from_pretrained(path_or_repo, **hub_kwargs)
    if not pipeline.num_classes:
        raise ValueError(f"{path_or_repo} makes pictures of texts; samples are drawn of classes.")
    return pipeline


def _dataset_labels(data: EvaluationData, column: str, streaming: bool, cache_dir: str | None) -> list[int | str]:
    rows = data.rows(streaming, cache_dir, (column,))
    return [row[column] for row in rows.select_columns([column])]


def _check_record(accelerator: Accelerator, path: Path, settings: dict):
    """Write settings to a file, or check that it holds the same."""
    if path.is_file():
        check_settings(read_json(path), settings, path.parent)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(path, settings)


def _digest(configs: list[dict]) -> str:
    return hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode()).hexdigest()


def _batches(paths: Sequence[Path], batch_size: int) -> Iterator[torch.Tensor]:
    """Pictures in files, uint8 `[B, 3, H, W]`."""
    for start in range(0, len(paths), batch_size):
        pictures = [to_tensor(load_image(path)) for path in paths[start : start + batch_size]]
        yield to_uint8(torch.stack(pictures))
