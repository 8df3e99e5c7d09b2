"""From the path of a checkpoint to what is in it."""

from pathlib import Path

from ort_ops.ternary_models.errors import CheckpointError
from ort_ops.ternary_models.hugging_face import HuggingFaceCheckpoint
from ort_ops.ternary_models.types import TernaryCheckpoint


def open_checkpoint(path: Path) -> TernaryCheckpoint:
    """A folder of Hugging Face (config.json and safetensors), or a file in GGUF.

    Loads numpy, safetensors and, for GGUF, the package gguf. Names, shapes and sizes are checked here, values as they are read.

    Raises:
        CheckpointError: nothing of the kind, or a checkpoint that is damaged or not ternary; with the tensor and the reason.
        ImportError: the package gguf is missing.
    """
    if path.is_dir():
        return HuggingFaceCheckpoint(path)
    if not path.exists():
        raise CheckpointError(f"{path} must exist: a folder with config.json and safetensors, or a file in GGUF")
    try:
        from ort_ops.ternary_models.gguf_checkpoint import GgufCheckpoint
    except ImportError as error:
        raise ImportError(f"files in GGUF need {error.name}: pip install 'trix[import]'") from error
    return GgufCheckpoint(path)
