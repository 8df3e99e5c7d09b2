"""Where the precision must not be autocast's."""

from contextlib import nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> torch.autocast | nullcontext[None]:
    """A context in which autocast is off for the device of x."""
    # Entered only where autocast is on: an always-entered context would stand in every exported graph.
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
