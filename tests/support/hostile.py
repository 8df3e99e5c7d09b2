"""Files that no honest program writes."""

import io
import os
import pickle
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def with_pickle(content: bytes, change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A checkpoint's bytes with another data.pkl."""
    new = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(new, "w", compression) as archive:
        for name in old.namelist():
            archive.writestr(name, change(old.read(name)) if name.endswith("data.pkl") else old.read(name))
    return new.getvalue()


def saved(value: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def legacy(value: Any) -> bytes:
    """As torch.save wrote before it wrote zip archives."""
    content = io.BytesIO()
    torch.save(value, content, _use_new_zipfile_serialization=False)
    return content.getvalue()


def torchscript() -> bytes:
    content = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), content)
    return content.getvalue()


def call_of(module: str, name: str, argument: int) -> bytes:
    """A pickle that calls something with a number."""
    number = pickle.dumps(argument, protocol=2)[2:-1]
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + number + b"\x85R."


def nested_lists(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def doubled_lists(times: int) -> Any:
    """A list of twice the same list of twice the same list ..."""
    value: Any = []
    for _ in range(times):
        value = [value, value]
    return value


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def listening_socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)  # in the current folder: such an address is short
    return path


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path
