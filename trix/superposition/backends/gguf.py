"""Models in GGUF files, turned into folders that transformers reads at once."""

import hashlib
import os
import tempfile
from pathlib import Path

import torch

from trix.regular_files import open_regular
from trix.superposition.backends.base_model import DTYPES
from trix.superposition.config import DTypeName

MAGIC = b"GGUF"


def convert_gguf(path: Path | str, cache: Path | str, dtype: DTypeName = "fp32", sha256: str | None = None) -> Path:
    """Convert a causal language model once, with its tokenizer, and return its folder.

    The folder is ``cache/NAME-DTYPE-DIGEST``, with the digest of the file: if it is there, the file is not converted again.
    Quantized weights are written as the numbers that they stand for, exactly so in fp32. The folder gets its name when it is
    complete, on the disk, and reads back as the same model.

    Args:
        path: the file. cache: folder of the converted models, which is made. dtype: of the weights as they are written.
        sha256: digest, in hex, that the file must have.

    Raises:
        ImportError: transformers, gguf or accelerate is missing.
        ValueError: no GGUF file, a damaged one, one with another digest or of a kind that transformers does not read; another
            dtype.
        OSError: a file cannot be read or written.
    """
    path, cache = Path(path), Path(cache)
    if dtype not in DTYPES:
        raise ValueError(f"dtype ({dtype!r}) must be one of {', '.join(DTYPES)}")
    with open_regular(path) as file:
        magic = file.read(len(MAGIC))
        if magic != MAGIC:
            raise ValueError(f"{path}: first bytes ({magic!r}) must be {MAGIC!r}, as in a GGUF file")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    if sha256 is not None and digest != sha256.lower():
        raise ValueError(f"{path}: SHA-256 ({digest}) must be {sha256.lower()}")
    folder = cache / f"{path.stem}-{dtype}-{digest[:16]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".gguf-") as made:
        partial = Path(made) / "model"
        _write(path, partial, DTYPES[dtype])
        for written in (*partial.iterdir(), partial):
            _sync(written)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was faster
                raise
    return folder


def _write(path: Path, folder: Path, dtype: torch.dtype) -> None:
    try:
        import accelerate  # noqa: F401 (transformers needs both to read such a file)
        import gguf  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError(f"GGUF files need {error.name}: pip install 'trix[gguf]'") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # what a damaged file raises depends on where the damage is
        raise ValueError(f"{path} must be a whole GGUF file of a kind that transformers reads: {error}") from error
    # transformers does not save a model that was quantized, so a new one without that setting takes the weights.
    config = type(model.config).from_dict(
        {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True).state_dict()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, again[name])]
    if changed:
        raise ValueError(f"weights of {path} ({changed[0]} and others) must be the same in the folder that was written")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
