"""The contestants of the resolvent: equally large, causal, and right where they are the benchmark's own."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import library_contestants
from bk_contestants import (
    CONTESTANTS,
    OF_LIBRARY,
    VARIANTS,
    Contestant,
    MinGRU,
    Size,
    chosen,
    fitted_config,
    num_parameters,
)

from lightning_modules.comparison import check_causal
from lightning_modules.state_size import state_floats
from trix.nn import FFNConfig, LanguageModel

SIZE = Size(16, 2, 2, 24, 2, 40_000)
needs_transformers = pytest.mark.skipif(not library_contestants.IS_INSTALLED, reason="transformers is not installed")
ALL = [pytest.param(name, marks=needs_transformers if name in OF_LIBRARY else ()) for name in CONTESTANTS]


def model_of(name: str) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(11, fitted_config(CONTESTANTS[name], 11, SIZE)).eval()


@pytest.mark.parametrize("name", ALL)
def test_every_contestant_has_the_same_size_and_does_not_look_ahead(name: str) -> None:
    model = model_of(name)
    assert abs(num_parameters(11, model.config) - SIZE.num_parameters) <= 0.01 * SIZE.num_parameters
    assert check_causal(model, name, 11, 24)


@pytest.mark.parametrize("name", ["TriX", "hermitian, tiles by phase", "hermitian, tiles by signature"])
@torch.no_grad()
def test_an_edit_moves_no_logit_before_it_by_sharing_its_tiles(name: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(11, fitted_config(CONTESTANTS[name], 11, Size(64, 2, 4, 128, 8, 125_000))).eval()
    for place in torch.randint(1, 128, (12,)).tolist():
        token_BT = torch.randint(11, (3, 128))
        edited_BT = torch.cat([token_BT[:, :place], torch.randint(11, (3, 128 - place))], dim=1)
        assert torch.equal(model(edited_BT)[:, :place], model(token_BT)[:, :place])


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_text_read_in_parts_gives_the_same_logits(name: str) -> None:
    model = model_of(name)
    token_BT = torch.randint(11, (3, 24))
    state, parts = model.empty_state(3), []
    for part_BT in token_BT.split([5, 1, 18], dim=1):
        (logits, _, _), state = model(part_BT, state=state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), model(token_BT), rtol=0, atol=1e-5)


@needs_transformers
@pytest.mark.parametrize("name", OF_LIBRARY)
def test_every_parameter_of_a_library_layer_learns(name: str) -> None:
    model = model_of(name).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    token_BT = torch.randint(11, (2, 25))
    losses = []
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model(token_BT[:, :-1]).mT, token_BT[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.count_nonzero() > 0


@needs_transformers
def test_the_state_of_a_library_layer_is_what_its_next_step_reads() -> None:
    carry, conv = 2 * 16 * 16, 3 * (2 * 16 + 2 * 16)
    assert state_floats(model_of("Mamba2"), 24) == carry + conv
    assert state_floats(model_of("GatedDeltaNet"), 24) == carry + conv + 3 * 2 * 16  # keys of each head
    assert state_floats(model_of("xLSTM"), 24) == 16 * 16 + 2 * (16 + 1)


def test_where_transformers_is_missing_its_layers_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(library_contestants, "IS_INSTALLED", False)
    assert chosen(None) == [name for name in CONTESTANTS if name not in (*OF_LIBRARY, *VARIANTS)]
    assert "(Mamba2, GatedDeltaNet, xLSTM) need transformers" in capsys.readouterr().out
    assert chosen(["ssd"]) == ["ssd"]
    with pytest.raises(SystemExit, match=r"contestants \(xLSTM\) need transformers: pip install -e '.\[transformers\]'"):
        chosen(["ssd", "xLSTM"])


def test_a_size_that_no_width_gives_is_refused() -> None:
    contestant = Contestant(ffn=FFNConfig(num_tiles=256))
    with pytest.raises(ValueError, match=r"parameters of resolvent \(\d+\) must be within 1 % of 40000"):
        fitted_config(contestant, 11, SIZE)


def test_the_state_of_attention_grows_and_that_of_the_others_does_not() -> None:
    attention, ssd, hermitian = (model_of(name) for name in ("attention", "ssd", "hermitian"))
    assert [state_floats(attention, length) for length in (4, 24)] == [2 * 4 * 16, 2 * 24 * 16]
    assert [state_floats(ssd, length) for length in (8, 24)] == [16 * 16 + 3 * (16 + 2 * 16)] * 2  # one real part
    assert state_floats(hermitian, 24) == 2 * 16 * 16 + 3 * (16 + 2 * 16) + 2 * 2


@torch.no_grad()
def test_min_gru_is_its_recurrence() -> None:
    torch.manual_seed(0)
    mixer = MinGRU(8, 2).double()
    x_BTD = torch.randn(2, 9, 8, dtype=torch.float64)
    channels_BTC = torch.randn(2, 9, 8, dtype=torch.float64)
    first_BD = torch.rand(2, 8, dtype=torch.float64)
    z_BTD = mixer.dynamics(x_BTD).sigmoid()
    g_BTD = torch.where(channels_BTC >= 0, channels_BTC + 0.5, channels_BTC.sigmoid())
    h_BD: Tensor = first_BD
    for z_BD, g_BD in zip(z_BTD.unbind(1), g_BTD.unbind(1), strict=True):
        h_BD = (1 - z_BD) * h_BD + z_BD * g_BD
    carry = torch.stack([first_BD, torch.zeros_like(first_BD)], dim=-1).view(2, 2, 4, 2)
    _, last = mixer._recur(mixer.read_hops(x_BTD), channels_BTC, carry)
    torch.testing.assert_close(last[..., 0].reshape(2, 8), h_BD)
