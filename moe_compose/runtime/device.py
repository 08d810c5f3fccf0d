"""Devices that are there."""

from __future__ import annotations

import torch

from moe_compose.errors import OptionError


def device_of(name: str | torch.device) -> torch.device:
    """A device that is here.

    Raises:
        OptionError: no such device, or none of this machine.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as e:
        first = (str(e) or type(e).__name__).splitlines()[0]
        raise OptionError(f"device ({name}) cannot be used: {first}") from e
    if device.type == "meta":
        raise OptionError("device (meta) holds no values: nothing can be computed there")
    return device
