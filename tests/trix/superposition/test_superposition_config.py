"""The settings of trix.superposition, and what importing it loads."""

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("pandas")

import trix.superposition
from trix.superposition import AnalysisConfig, DumpConfig, MergeConfig, Paths, SAEConfig


def test_the_defaults_are_those_of_the_interface() -> None:
    dump = DumpConfig()
    assert (dump.layer, dump.max_len, dump.batch_size, dump.dtype) == (13, 32, 64, "bf16")
    sae = SAEConfig()
    assert (sae.k, sae.lr, sae.l1, sae.epochs, sae.batch_size, sae.architecture) == (2048, 3e-4, 1e-3, 2, 4096, "standard")
    assert Paths().model_dump() == {
        "shards_dir": "acts_shards",
        "sae_path": "sae_weights.pt",
        "summary_csv": "latent_summary.csv",
    }
    assert AnalysisConfig().model_dump() == {"topk": 200, "min_activation": 0.0, "similarity_threshold": 0.85}
    assert MergeConfig().model_dump() == {"n_clusters": None, "alpha": 0.5, "beta": 0.4, "gamma": 0.1, "l2_reg": 1e-3}


def test_an_unknown_key_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"key 'batchsize' must be one of layer, max_len, .*; did you mean batch_size\?"):
        DumpConfig(batchsize=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"key 'zzz' must be one of k, active, lr, l1, epochs, batch_size, architecture \["):
        SAEConfig(zzz=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("kind", "settings", "problem"),
    [
        (SAEConfig, {"active": 64, "k": 32}, r"active \(64\) must be <= k \(32\)"),
        (SAEConfig, {"lr": float("nan")}, "finite number"),
        (SAEConfig, {"epochs": "2"}, "valid integer"),
        (DumpConfig, {"dtype": "int8"}, "'bf16', 'fp16' or 'fp32'"),
        (DumpConfig, {"layer": -1}, "greater than or equal to 0"),
        (DumpConfig, {"shard_tokens": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_values_are_refused(kind: type, settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        kind(**settings)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        DumpConfig().layer = 3  # type: ignore[misc]


def test_the_parts_come_when_they_are_asked_for() -> None:
    assert trix.superposition.dump.__name__ == "trix.superposition.dump"
    with pytest.raises(AttributeError, match="has no attribute 'dmp'"):
        _ = trix.superposition.dmp


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named 'pydantic' ({name})", name="pydantic")

    monkeypatch.setattr(trix.superposition, "import_module", missing)
    with pytest.raises(ImportError, match=r"needs pydantic: pip install 'trix\[superposition\]'"):
        _ = trix.superposition.DumpConfig
