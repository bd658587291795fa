"""Optimisers by name: torch's own, and those of packages that only some runs need."""

import importlib
import logging
from collections.abc import Iterable
from types import ModuleType

import torch

from .options import OptimisationOptions


logger = logging.getLogger(__name__)


def build_optimizer(
    optim: OptimisationOptions,
    parameters: Iterable[torch.nn.Parameter],
    learning_rate: float,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """
    What `--optimizer` and `--use_8bit_adam` ask for.

    Args:
        optim ([`OptimisationOptions`]): With the betas.
        parameters: To train.
        learning_rate (`float`): Prodigy multiplies the rate that it finds by it.
        weight_decay (`float`): Decoupled from the gradient (AdamW).

    Raises:
        ImportError: if the optimiser's package is not installed; the message says how to install it.
    """
    usual = {"lr": learning_rate, "betas": (optim.adam_beta1, optim.adam_beta2), "weight_decay": weight_decay}
    if optim.optimizer == "prodigy":
        if learning_rate <= 0.1:
            logger.warning("Prodigy finds the learning rate itself: its factor %g is usually 1.", learning_rate)
        remedies = {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}
        return _package("prodigyopt", "--optimizer prodigy").Prodigy(parameters, **usual, **remedies)
    if optim.use_8bit_adam:
        return _package("bitsandbytes", "--use_8bit_adam").optim.AdamW8bit(parameters, **usual)
    return torch.optim.AdamW(parameters, **usual, fused=True)


def _package(name: str, flag: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{flag} needs the package {name}, which is not installed: `pip install {name}`.") from error
