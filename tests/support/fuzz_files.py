"""Feed every reader of files mutated ones: checkpoints, exported models, ternary models of others, YAML, texts and more.

Usage: fuzz_files.py FOLDER SEED SECONDS [CASE]. FOLDER holds the honest files lm.ckpt and lm.onnx and the folder ternary; the
input of a case is written there. A reader may read it or refuse it with the errors that it documents. Any other error, more
than 10 s or more than 1 GB of memory ends the process, which leaves the input where it is and prints SEED and CASE: they repeat
it alone. At the end it prints how many inputs each reader was given, refused and accepted.
"""

import copy
import faulthandler
import io
import json
import os
import resource
import shutil
import struct
import sys
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import yaml
from hostile import with_pickle
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from lightning_modules.callbacks.run_record import read_metrics
from lightning_modules.checkpoint_data import run_data
from lightning_modules.commands.inspect_onnx import make_onnx_page
from lightning_modules.commands.runs import as_json, find_runs
from lightning_modules.data.corpora import load_file
from lightning_modules.errors import UserError
from lightning_modules.signature_values import read_signature
from lightning_modules.tasks import load_checkpoint
from lightning_modules.yaml_files import read_yaml
from ort_ops.runtime import LanguageModelSession
from ort_ops.ternary_models.errors import CheckpointError
from ort_ops.ternary_models.gguf_header import read_header
from ort_ops.ternary_models.reading import open_checkpoint
from ort_ops.ternary_models.tensor_shapes import float_shapes, ternary_shapes

MAX_SECONDS, MAX_BYTES, ADDRESS_SPACE = 10, 2**30, 2**34
TERNARY_FILES = ("config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors")
Rng = np.random.Generator
ODD_NUMBERS = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 7, 17, 255, 2**20, 2**31, 2**34, 2**60, 2**63, 10**30, 10**400)
ODD_TEXTS = (
    "",
    "a",
    "\ud800",
    "\0",
    "x" * 5000,
    "/dev/zero",
    ".",
    "../..",
    "emergent",
    "sparse_lookup",
    "hierarchical",
    "none",
)
YAML_WORDS = (
    "&a ",
    "*a",
    "[",
    "]",
    "{",
    "}",
    "- ",
    "? ",
    ": ",
    "!!int ",
    "!!python/none ",
    "\t",
    "<<: ",
    "|\n",
    "'",
    '"',
    "---\n",
)
JSON_WORDS = ("[", "]", "{", "}", ",", ":", "NaN", "Infinity", "1e999", "9" * 5000, '"\\ud800"', "null", "true", "-1", '"a"')


def odd_tensor(rng: Rng) -> torch.Tensor:
    tensor = torch.zeros(tuple(map(int, rng.integers(0, 20, size=rng.integers(0, 4)))))
    kinds = (torch.int8, torch.bool, torch.complex64, torch.int64, torch.uint8, torch.float64, torch.bfloat16, torch.float16)
    choices: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: tensor.to(kinds[rng.integers(len(kinds))]),
        lambda: tensor + torch.nan,
        lambda: torch.zeros(1).expand(2 ** int(rng.integers(1, 40))),
        lambda: torch.tensor(int(rng.integers(-(2**62), 2**62))),
        lambda: tensor.to_sparse(),
    )
    return choices[rng.integers(len(choices))]()


def odd_value(rng: Rng, has_tensors: bool) -> Any:
    nested: Any = []
    for _ in range(int(rng.integers(0, 200))):
        nested = [nested]
    choices = [
        ODD_NUMBERS[rng.integers(len(ODD_NUMBERS))],
        ODD_TEXTS[rng.integers(len(ODD_TEXTS))],
        *(None, True, float("nan"), float("inf"), -0.5, 1e308, [], {}, {"a": 1}, nested, [1] * 1000),
    ]
    if has_tensors and rng.random() < 0.4:
        return odd_tensor(rng)
    return choices[rng.integers(len(choices))]


def change_value(rng: Rng, content: Any, has_tensors: bool = False, depth: int = 0) -> Any:
    """One value somewhere within replaced, removed or added; the content itself may be changed."""
    is_container = isinstance(content, dict | list) and len(content) > 0
    if not is_container or (depth > 0 and rng.random() < 0.15):
        if isinstance(content, torch.Tensor) and content.is_floating_point() and content.numel() and rng.random() < 0.3:
            changed = content.clone()
            changed.view(-1)[rng.integers(changed.numel())] = rng.choice([np.nan, np.inf, -np.inf, 1e38, -1.0, 0.0])
            return changed
        return odd_value(rng, has_tensors)
    places = list(content) if isinstance(content, dict) else range(len(content))
    place = places[rng.integers(len(places))]
    if rng.random() < 0.1:
        del content[place]
    elif rng.random() < 0.1:
        other = places[rng.integers(len(places))]
        content[place] = content.get(other) if isinstance(content, dict) else content[-1]
    else:
        content[place] = change_value(rng, content[place], has_tensors, depth + 1)
    return content


def change_bytes(rng: Rng, content: bytes) -> bytes:
    raw = bytearray(content)
    for _ in range(int(rng.integers(1, 6))):
        place = int(rng.integers(len(raw) + 1))
        kind = rng.random()
        if kind < 0.5 and raw:
            raw[place % len(raw)] = int(rng.integers(256))
        elif kind < 0.65:
            raw[place:place] = raw[place // 2 : place // 2 + int(rng.integers(1, 200))]
        elif kind < 0.8:
            del raw[place : place + int(rng.integers(1, 200))]
        elif kind < 0.9:
            raw[place : place + 8] = int(rng.choice([0, 1, 2**31, 2**40, 2**63 - 1])).to_bytes(8, "little")
        else:
            del raw[place:]
    return bytes(raw)


def change_text(rng: Rng, text: str, words: tuple[str, ...]) -> bytes:
    for _ in range(int(rng.integers(1, 6))):
        place = int(rng.integers(len(text) + 1))
        word = words[rng.integers(len(words))]
        times = min(10 ** int(rng.integers(0, 6)), 2**20 // len(word)) if rng.random() < 0.1 else 1
        text = text[:place] + word * times + text[place + int(rng.integers(0, 3)) :]
    content = text.encode()
    return change_bytes(rng, content) if rng.random() < 0.3 else content


class Originals:
    """The honest files that are changed."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint_bytes = (folder / "lm.ckpt").read_bytes()
        self.checkpoint = torch.load(folder / "lm.ckpt", weights_only=True)
        self.model_bytes = (folder / "lm.onnx").read_bytes()
        self.ternary = {name: (folder / "ternary" / name).read_bytes() for name in TERNARY_FILES}
        self.yaml = yaml.safe_dump(copy.deepcopy(self.checkpoint["hyper_parameters"]) | {"a": [1, 2.5, None, {"b": "c"}]})


def checkpoint_input(rng: Rng, originals: Originals) -> bytes:
    kind = rng.random()
    if kind < 0.15:
        return change_bytes(rng, originals.checkpoint_bytes)
    if kind < 0.4:
        return with_pickle(originals.checkpoint_bytes, lambda pickled: change_bytes(rng, pickled))
    checkpoint = copy.deepcopy(originals.checkpoint)
    for _ in range(int(rng.integers(1, 4))):
        part = ("hyper_parameters", "state_dict", "datamodule_hyper_parameters", None)[rng.integers(4)]
        if part is None or part not in checkpoint:
            checkpoint = change_value(rng, checkpoint, has_tensors=True)
        else:
            checkpoint[part] = change_value(rng, checkpoint[part], has_tensors=part == "state_dict")
        if not isinstance(checkpoint, dict):
            break
    content = io.BytesIO()
    torch.save(checkpoint, content)
    return content.getvalue()


def model_input(rng: Rng, originals: Originals) -> bytes:
    if rng.random() < 0.2:
        return change_bytes(rng, originals.model_bytes)
    proto = onnx.load_model_from_string(originals.model_bytes)
    entries, constants = proto.metadata_props, proto.graph.initializer
    if rng.random() < 0.75:
        entry = entries[rng.integers(len(entries))]
        if rng.random() < 0.3:
            entry.value = change_text(rng, entry.value, JSON_WORDS).decode("utf-8", "replace")
        else:
            entry.value = json.dumps(change_value(rng, json.loads(entry.value)))
    else:
        tensor = constants[rng.integers(len(constants))]
        if rng.random() < 0.3:
            tensor.data_type = int(rng.integers(0, 24))
        elif rng.random() < 0.5 and tensor.dims:
            tensor.dims[rng.integers(len(tensor.dims))] = int(rng.choice([-1, 0, 1, 2, 4, 2**31, 2**60]))
        else:
            tensor.raw_data = change_bytes(rng, tensor.raw_data)
    return proto.SerializeToString()


def ternary_input(rng: Rng, originals: Originals) -> bytes:
    """A file of the folder, behind the place of its name in TERNARY_FILES."""
    place = int(rng.integers(len(TERNARY_FILES)))
    honest = originals.ternary[TERNARY_FILES[place]]
    if TERNARY_FILES[place].endswith(".json") and rng.random() < 0.8:
        changed = json.dumps(change_value(rng, json.loads(honest))).encode()
    elif rng.random() < 0.5:
        start = int(rng.integers(len(honest)))
        changed = honest[:start] + change_bytes(rng, honest[start : start + 200]) + honest[start + 200 :]
    else:
        changed = change_bytes(rng, honest)
    return bytes([place]) + changed


def gguf_input(rng: Rng, originals: Originals) -> bytes:
    """The header alone, written by hand: the package gguf need not be there."""
    content = b"GGUF" + struct.pack("<IQQ", 3, 2, 4)
    content += gguf_text("general.architecture") + struct.pack("<I", 8) + gguf_text("llama")
    content += gguf_text("llama.block_count") + struct.pack("<II", 4, 1)
    content += gguf_text("tokens") + struct.pack("<IIQ", 9, 8, 3) + gguf_text("a") * 3
    content += gguf_text("scores") + struct.pack("<IIQ3f", 9, 6, 3, 0, 1, 2)
    for name, kind in (("token_embd.weight", 0), ("blk.0.attn_q.weight", 35)):
        content += gguf_text(name) + struct.pack("<IQQIQ", 2, 256, 8, kind, 0)
    return change_bytes(rng, content)


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def json_input(rng: Rng, originals: Originals) -> bytes:
    honest = json.dumps([[1, 0, -1, 0] * 4, {"positive_dims": [1, 2], "negative_dims": [3]}, "+0-0" * 4][rng.integers(3)])
    if rng.random() < 0.5:
        return change_text(rng, honest, JSON_WORDS)
    return json.dumps(change_value(rng, json.loads(honest))).encode()


def metrics_input(rng: Rng, originals: Originals) -> bytes:
    rows = "epoch,step,train/loss,val/loss\n" + "".join(f"0,{step},{1 / (step + 1)},\n" for step in range(20))
    return change_text(rng, rows, (",", '"', "\n", "\r", "nan", "9" * 5000, "\0", "step", "-", "x" * 1000))


def events_input(rng: Rng, originals: Originals) -> bytes:
    """Records with right checksums of odd events; at times with wrong bytes."""
    content = io.BytesIO()
    writer = RecordWriter(content)
    for step in range(5):
        event = Event(wall_time=1.6e9 + step, step=step)
        event.summary.value.add(tag="val/loss", simple_value=1.0 / (step + 1))
        if rng.random() < 0.3:
            event.wall_time = float(rng.choice([-1e18, -1.0, 0.0, 1e12, 1e300, np.nan, np.inf]))
        if rng.random() < 0.3:
            event.step = int(rng.choice([-(2**63), -1, 2**40, 2**63 - 1]))
        if rng.random() < 0.3:
            event.summary.value.add(
                tag=str(rng.choice(["", "a/b", "x" * 1000, "\n"])), simple_value=float(rng.choice([np.nan, np.inf]))
            )
        record = event.SerializeToString()
        writer.write(change_bytes(rng, record) if rng.random() < 0.1 else record)
    return change_bytes(rng, content.getvalue()) if rng.random() < 0.3 else content.getvalue()


def text_input(rng: Rng, originals: Originals) -> bytes:
    return change_bytes(rng, "Où est-elle ? 🙂".encode() * 20)


def read_checkpoint_and_data(path: Path) -> None:
    task, checkpoint = load_checkpoint(path)
    task.page(run_data(task, checkpoint, path), num_tokens=1)


def read_exported(path: Path) -> None:
    refused = None
    try:
        make_onnx_page(path).encode()
    except ValueError as error:
        refused = error
    except UserError as error:
        refused = error
    session = LanguageModelSession(path)
    list(session.generate(session.vocabulary[:3], num_tokens=3))
    session.check_parity()
    if refused is not None:
        raise refused


def read_ternary(path: Path) -> None:
    content, folder = path.read_bytes(), path.parent / "ternary"
    changed = folder / TERNARY_FILES[content[0]]
    honest = changed.read_bytes()
    changed.write_bytes(content[1:])
    try:
        checkpoint = open_checkpoint(folder)
        dict(checkpoint.sources)
        for name in ternary_shapes(checkpoint.config):
            assert set(np.unique(checkpoint.ternary(name).code_NK)) <= {-1, 0, 1}
        for name in float_shapes(checkpoint.config):
            assert np.isfinite(checkpoint.float32(name)).all()
    finally:
        changed.write_bytes(honest)


def read_events(path: Path) -> None:
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    shutil.copy(path, folder / "events.out.tfevents.1")
    try:
        json.dumps([as_json(run) for run in find_runs(folder)])
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Reader:
    """make: an input. read: it, or raise one of the errors that the reader documents."""

    make: Callable[[Rng, Originals], bytes]
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...] = (UserError,)
    suffix: str = ""


READERS = {
    "checkpoint": Reader(checkpoint_input, read_checkpoint_and_data, suffix=".ckpt"),
    "model": Reader(model_input, read_exported, (UserError, ValueError), suffix=".onnx"),
    "ternary": Reader(ternary_input, read_ternary, (CheckpointError,)),
    "gguf": Reader(gguf_input, read_header, (CheckpointError,), suffix=".gguf"),
    "yaml": Reader(lambda rng, originals: change_text(rng, originals.yaml, YAML_WORDS), read_yaml, suffix=".yaml"),
    "signature": Reader(json_input, lambda path: read_signature(str(path), 16), suffix=".json"),
    "metrics": Reader(metrics_input, read_metrics, suffix=".csv"),
    "events": Reader(events_input, read_events, suffix=".events"),
    "text": Reader(text_input, load_file, suffix=".txt"),
}


def peak_bytes() -> int:
    """The most memory that the process has had since it was last asked."""
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def run_case(case: int, seed: int, folder: Path, originals: Originals, counts: Counter[tuple[str, str]]) -> None:
    rng = np.random.default_rng([seed, case])
    name = list(READERS)[case % len(READERS)]
    reader = READERS[name]
    path = folder / f"case{reader.suffix}"
    try:
        content = reader.make(rng, originals)
    except (zipfile.BadZipFile, UnicodeEncodeError):  # what cannot be written
        return
    path.write_bytes(content)
    faulthandler.dump_traceback_later(3 * MAX_SECONDS, exit=True)
    peak_bytes()
    before, start = peak_bytes(), time.monotonic()
    problem = None
    try:
        reader.read(path)
        counts[name, "accepted"] += 1
    except reader.errors:
        counts[name, "refused"] += 1
    except Exception:
        problem = traceback.format_exc()
    seconds, used = time.monotonic() - start, peak_bytes() - before
    faulthandler.cancel_dump_traceback_later()
    if seconds > MAX_SECONDS:
        problem = f"took {seconds:.1f} s"
    if used > MAX_BYTES:
        problem = f"took {used} bytes"
    if problem is not None:
        print(f"{name}: {problem}\nseed {seed} case {case}, the input is {path}", flush=True)
        sys.exit(1)
    path.unlink()


def main(folder: Path, seed: int, seconds: float, case: int | None = None) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, resource.getrlimit(resource.RLIMIT_AS)[1]))
    torch.set_num_threads(1)
    originals, counts = Originals(folder), Counter[tuple[str, str]]()
    os.chdir(folder)  # where paths in the files lead
    if case is not None:
        run_case(case, seed, folder, originals, counts)
        return
    end, case = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        print(f"case {case}", flush=True)
        run_case(case, seed, folder, originals, counts)
        case += 1
    print(f"seed {seed}")
    for name in READERS:
        refused, accepted = counts[name, "refused"], counts[name, "accepted"]
        print(f"{name}: tried {refused + accepted}, refused {refused}, accepted {accepted}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), float(sys.argv[3]), *map(int, sys.argv[4:]))
