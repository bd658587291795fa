"""Devices by the names that users give."""

import torch


def usable_device(name: str) -> str:
    """
    A device's name, such as `"cpu"` or `"cuda:1"`, once it is known to work on this machine.

    Raises:
        ValueError: if torch knows no such device or the machine has none.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"There is no device {name!r}: give cpu, cuda, cuda:1 or mps, for example.") from None
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        why = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"The device {name!r} cannot be used on this machine: {why}.") from error
    return name
