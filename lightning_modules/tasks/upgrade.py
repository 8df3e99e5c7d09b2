"""Checkpoints of earlier versions, made into what the present version would have written."""

from typing import Any

from trix.nn.block import renamed_from_version_1

# Where weights stand: those of the network; and where these are an average, those that are trained.
COPIES = ("state_dict", "current_model_state")


def upgrade(checkpoint: dict[str, Any], entry: dict[str, Any]) -> None:
    """Change the content of a checkpoint in place.

    Version 1 has other names of weights: blocks were not made of two sublayers.

    Args:
        entry: what the checkpoint says of itself.
    """
    if entry.get("version") == 1:
        entry["version"] = 2
        for key in COPIES:
            if isinstance(checkpoint.get(key), dict):
                checkpoint[key] = renamed_from_version_1(checkpoint[key])
