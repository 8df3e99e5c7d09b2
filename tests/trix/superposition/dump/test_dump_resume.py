"""Dumps that stop and go on: the same bytes, and never on top of another dump."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("pandas")

import dump_worker
from planted_backend import PlantedBackend
from small_dumps import contents, ragged_frame, trix_backend

from trix.superposition import DumpConfig
from trix.superposition.dump import ActivationDump, dump_layer_activations, dump_sites, writer
from trix.superposition.dump.batch_rows import BatchRows

CFG = DumpConfig(layer=0, max_len=40, batch_size=16, shard_tokens=400)


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a dump_worker that has ended, and what it printed, line by line."""
    if sys.platform != "linux":
        pytest.skip("the worker forks, and counts memory as Linux does")
    folder: Path = tmp_path_factory.mktemp("worked")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, dump_worker.__file__, str(folder)]
    return folder, subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_killed_dump_goes_on_to_the_same_bytes(worked: tuple[Path, list[str]]) -> None:
    killed, (_, *told) = worked
    assert told == [f"{moment.__name__} {-signal.SIGKILL.value}" for moment in dump_worker.MOMENTS]
    expected = contents(killed / "whole")
    assert len(expected) == 12
    for moment in dump_worker.MOMENTS:
        folder = killed / moment.__name__
        found = {name: content for name, content in contents(folder).items() if not name.endswith(".partial")}
        assert len(found) < len(expected)
        assert bool(list(folder.rglob("*.partial"))) == (moment is dump_worker.in_a_shard)
        dump_worker.dump(folder)
        assert contents(folder) == expected, moment.__name__


def test_memory_is_bounded_by_two_shards(worked: tuple[Path, list[str]]) -> None:
    num_shards, growth = map(int, worked[1][0].split())
    assert num_shards == 40
    assert growth < 2 * 2**21 + 2**25, f"{growth / 2**20:.0f} MiB"


def dump_planted(folder: Path, backend: PlantedBackend | None = None, **changed: Any) -> PlantedBackend:
    """Texts with sinks and broken values, so that every count depends on the place where a dump goes on."""
    backend = backend or PlantedBackend()
    frame = ragged_frame(60, letters="aaaabbbbccccdddns ")
    dump_layer_activations(frame, "title", "topic", backend, CFG.model_copy(update=changed), folder)
    return backend


@pytest.mark.filterwarnings("ignore:tokens left out as NaN")
@pytest.mark.parametrize("shard_tokens", [60, 333])
def test_a_dump_stopped_at_any_batch_goes_on_to_the_same_bytes(
    shard_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dump_planted(tmp_path / "whole", shard_tokens=shard_tokens)
    assert whole.num_runs == 4
    assert ActivationDump(tmp_path / "whole").manifest.dropped.norm > 0
    expected, add = contents(tmp_path / "whole"), writer.ShardWriter.add

    def add_or_stop(self: writer.ShardWriter, rows: BatchRows) -> None:
        if self.batch == stop:
            raise KeyboardInterrupt
        add(self, rows)

    num_runs = []
    for stop in range(4):
        part = tmp_path / str(stop)
        with monkeypatch.context() as patch:
            patch.setattr(writer.ShardWriter, "add", add_or_stop)
            with pytest.raises(KeyboardInterrupt):
                dump_planted(part, shard_tokens=shard_tokens)
        if stop == 3:
            with pytest.raises(ValueError, match=r"the dump \(\d+ tokens so far\) must be complete: dump to this folder again"):
                ActivationDump(part)
        num_runs.append(dump_planted(part, shard_tokens=shard_tokens).num_runs)
        assert contents(part) == expected, stop
    # A batch of which a part is in the shards is read again.
    assert num_runs == ([4, 4, 3, 2] if shard_tokens == 60 else num_runs)
    assert num_runs[3] < 4


@pytest.mark.filterwarnings("ignore:tokens left out as NaN")
def test_a_complete_dump_is_left_as_it_is(tmp_path: Path) -> None:
    dump_planted(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert dump_planted(tmp_path).num_runs == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_dump_whose_last_shard_is_full_is_complete(tmp_path: Path) -> None:
    frame = ragged_frame(letters="abc")
    total = int(frame["title"].str.len().sum())
    cfg = CFG.model_copy(update={"shard_tokens": total})
    dump_layer_activations(frame, "title", "topic", PlantedBackend(), cfg, tmp_path)
    assert [shard.tokens for shard in ActivationDump(tmp_path).manifest.shards] == [total]


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "layer": ({"layer": 1}, r"layer of the dump that is there \(0\) must be that of this one \(1\)"),
    "dtype": ({"dtype": "fp32"}, r"dtype of the dump that is there \(bf16\) must be that of this one \(fp32\)"),
    "max_len": ({"max_len": 20}, r"data of the dump that is there \(\w{64}\) must be that of this one \(\w{64}\)"),
    "batch_size": ({"batch_size": 8}, r"batch_size of the dump that is there \(16\) must be that of this one \(8\)"),
    "shard_tokens": ({"shard_tokens": 99}, r"shard_tokens of the dump that is there \(400\) must be that of this one \(99\)"),
    "drop_sinks": ({"drop_sinks": False}, r"drop_sinks of the dump that is there \(True\) must be that of this one \(False\)"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_dump_with_other_settings_is_refused_with_both_values(name: str, tmp_path: Path) -> None:
    frame, (changed, problem) = ragged_frame(), OTHERS[name]
    dump_layer_activations(frame, "title", "topic", trix_backend(), CFG, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=problem + ": choose another folder, or delete this one"):
        dump_layer_activations(frame, "title", "topic", trix_backend(), CFG.model_copy(update=changed), tmp_path)
    assert contents(tmp_path) == before


def test_a_dump_of_another_model_data_or_site_is_refused(tmp_path: Path) -> None:
    frame, backend = ragged_frame(), trix_backend()
    dump_sites(frame, "title", "topic", backend, CFG, ["resid_pre.0"], tmp_path)
    with pytest.raises(ValueError, match=r"model of the dump that is there \(\w{64}\) must be that of this one \(\w{64}\)"):
        dump_sites(frame, "title", "topic", trix_backend(seed=1), CFG, ["resid_pre.0"], tmp_path)
    relabelled = frame.assign(topic=1 - frame["topic"])
    with pytest.raises(ValueError, match=r"data of the dump that is there"):
        dump_sites(relabelled, "title", "topic", backend, CFG, ["resid_pre.0"], tmp_path)
    (tmp_path / "resid_pre.0").rename(tmp_path / "resid_mid.0")
    with pytest.raises(
        ValueError, match=r"site of the dump that is there \(resid_pre\) must be that of this one \(resid_mid\)"
    ):
        dump_sites(frame, "title", "topic", backend, CFG, ["resid_mid.0"], tmp_path)
    (tmp_path / "resid_mid.0").rename(tmp_path / "resid_pre.0")
    problem = (
        r"sites of the dump that is there \(\['resid_pre.0'\]\) must be that of this one \(\['resid_mid.0', 'resid_pre.0'\]\)"
    )
    with pytest.raises(ValueError, match=problem):
        dump_sites(frame, "title", "topic", backend, CFG, ["resid_pre.0", "resid_mid.0"], tmp_path)


def test_a_dump_does_not_go_on_behind_a_shard_that_was_cut_short(tmp_path: Path) -> None:
    dump_layer_activations(ragged_frame(), "title", "topic", trix_backend(), CFG, tmp_path)
    path = tmp_path / "shard_00002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"shard_00002.safetensors \({len(content) - 1} bytes\) must have the {len(content)}"):
        dump_layer_activations(ragged_frame(), "title", "topic", trix_backend(), CFG, tmp_path)


def test_shards_of_an_unknown_dump_are_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / "shard_00004.safetensors").touch()
    with pytest.raises(ValueError, match=r"shard_00004.safetensors must be one of the 0 shards of the dump that is there"):
        dump_layer_activations(ragged_frame(), "title", "topic", trix_backend(), CFG, tmp_path)
