"""Every reader of files on mutated ones, for TRIX_FUZZ_SECONDS (default 30, always the same cases in the same order).

`make fuzz-files` gives them ten minutes and a seed of their own, TRIX_FUZZ_SEED.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from shown import SHOWN
from small_runs import SENTENCE, save_checkpoint, small_network
from ternary_folders import tiny_model, write_packed

from lightning_modules.cli import main
from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import LanguageModelTask

SECONDS = float(os.environ.get("TRIX_FUZZ_SECONDS", "30"))
SEED = os.environ.get("TRIX_FUZZ_SEED", "0")
WORKER = Path(__file__).parents[1] / "support" / "fuzz_files.py"
READERS = ("checkpoint", "model", "ternary", "gguf", "yaml", "signature", "metrics", "events", "text")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, which says what memory a case takes")
@pytest.mark.timeout(SECONDS + 600)
def test_readers_take_or_refuse_what_they_are_given(tmp_path: Path, record_property: Callable[[str, str], None]) -> None:
    (tmp_path / "text.txt").write_text(SENTENCE * 30)
    text = TextDataModule(path=tmp_path / "text.txt", context_length=8, batch_size=4, batches_per_epoch=2)
    save_checkpoint(LanguageModelTask(text.vocabulary, small_network()), text, tmp_path / "lm.ckpt")
    assert main(["export", "--ckpt", str(tmp_path / "lm.ckpt"), "--output", str(tmp_path / "lm.onnx")]) == 0
    write_packed(tmp_path / "ternary", tiny_model(num_layers=1), num_shards=2)
    command = [sys.executable, str(WORKER), str(tmp_path), SEED, str(SECONDS)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS + 300)
    output = result.stdout[-3000:] + result.stderr[-3000:]
    assert result.returncode == 0, output
    record_property(SHOWN, "\n".join(result.stdout.splitlines()[-1 - len(READERS) :]))
    found = dict(re.findall(r"^(\w+): tried (\d+), ", result.stdout, re.MULTILINE))
    assert set(found) == set(READERS)
    assert all(int(number) > 0 for number in found.values()), output
    for name in ("checkpoint", "model", "ternary", "gguf", "yaml"):  # or nothing behind the first check was reached
        assert re.search(rf"^{name}: .* accepted [1-9]", result.stdout, re.MULTILINE), output
