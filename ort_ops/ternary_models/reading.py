"""From the path of a checkpoint to what is in it."""

from pathlib import Path

from ort_ops.ternary_models.errors import CheckpointError
from ort_ops.ternary_models.types import TernaryCheckpoint


def open_checkpoint(path: Path) -> TernaryCheckpoint:
    """A folder of Hugging Face (config.json and safetensors), or a file in GGUF.

    Folders need the packages safetensors and ml_dtypes, files in GGUF the package gguf. Names, shapes and sizes are checked
    here, values as they are read.

    Raises:
        CheckpointError: nothing of the kind, or a checkpoint that is damaged or not ternary; with the tensor and the reason.
        ImportError: one of these packages is missing.
    """
    if not path.exists():
        raise CheckpointError(f"{path} must exist: a folder with config.json and safetensors, or a file in GGUF")
    try:
        if path.is_dir():
            from ort_ops.ternary_models.hugging_face import HuggingFaceCheckpoint

            return HuggingFaceCheckpoint(path)
        from ort_ops.ternary_models.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(path)
    except ImportError as error:
        raise ImportError(f"{path} needs the package {error.name}: pip install 'trix[import]'") from error
