"""What latents do over a dump, against the plain definitions, on planted activations."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_sae import ReLUSAE, identity_sae, write_shards
from torch import Tensor

from trix.superposition.analysis import survey
from trix.superposition.analysis.survey import GROUPS, LatentRecord, Survey, survey_latents

pytest.importorskip("pydantic", reason="shards are read by trix.superposition.backends, whose settings need pydantic")

QUARTERS = GROUPS[1:]


def planted(seed: int, num_tokens: int, num_documents: int = 4) -> tuple[Tensor, Tensor]:
    """Activations of 4 latents, of few different values, the third of which never fires; documents of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    acts_NK = torch.randint(-6, 5, (num_tokens, 4), generator=generator) / 2
    acts_NK[:, 2] = -1
    document_N = torch.randint(0, num_documents, (num_tokens,), generator=generator).sort().values
    return acts_NK, document_N


def surveyed(acts_NK: Tensor, document_N: Tensor, sizes: list[int], latents: list[int], **given: int) -> Survey:
    with tempfile.TemporaryDirectory() as folder:
        paths = write_shards(Path(folder), acts_NK, sizes, titleidx_N=document_N)
        return survey_latents(identity_sae(acts_NK.shape[1]), paths, latents, "cpu", **given)


def shown(record: LatentRecord) -> list[tuple[str, int]]:
    return [(group.name, example.row) for group in record.groups for example in group.examples]


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    batch=st.integers(1, 60),
    width=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    num_examples=st.integers(1, 3),
)
def test_it_is_what_the_definitions_say_whatever_the_shards_and_batches(
    seed: int, sizes: list[int], batch: int, width: tuple[int, int], num_examples: int
) -> None:
    acts_NK, document_N = planted(seed, sum(sizes))
    z_NK = acts_NK.relu()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"BATCH_TOKENS": batch, "BEFORE": width[0], "AFTER": width[1]}.items():
            patch.setattr(survey, name, value)
        found = surveyed(acts_NK, document_N, sizes, [3, 0, 2], num_examples=num_examples)
        whole = surveyed(acts_NK, document_N, [sum(sizes)], [3, 0, 2], num_examples=num_examples)
    assert found.latents == whole.latents
    assert found.num_tokens == sum(sizes)
    assert found.density_K.tolist() == pytest.approx((z_NK > 0).double().mean(dim=0).tolist())
    assert [record.latent for record in found.latents] == [3, 0, 2]
    for record in found.latents:
        value_N = z_NK[:, record.latent]
        assert record.num_active == int((value_N > 0).sum())
        assert record.largest == float(value_N.max())
        assert record.mass_share == pytest.approx(float(value_N.sum() / z_NK.sum().clamp_min(1e-9)))
        if record.num_active:
            expected, _ = np.histogram(value_N[value_N > 0], bins=survey.HISTOGRAM_BINS, range=(0, record.largest))
            assert record.count_H == expected.tolist()
        check_groups(record, value_N, num_examples, sum(width))
        check_passages(record, value_N, document_N, width)


def check_groups(record: LatentRecord, value_N: Tensor, num_examples: int, reach: int) -> None:
    active = [row for row in range(len(value_N)) if value_N[row] > 0]
    ranked = sorted(active, key=lambda row: (-float(value_N[row]), row))
    parts = {"top": ranked} | dict(zip(QUARTERS, [part.tolist() for part in np.array_split(ranked, 4)], strict=True))
    rows = [row for _, row in shown(record)]
    assert all(abs(a - b) > reach for place, a in enumerate(rows) for b in rows[:place])
    for group in record.groups:
        members = [example.row for example in group.examples]
        assert 1 <= len(members) <= num_examples
        assert set(members) <= set(parts[group.name])
        if group.name != "top":
            values = value_N[parts[group.name]]
            assert (group.low, group.high) == (float(values.min()), float(values.max()))
    if record.num_active == 0:
        assert record.groups == []
        return
    top = record.groups[0]
    expected: list[int] = []
    for row in ranked[: survey.POOL * num_examples]:
        if len(expected) < num_examples and all(abs(row - other) > reach for other in expected):
            expected.append(row)
    assert (top.name, [example.row for example in top.examples]) == ("top", expected)
    assert (top.low, top.high) == (float(value_N[expected].min()), float(value_N[expected].max()))


def check_passages(record: LatentRecord, value_N: Tensor, document_N: Tensor, width: tuple[int, int]) -> None:
    for group in record.groups:
        for one in group.examples:
            same = (document_N == document_N[one.row]).nonzero().flatten().tolist()
            rows = [row for row in same if one.row - width[0] <= row <= one.row + width[1]]
            assert one.document == int(document_N[one.row])
            assert one.token_N == rows  # each token has its row as its id
            assert one.value_N == value_N[rows].tolist()
            assert rows[one.place] == one.row
            assert one.goes_on == (same[0] < rows[0], same[-1] > rows[-1])


def test_examples_of_a_quarter_are_drawn_at_random_by_the_seed() -> None:
    value_N = torch.zeros(20_000)
    value_N[::50] = torch.arange(1.0, 401.0)
    acts_NK, document_N = value_N[:, None], torch.zeros(20_000, dtype=torch.int64)
    runs = [surveyed(acts_NK, document_N, [20_000], [0], seed=seed).latents[0] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    third = runs[0].groups[2]
    assert (third.name, third.low, third.high) == ("50-75 %", 201, 300)
    many = [surveyed(acts_NK, document_N, [20_000], [0], seed=seed).latents[0].groups[2] for seed in range(20)]
    places = [example.row / 50 for group in many for example in group.examples]
    assert len(places) == 80
    assert np.mean(places) == pytest.approx(249.5, abs=3 * 29 / 80**0.5)  # three standard errors of a uniform draw
    assert np.std(places) == pytest.approx(29, abs=6)


def test_of_many_activations_a_sample_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "SAMPLE_SIZE", 400)
    value_N = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) + 1e-3
    record = surveyed(value_N[:, None], torch.arange(20_000), [20_000], [0]).latents[0]
    assert record.num_active == 20_000
    assert record.groups[0].high == float(value_N.max())
    for group, quarter in zip(record.groups[1:], (0.75, 0.5, 0.25, 0.0), strict=True):
        assert group.low == pytest.approx(quarter, abs=0.07)  # three standard errors of a quartile of 400
        assert group.high == pytest.approx(quarter + 0.25, abs=0.07)


def test_the_mass_is_that_of_what_the_decoder_writes() -> None:
    acts_NK = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    sae = ReLUSAE(torch.eye(2), torch.tensor([[3.0, 4.0], [0.0, 10.0]]))
    with tempfile.TemporaryDirectory() as folder:
        found = survey_latents(sae, write_shards(Path(folder), acts_NK, [2]), [0, 1], "cpu")
    assert [record.mass_share for record in found.latents] == pytest.approx([20 / 40, 20 / 40])


def test_tiles_among_which_a_latent_fires(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tile_N = torch.randint(0, 9, (400,), generator=generator)
    acts_NK = torch.stack(
        [(tile_N == 3).float() + (tile_N == 5), torch.rand(400, generator=generator), -torch.ones(400)], dim=1
    )
    paths = write_shards(tmp_path, acts_NK, [150, 250], tile=tile_N)
    found = survey_latents(identity_sae(3), paths, [0, 1, 2], "cpu", has_tiles=True).latents
    assert {tile.tile for tile in found[0].tiles} == {3, 5}
    count = {tile: int((tile_N == tile).sum()) for tile in (3, 5)}
    for tile in found[0].tiles:
        share = count[tile.tile] / sum(count.values())
        assert (tile.share, tile.lift) == pytest.approx((share, share / (count[tile.tile] / 400)))
    assert found[0].tiles[0].share >= found[0].tiles[1].share
    assert len(found[1].tiles) == survey.SHOWN_TILES
    assert [tile.lift for tile in found[1].tiles] == pytest.approx([1.0] * survey.SHOWN_TILES)  # it fires everywhere
    assert found[2].tiles == []
    bad = write_shards(tmp_path, acts_NK, [400], tile=torch.full((400,), 2**40))
    with pytest.raises(ValueError, match=r"tiles of the dump \(1099511627776 to 1099511627776\) must be >= 0 and < 65536"):
        survey_latents(identity_sae(3), bad, [0], "cpu", has_tiles=True)


def test_progress_counts_each_token_twice(tmp_path: Path) -> None:
    steps: list[int] = []
    survey_latents(identity_sae(2), write_shards(tmp_path, torch.ones(30, 2), [10, 20]), [0], "cpu", advance=steps.append)
    assert sum(steps) == 60


def test_errors(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, torch.ones(3, 2), [3])
    for latents, message in (
        ([0, 2], r"latent \(2\) must be >= 0 and < k \(2\)"),
        ([-1], r"latent \(-1\) must be >= 0"),
        ([1, 1], r"latents \(2, 1 of them different\) must be >= 1, each given once"),
        ([], r"latents \(0, 0 of them different\) must be >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            survey_latents(identity_sae(2), paths, latents, "cpu")
    for number in (0, survey.MAX_EXAMPLES + 1):
        with pytest.raises(ValueError, match=rf"num_examples \({number}\) must be >= 1 and <= 100"):
            survey_latents(identity_sae(2), paths, [0], "cpu", num_examples=number)
    with pytest.raises(ValueError, match=r"number of tokens in the dump \(0\) must be >= 1"):
        survey_latents(identity_sae(2), [], [0], "cpu")
    broken = write_shards(tmp_path, torch.full((2, 2), torch.nan), [2])
    with pytest.raises(ValueError, match="latents must be finite"):
        survey_latents(identity_sae(2), broken, [0], "cpu")
