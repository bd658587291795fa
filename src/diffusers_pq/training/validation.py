"""How good a model is on held-out pictures, while it trains."""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from accelerate import Accelerator
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from ..autoencoders import ReconstructionModel, encode_latents, scale_latents
from ..data.pictures import CentreCrops
from ..images import to_uint8
from ..metrics import LPIPS, PSNR, SSIM, CodebookUsage
from .noise import denoising_loss


PREVIEWS = 8  # pictures that are logged


class ReconstructionValidation:
    """
    Measures the reconstruction of held-out pictures, shared out among the processes.

    Args:
        accelerator (`Accelerator`)
        rows (`list[dict]`): What [`usable_rows`] returns, the same in every process.
        image_column (`str`)
        resolution (`int`): Side of the centre crops.
        batch_size (`int`): Per process.
        lpips (*optional*): What [`load_lpips`] returns, to report `lpips`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        rows: list[dict],
        image_column: str,
        resolution: int,
        batch_size: int,
        lpips: nn.Module | None = None,
    ):
        self.accelerator = accelerator
        rows, self.count = _share_out(rows, accelerator)
        crops = CentreCrops(rows, image_column, resolution)
        self.loader = DataLoader(crops, batch_size=batch_size, collate_fn=torch.cat)
        self.metrics = {"psnr": PSNR(), "ssim": SSIM()} | ({} if lpips is None else {"lpips": LPIPS(lpips)})

    @torch.no_grad()
    def evaluate(self, model: ReconstructionModel, quantize: bool = True) -> tuple[dict[str, float], torch.Tensor]:
        """
        To be called by all processes.

        Args:
            model ([`ReconstructionModel`]): Prepared or bare; evaluated in eval mode, its mode is restored.
            quantize (`bool`): `False` measures the model without its quantiser.

        Returns:
            `tuple`: means over all pictures of `psnr` (dB), `ssim` and, if it can be had, `lpips`, with H_n, P_n and
            the share of dead entries if there are codes; and some originals followed by their reconstructions, uint8.
        """
        device = self.accelerator.device
        quantizer = getattr(self.accelerator.unwrap_model(model).autoencoder, "quantizer", None)
        metrics = {name: metric.to(device) for name, metric in self.metrics.items()}
        usage = CodebookUsage(quantizer.num_subspaces, quantizer.codebook_size).to(device) if quantizer else None
        was_training = model.training
        model.eval()
        previews, remaining = None, self.count
        for images in self.loader:
            output = model(images.to(device), quantize=quantize)
            pair = to_uint8(output.sample)[:remaining], to_uint8(images).to(device)[:remaining]
            if previews is None:
                previews = torch.cat([part[:PREVIEWS] for part in reversed(pair)])
            for metric in metrics.values() if remaining else ():
                metric.update(*pair)
            if output.codes is not None:
                usage.update(output.codes[:remaining])
            remaining = max(0, remaining - len(images))
        model.train(was_training)
        scores = {name: float(metric.compute()) for name, metric in metrics.items()}
        for metric in metrics.values():
            metric.reset()
        return scores | (usage.compute() if quantize and usage else {}), previews


class DenoisingValidation:
    """
    Measures the denoising loss on held-out pictures, with the same noise and timesteps each time.

    Args:
        accelerator (`Accelerator`): The pictures are shared out among its processes.
        rows (`list[dict]`): What [`usable_rows`] returns, the same in every process.
        transform: Makes an example from a row and a `random.Random`, such as [`ConditionedCrops`].
        vae: See [`encode_latents`].
        scheduler: See [`denoising_loss`].
        batch_size (`int`): Per process.
        channel_weights (`torch.Tensor`, *optional*): See [`denoising_loss`].
    """

    def __init__(
        self,
        accelerator: Accelerator,
        rows: list[dict],
        transform: Callable,
        vae: nn.Module,
        scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler,
        batch_size: int,
        channel_weights: torch.Tensor | None = None,
    ):
        self.accelerator = accelerator
        self.vae = vae
        self.channel_weights = channel_weights
        self.scheduler = scheduler
        rows, self.count = _share_out(rows, accelerator)
        examples = [transform(row, random.Random(number)) for number, row in enumerate(rows)]
        self.loader = DataLoader(examples, batch_size=batch_size)

    @torch.no_grad()
    def evaluate(self, denoiser: nn.Module) -> dict[str, float]:
        """The mean `loss` of a denoiser, prepared or bare; to be called by all processes."""
        device = self.accelerator.device
        generator = torch.Generator().manual_seed(self.accelerator.process_index)
        mean = MeanMetric().to(device)
        was_training = denoiser.training
        denoiser.eval()
        remaining = self.count
        for batch in self.loader:
            latents = scale_latents(self.vae, encode_latents(self.vae, batch["pixel_values"]))
            condition = batch["condition"].to(device)
            weights = {"channel_weights": self.channel_weights}
            losses = denoising_loss(denoiser, self.scheduler, latents, condition, **weights, generator=generator)
            mean.update(losses[:remaining])
            remaining = max(0, remaining - len(losses))
        denoiser.train(was_training)
        return {"loss": float(mean.compute())}


@contextmanager
def ema_weights(ema: EMAModel | None, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Hold the averaged weights in the parameters for a while; without an average, do nothing."""
    if ema is None:
        yield
        return
    parameters = list(parameters)
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def _share_out(rows: list[dict], accelerator: Accelerator) -> tuple[list[dict], int]:
    """
    This process's rows, and how many of them count. Processes get equally many, so that they make the same number of
    forward passes, which sharded models need; what fills up stands at the end and is not to be counted.
    """
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    missing = math.ceil(len(rows) / accelerator.num_processes) - len(mine)
    return mine + rows[:1] * missing, len(mine)
