"""Logits of decoder rows and their neighbours, against the plain definitions."""

import pytest
import torch
from planted_backend import PlantedBackend
from small_dumps import trix_backend
from torch import Tensor, nn

from trix.superposition.analysis import directions
from trix.superposition.analysis.directions import direction_logits, nearest_rows

pytest.importorskip("pydantic", reason="backends need pydantic")


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_logits_of_a_trix_model_are_those_of_its_norm_and_head(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directions, "BATCH_DIRECTIONS", batch)
    backend = trix_backend()
    row_MO = torch.randn(6, 32) * torch.tensor([1e-6, 1e-3, 1.0, 1.0, 1e3, 1e6])[:, None]
    with torch.no_grad():
        backend.model.norm.weight.uniform_(0.5, 2)  # type: ignore[union-attr]
        gain, head = backend.model.norm.weight.double(), backend.model.head.weight.double()  # type: ignore[union-attr]
    unit = row_MO.double() / row_MO.double().square().mean(dim=-1, keepdim=True).sqrt()
    expected_MV = (unit * gain) @ head.t()
    found = direction_logits(row_MO, backend.unembed, 27, num_kept=5)
    largest, smallest = expected_MV.topk(5, dim=-1), (-expected_MV).topk(5, dim=-1)
    torch.testing.assert_close(found.top_value_MA.double(), largest.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.bottom_value_MA.double(), -smallest.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.top_MA, largest.indices)
    assert torch.equal(found.bottom_MA, smallest.indices)
    for row, logit_V in enumerate(expected_MV):
        counts = torch.histc(logit_V, directions.LOGIT_BINS, float(logit_V.min()), float(logit_V.max()))
        assert found.count_MH[row].sum() == 27
        assert (found.count_MH[row] - counts).abs().sum() <= 2  # at a border rounding may decide


def test_biases_do_not_count_and_a_row_of_zeros_has_no_logits() -> None:
    torch.manual_seed(0)
    norm, head = nn.LayerNorm(8), nn.Linear(8, 12)
    nn.init.normal_(norm.bias)

    def unembed(x: Tensor) -> Tensor:
        with torch.no_grad():
            return head(norm(x))  # type: ignore[no-any-return]

    row = torch.randn(1, 8)
    found = direction_logits(torch.cat([row, torch.zeros(1, 8)]), unembed, 12, num_kept=12)
    centred = row - row.mean()
    expected_V = ((centred / centred.square().mean().sqrt()) @ head.weight.t()).flatten().sort(descending=True)
    torch.testing.assert_close(found.top_value_MA[0], expected_V.values, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.top_MA[0], expected_V.indices)
    assert float(found.top_value_MA[1].abs().max()) < 1e-6


def test_the_end_of_the_stream_gives_the_logits_of_the_model() -> None:
    backend, streams = trix_backend(), list[Tensor]()
    tokens = backend.tokenize(["a text of the model"], 40)
    handle = backend.blocks[-1].register_forward_hook(lambda _, __, output: streams.append(output.x_BTD))
    logits_BTV = backend.run(tokens["input_ids"], None)
    handle.remove()
    torch.testing.assert_close(backend.unembed(streams[0][0]), logits_BTV[0].detach(), rtol=1e-5, atol=1e-5)


def test_a_model_without_a_way_of_its_own_is_read_behind_its_last_block() -> None:
    planted, x_ND = PlantedBackend(), torch.randn(5, 4)
    torch.testing.assert_close(planted.unembed(x_ND), x_ND @ planted.model.embedding.weight.nan_to_num().t())  # type: ignore[union-attr, operator]
    assert not planted.blocks[-1]._forward_hooks
    with pytest.raises(RuntimeError):
        planted.unembed(torch.randn(5, 3))
    assert not planted.blocks[-1]._forward_hooks


def test_tokens_beyond_the_vocabulary_are_left_out() -> None:
    logits = torch.arange(10.0)
    found = direction_logits(torch.ones(1, 4), lambda x: (x.abs().sum(dim=-1) > 0)[:, None] * logits, 6, num_kept=10)
    assert found.top_MA.tolist() == [[5, 4, 3, 2, 1, 0]]
    assert found.bottom_MA.tolist() == [[0, 1, 2, 3, 4, 5]]
    with pytest.raises(ValueError, match=r"logits \(10\) must be at least vocab_size \(11\)"):
        direction_logits(torch.ones(1, 4), lambda x: torch.zeros(len(x), 10), 11)
    with pytest.raises(ValueError, match="logits of decoder rows must be finite"):
        direction_logits(torch.ones(1, 4), lambda x: torch.full((len(x), 10), torch.nan), 10)


def test_neighbours_are_the_rows_with_the_largest_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directions, "BATCH_DIRECTIONS", 2)
    row_KO = torch.randn(12, 5) * torch.rand(12, 1)
    cosine_KK = nn.functional.cosine_similarity(row_KO[:, None], row_KO[None], dim=-1)
    idx_MA, cosine_MA = nearest_rows(row_KO, [7, 0, 11], num_kept=4)
    for place, latent in enumerate([7, 0, 11]):
        others = sorted((other for other in range(12) if other != latent), key=lambda other: -float(cosine_KK[latent, other]))
        assert idx_MA[place].tolist() == others[:4]
        torch.testing.assert_close(cosine_MA[place], cosine_KK[latent, others[:4]])
    assert nearest_rows(row_KO[:1], [0])[0].shape == (1, 0)
