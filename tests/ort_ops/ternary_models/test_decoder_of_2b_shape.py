"""The shape of BitNet b1.58 2B4T with random weights: memory, disk, and that it loads and runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.usefixtures("native_library"), pytest.mark.slow, pytest.mark.timeout(3600)]

# The largest size of the process is what the system says of it, so it is one of its own.
WRITER = """
import json, resource, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np
import onnxruntime as ort
from random_decoders import BITNET, RandomCheckpoint
from ort_ops.library import session_options
from ort_ops.ternary_models.decoder_folder import write_decoder

config = replace(BITNET, hidden_size=2560, num_layers=30, num_heads=20, num_key_value_heads=5, head_size=128,
                 intermediate_size=6912, vocab_size=128256, max_position=4096)

class Large(RandomCheckpoint):
    def float32(self, name):
        if name != "embedding":
            return super().float32(name)
        rows = np.random.default_rng(0).standard_normal((1336, config.hidden_size), dtype=np.float32) * np.float32(0.1)
        return np.tile(rows, (96, 1))

start = time.perf_counter()
report = write_decoder(Large(config), Path("decoder"))
seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
session = ort.InferenceSession("decoder/model.onnx", session_options(), providers=["CPUExecutionProvider"])
feeds = {"input_ids": np.array([[1, 5, 9]]), "attention_mask": np.ones((1, 3), np.int64)}
empty = np.zeros((1, 5, 0, 128), np.float32)
feeds |= {value.name: empty for value in session.get_inputs() if value.name.startswith("past")}
(logits,) = session.run(["logits"], feeds)
parity = max(report.parity.values())
print(json.dumps({"seconds": seconds, "peak": peak, "bytes": sum(report.file_bytes.values()), "parity": parity,
                  "shape": logits.shape, "finite": bool(np.isfinite(logits).all())}))
"""


def test_it_is_written_in_4_gb_and_takes_less_than_1_gb_on_disk(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(
        [sys.executable, "-c", WRITER], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(process.stdout)
    print(found)
    assert found["peak"] <= 4e9
    assert found["bytes"] <= 0.95e9
    assert found["shape"] == [1, 3, 128256]
    assert found["finite"]
    assert found["parity"] <= 1e-6
