"""The benchmark of resolvent mixing: every contestant goes forward and backward, and the table can be made of a record."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from cases import bk_speed

from trix.nn import ResolventMixer


def test_chunks_and_loops_are_compared_first() -> None:
    bk_speed.check()


@pytest.mark.parametrize("way", bk_speed.WAYS)
def test_a_step_gives_the_gradients_of_all_inputs(way: str) -> None:
    if way == "mambapy" and find_spec("mambapy") is None:
        pytest.skip("mambapy is not installed")
    grads = bk_speed.make(way, 40)()
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)


def test_what_a_process_grows_by_is_measured() -> None:
    assert 10e6 < bk_speed.peak_bytes("vector", 8192) < 1e9


@torch.no_grad()
def test_decoding_goes_on_where_the_text_ended() -> None:
    torch.manual_seed(0)
    mixer = ResolventMixer(128, 8, hopping="hermitian").eval()
    x_BTD = torch.cat([torch.randn(1, 40, 128), torch.randn(1, bk_speed.DECODED, 128)], dim=1)
    decode = bk_speed.make_decode(40)
    expected_BTD = mixer(x_BTD)[0][:, -1:]
    for _ in range(2):  # every turn starts from the same state
        torch.testing.assert_close(decode(), expected_BTD, rtol=0, atol=1e-4)


def test_table_and_drawing_of_a_record() -> None:
    results = [
        {"way": way, "length": length, "ms": [scale * length, scale * length * 1.1], "peak_bytes": length * 1000}
        for length in (2048, 8192)
        for way, scale in (("vector", 1.0), ("one_way_vector", 0.5), ("attention", 10.0))
    ]
    results.append({"way": "vector", "length": 32768, "ms": [8192 * 4**1.5], "peak_bytes": 32768000})
    for length, ms in ((64, [1.0, 2.0]), (65536, [1.2, 2.2])):
        results.append({"way": "decode", "length": length, "ms": ms, "peak_bytes": None})
    table = bk_speed.table(results)
    assert "| attention / vector, 2048 tokens | >= 4.0 | 10.00 | yes |" in table
    assert "| attention / vector, 8192 tokens | >= 14.0 | 10.00 | no |" in table
    assert "| vector / one_way_vector, 8192 tokens | <= 1.3 | 2.00 | no |" in table
    assert "| vector: exponent of the time in the length | <= 1.05 | 1.23 | no |" in table
    assert "| vector: the same from 8192 to 32768 tokens alone | <= 1.05 | 1.46 | no |" in table
    assert "| decode after 65536 tokens / after 64 | <= 1.05 | 1.15 | no |" in table
    assert "| 65536 | decode | 1.7 (1.2 to 2.2) |  |  |" in table
    assert len(bk_speed.figure(results).axes) == 2
