"""Records of latents: what is on the disk is what the autoencoder does, whatever the shards and batches are."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("pandas")

from safetensors.torch import load_file, save_file
from small_dumps import small_dump

from trix.superposition.analysis.records import LatentRecords, normalised, read_records, write_latent_records
from trix.superposition.backends.io_store import read_column
from trix.superposition.dump import ActivationDump
from trix.superposition.sae import TopKSAE

CONTEXT = 16
PAD = 99


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> ActivationDump:
    """About 2400 tokens in three shards, whose texts of 1 to 40 tokens straddle them."""
    return ActivationDump(small_dump(tmp_path_factory.mktemp("dump"))[0])


@pytest.fixture(scope="module")
def sae() -> TopKSAE:
    torch.manual_seed(4)
    made = TopKSAE(32, 24, active=3)
    with torch.no_grad():
        made.W_enc[:, 5] = 0.0  # never among the first of a token
        made.b_enc[5] = -100.0
    return made.eval()


@pytest.fixture(scope="module")
def latents(dump: ActivationDump, sae: TopKSAE) -> torch.Tensor:
    """z of all tokens, float32 [N, K]."""
    with torch.no_grad():
        return sae.encode(torch.cat([read_column(path, "acts") for path in dump.paths]).float())


@pytest.fixture(scope="module")
def windows(dump: ActivationDump) -> list[list[int]]:
    """The rows of each window, by a plain loop."""
    found: dict[tuple[int, int], list[int]] = {}
    places = zip(dump.column("titleidx").tolist(), dump.column("position").tolist(), strict=True)
    for row, (document, position) in enumerate(places):
        found.setdefault((document, position // CONTEXT), []).append(row)
    return list(found.values())


@pytest.fixture(scope="module")
def written(dump: ActivationDump, sae: TopKSAE, tmp_path_factory: pytest.TempPathFactory) -> LatentRecords:
    folder = tmp_path_factory.mktemp("records")
    return write_latent_records(sae, dump, folder, context=CONTEXT, quantiles=4, per_quantile=3, pad_token=PAD, batch=300)


def test_the_cache_holds_every_activation_once(
    dump: ActivationDump, latents: torch.Tensor, windows: list[list[int]], written: LatentRecords
) -> None:
    rebuilt, tokens, first = torch.zeros_like(latents), dump.column("tokids"), 0
    position = dump.column("position") % CONTEXT
    num_entries = 0
    for part in written.cache():
        for window, row_c in enumerate(windows[first : first + len(part["tokens"])]):
            expected = torch.full((CONTEXT,), PAD)
            expected[position[row_c]] = tokens[row_c]
            assert torch.equal(part["tokens"][window], expected)
        row_of = {(w, int(position[row])): row for w, rows in enumerate(windows[first:]) for row in rows}
        for (window, place, latent), value in zip(part["locations"].tolist(), part["activations"].tolist(), strict=True):
            rebuilt[row_of[window, place], latent] = value
        first, num_entries = first + len(part["tokens"]), num_entries + len(part["activations"])
    assert first == len(windows) == written.num_windows
    assert written.num_parts > 5
    assert num_entries == int((latents > 0).sum())
    torch.testing.assert_close(rebuilt, latents)


def test_examples_are_windows_of_their_quantile_with_their_own_activations(
    dump: ActivationDump, latents: torch.Tensor, windows: list[list[int]], written: LatentRecords
) -> None:
    tokens, position = dump.column("tokids"), dump.column("position") % CONTEXT
    strongest_WK = torch.stack([latents[row_c].amax(dim=0) for row_c in windows])
    for latent, record in written.records.items():
        largest = float(latents[:, latent].max())
        assert record.num_active == int((latents[:, latent] > 0).sum())
        assert record.max_activation == pytest.approx(largest)
        of_quantile = torch.ceil(strongest_WK[:, latent] / max(largest, 1e-30) * 4)
        for quantile in range(1, 5):
            own = [example for example in record.examples if example.quantile == quantile]
            assert len(own) == min(3, int((of_quantile == quantile).sum()))
            assert len({example.window for example in own}) == len(own)
            assert all(of_quantile[example.window] == quantile for example in own)
        assert len(record.not_active) == min(20, int((strongest_WK[:, latent] == 0).sum()))
        assert all(strongest_WK[example.window, latent] == 0 for example in record.not_active)
        peaks = [max(example.activations) for example in record.examples]
        assert peaks == sorted(peaks, reverse=True)
        for example in (*record.examples, *record.not_active):
            row_c = windows[example.window]
            place_c = position[row_c].tolist()
            assert [example.tokens[place] for place in place_c] == tokens[row_c].tolist()
            assert [example.activations[place] for place in place_c] == pytest.approx(latents[row_c, latent].tolist(), abs=1e-6)
            assert {example.tokens[place] for place in range(CONTEXT) if place not in place_c} <= {PAD}
            assert 0 <= max(example.normalised) <= 10
    top = [max(example.normalised) for record in written.records.values() for example in record.examples]
    assert max(top) == 10
    assert written.records[5].examples == []
    assert written.records[5].max_activation == 0.0


def test_the_largest_activation_is_ten_tenths_whatever_it_is() -> None:
    values = torch.rand(2000, generator=torch.Generator().manual_seed(0)) + 1e-6
    for value in values.tolist():
        assert normalised(torch.tensor([value, 0.55 * value, 0.0]), value) == [10, 5, 0]
    assert normalised(torch.zeros(2), 0.0) == [0, 0]


def test_batches_do_not_matter_and_records_read_back_equal(
    dump: ActivationDump, sae: TopKSAE, written: LatentRecords, tmp_path: Path
) -> None:
    settings = {"context": CONTEXT, "quantiles": 4, "per_quantile": 2, "not_active": 3, "pad_token": PAD}
    small, large = (
        write_latent_records(sae, dump, tmp_path / f"{batch}", batch=batch, latents=[7, 2], **settings)  # type: ignore[arg-type]
        for batch in (97, 10_000)
    )
    assert list(small.records) == [7, 2]
    for latent in (7, 2):
        for kind in ("examples", "not_active"):
            rows = [sorted(getattr(of_batch.records[latent], kind)) for of_batch in (small, large)]
            assert [row[:3] for row in rows[0]] == [row[:3] for row in rows[1]]
    again = read_records(written.folder)
    assert again == written
    assert again.source["site"] == "resid_pre"


def test_the_seed_decides_which_windows_are_shown(dump: ActivationDump, sae: TopKSAE, tmp_path: Path) -> None:
    first, same, other = (
        write_latent_records(sae, dump, tmp_path / name, seed=seed, per_quantile=2).records
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == same
    assert first != other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latents": [3, 24]}, r"latents \(3 to 24\) must be >= 0 and < 24, each named once"),
        ({"latents": [3, 3]}, "each named once"),
        ({"latents": []}, r"number of latents \(0\) must be >= 1"),
        ({"context": 0}, r"context \(0\) must be >= 1"),
        ({"not_active": -1}, r"not_active \+ 1 \(0\) must be >= 1"),
        ({"per_quantile": 10**6}, r"places of all examples \(\d+\) must be <= 134217728"),
    ],
)
def test_what_cannot_be_recorded_is_named_and_nothing_is_written(
    dump: ActivationDump, sae: TopKSAE, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_latent_records(sae, dump, tmp_path / "records", **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "records").exists()


def test_records_are_not_overwritten(dump: ActivationDump, sae: TopKSAE, written: LatentRecords) -> None:
    with pytest.raises(ValueError, match="must not hold records yet"):
        write_latent_records(sae, dump, written.folder)


def test_damaged_records_are_refused(dump: ActivationDump, sae: TopKSAE, tmp_path: Path) -> None:
    write_latent_records(sae, dump, tmp_path, latents=[0, 1], context=CONTEXT)
    examples, about = tmp_path / "examples.safetensors", tmp_path / "records.json"
    whole, text = examples.read_bytes(), about.read_text()
    examples.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="cut short"):
        read_records(tmp_path)
    columns = load_file(examples) if examples.write_bytes(whole) else {}
    save_file(columns | {"tokens": columns["tokens"][:, :3].contiguous()}, examples)
    with pytest.raises(ValueError, match="shapes"):
        read_records(tmp_path)
    save_file(columns | {"latent": torch.tensor(0)}, examples)
    with pytest.raises(ValueError, match="must have a dimension each"):
        read_records(tmp_path)
    save_file(columns | {"latent": columns["latent"] + 5}, examples)
    with pytest.raises(ValueError, match=r"latent \(5\) of an example must be one of records.json"):
        read_records(tmp_path)
    save_file(columns | {"activations": columns["activations"] / 0}, examples)
    with pytest.raises(ValueError, match="activations must be finite"):
        read_records(tmp_path)
    examples.write_bytes(whole)
    about.write_text(json.dumps(json.loads(text) | {"num_active": [1]}))
    with pytest.raises(ValueError, match="must be equally long"):
        read_records(tmp_path)
    about.write_text(json.dumps(json.loads(text) | {"extra": 1}))
    with pytest.raises(ValueError, match="extra is wrong"):
        read_records(tmp_path)
    about.write_text(text)
    records = read_records(tmp_path)
    assert list(records.records) == [0, 1]
    part = tmp_path / "cache" / "part_00000.safetensors"
    columns = load_file(part)
    save_file(columns | {"locations": columns["locations"] + 40}, part)
    with pytest.raises(ValueError, match="locations must be >= 0 and within the windows"):
        next(records.cache())
    save_file(columns | {"activations": columns["activations"][1:].clone()}, part)
    with pytest.raises(ValueError, match="shapes"):
        next(records.cache())
