"""
The paper's evaluation of image autoencoders (section 4.4, Tables 1 and 2): any autoencoder of diffusers, any image
dataset, on many processes, resumable.
"""

import datetime
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import datasets
import torch
import torch.nn as nn
from accelerate import Accelerator, skip_first_batches
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from tqdm.auto import tqdm

from ..autoencoders import weights_digest
from ..files import read_json, write_json, write_text
from ..images import to_uint8
from ..measuring import describe_machine
from ..metrics import DEFAULT_METRICS, CodebookUsage, load_metrics
from ..reconstruction import codebook_shape, reconstruct, stored_bits_per_pixel
from .data import EvaluationData, protocol_of
from .progress import EvaluationProgress, check_settings
from .systems import load_for_evaluation
from .tables import RESULTS_FILE, model_index


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
    as_authors: bool = False,
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
        metrics: Names out of [`~diffusers_pq.metrics.METRICS`]; those whose weights are missing are listed as
            unavailable.
        as_authors (`bool`): See [`~diffusers_pq.metrics.load_metrics`].
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
    how = {"as_authors": True} if as_authors else {}
    protocol = protocol_of(asdict(data) | how)
    suffix = f"-{protocol or data.resize_mode}" if data.resize_mode != "short_side" or protocol else ""
    folder = Path(output_dir, name.replace("/", "--"), f"{data.name}-{data.split}-{data.resolution}{suffix}")
    share = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    with accelerator.local_main_process_first():  # what must be downloaded, is so once
        model = load_for_evaluation(pretrained_model_name_or_path, **hub_kwargs)
    model.to(accelerator.device, torch.float32)
    latents = describe_latents(model, data.resolution)  # refuses a resolution that does not suit the model
    with accelerator.local_main_process_first():
        loader = data.loader(batch_size, num_workers, streaming, cache_dir, **share)
        collection, unavailable = load_metrics(metrics, as_authors)
    settings = asdict(data) | how | {"metrics": sorted(collection), "weights_sha256": weights_digest(model)}
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
