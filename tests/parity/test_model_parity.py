"""A whole exported model: torch = portable functions = every instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import exported_models
import numpy as np
import pytest
import torch
from native_fixtures import has_instruction_set

from trix.nn import FFNConfig

RUN = """
import sys, numpy as np
from ort_ops.runtime import LanguageModelSession
model, tokens, output, use_library = sys.argv[1:]
logits, tile_idx = LanguageModelSession(model, use_library=use_library == "1").run(np.load(tokens))
np.savez(output, logits=logits, tile_idx=tile_idx)
"""


def run(path: Path, tokens: Path, isa: str | None) -> tuple[np.ndarray, np.ndarray]:
    output = path.with_name(f"{isa}.npz")
    environment = os.environ | ({"TRIX_ORT_ISA": isa} if isa else {})
    arguments = [str(path), str(tokens), str(output), "1" if isa else "0"]
    subprocess.run([sys.executable, "-c", RUN, *arguments], check=True, env=environment)
    with np.load(output) as results:
        return results["logits"], results["tile_idx"]


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("routing", ["explicit", "emergent"])
def test_torch_portable_scalar_and_avx2_agree(routing: str, tmp_path: Path) -> None:
    exported = exported_models.export(tmp_path, FFNConfig(num_tiles=6, d_ff=6 * 11, top_k=2, routing=routing))
    token = exported.held_out.reshape(-1, exported_models.CONTEXT)
    np.save(tmp_path / "tokens.npy", token.numpy())
    with torch.no_grad():
        logits, infos, _ = exported.model(token, return_routing=True)
    expected_idx = torch.stack([info["tile_idx"] for info in infos], dim=2).numpy()
    isas = [None, "scalar"] + (["avx2"] if has_instruction_set("avx2") else [])
    results = {isa: run(exported.path, tmp_path / "tokens.npy", isa) for isa in isas}
    for isa, (actual, tile_idx) in results.items():
        np.testing.assert_allclose(actual, logits.numpy(), rtol=1e-4, atol=1e-4 * float(logits.abs().max()), err_msg=str(isa))
        assert np.array_equal(tile_idx, expected_idx), isa
        if isa is not None:
            assert np.array_equal(actual, results["scalar"][0])  # bit for bit
