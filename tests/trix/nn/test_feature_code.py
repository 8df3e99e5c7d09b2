"""Codes of features: their formula around the mean, where that comes from, that nothing moves it, and models on them."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trix.nn import Classifier, ClassifierConfig, FeatureCode, FFNConfig, feature_code
from trix.nn.routed_layer import routed_layers

F, D = 6, 32
few = settings(max_examples=25, deadline=None)


def centred(x_BTF: Tensor, num_tokens: int = 2, decay: float = 0.8) -> FeatureCode:
    """A code that has met its first training batch."""
    code = FeatureCode(F, D, num_tokens, decay)
    code(x_BTF)
    return code.eval()


def reference(code: FeatureCode, x_TF: Tensor, mean_F: Tensor) -> Tensor:
    """The formula, token by token."""
    rows = []
    for place in range(len(x_TF)):
        total_D = torch.zeros(D, dtype=torch.float64)
        for back in range(min(code.num_tokens, place + 1)):
            row_D = (x_TF[place - back].double() - mean_F) @ code.table_VD.double()
            total_D += code.decay**back * torch.cat([row_D[-7 * back :], row_D[: -7 * back]]) if back else row_D
        rows.append(total_D / (total_D.square().mean() + torch.finfo(torch.float32).eps).sqrt())
    return torch.stack(rows)


@few
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 4), st.sampled_from([0.5, 0.8, 1.0]))
def test_a_code_is_the_formula_around_the_mean(seed: int, length: int, num_tokens: int, decay: float) -> None:
    x_BTF = torch.randn(3, length, F, generator=torch.Generator().manual_seed(seed)) + 2
    code = centred(x_BTF, num_tokens, decay)
    expected_TD = reference(code, x_BTF[1], x_BTF.double().mean(dim=(0, 1)))
    torch.testing.assert_close(code(x_BTF)[0][1].double(), expected_TD, atol=1e-4, rtol=1e-4)


@few
@given(st.integers(2, 9), st.integers(1, 4), st.data())
def test_a_sequence_in_pieces_has_the_codes_of_the_whole(length: int, num_tokens: int, data: st.DataObject) -> None:
    x_BTF = torch.rand(2, length, F)
    code, cut = centred(x_BTF, num_tokens), data.draw(st.integers(1, length - 1))
    whole_BTD, last = code(x_BTF)
    first_BTD, state = code(x_BTF[:, :cut])
    second_BTD, state = code(x_BTF[:, cut:], state=state)
    torch.testing.assert_close(torch.cat([first_BTD, second_BTD], dim=1), whole_BTD)
    assert [part.tolist() for part in state] == [part.tolist() for part in last]
    assert [part.shape for part in state] == [(2, *spec.shape[1:]) for spec in code.state_specs()]
    assert [part.shape for part in code.empty_state(2)] == [part.shape for part in state]


@few
@given(st.integers(0, 3), st.integers(1, 4))
def test_padding_has_no_say_in_codes_or_mean(num_padding: int, num_tokens: int) -> None:
    x_BTF = torch.rand(1, 5, F)
    code = centred(x_BTF, num_tokens)
    padded_BTF = torch.cat([torch.full((1, num_padding, F), torch.nan), x_BTF], dim=1)
    mask_BT = (torch.arange(padded_BTF.shape[1]) >= num_padding).expand(1, -1)
    padded = FeatureCode(F, D, num_tokens)
    padded_BTD, _ = padded(padded_BTF, mask_BT)
    torch.testing.assert_close(padded.mean_F, code.mean_F)
    torch.testing.assert_close(padded_BTD[:, num_padding:], code(x_BTF)[0], atol=1e-5, rtol=1e-5)
    assert not padded_BTD[:, :num_padding].any()


def test_the_first_training_batch_sets_the_mean_and_no_other_moves_it() -> None:
    code, first, later = FeatureCode(F, D), torch.rand(4, 5, F), torch.rand(4, 5, F)
    code.eval()
    code(later)
    assert (code.num_centred, code.mean_F.tolist()) == (0, [0.0] * F)
    code.train()
    trained_BTD, _ = code(first)
    torch.testing.assert_close(code.mean_F, first.mean(dim=(0, 1)))
    mean_F = code.mean_F.clone()
    code(later)
    assert torch.equal(code.mean_F, mean_F)
    code.eval()
    assert torch.equal(code(first)[0], trained_BTD)  # the first batch is computed with its own mean already


def test_the_mean_is_that_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = torch.rand(4, 5, F), torch.rand(2, 5, F)

    def with_the_other(total: Tensor) -> Tensor:
        return total.add_(torch.cat([there.sum(dim=(0, 1)), torch.tensor([10.0])]))

    monkeypatch.setattr(feature_code, "summed_over_processes", with_the_other)
    code = FeatureCode(F, D)
    code(here)
    torch.testing.assert_close(code.mean_F, torch.cat([here, there]).mean(dim=(0, 1)))


@few
@given(st.floats(-100, 100), st.sampled_from([0.25, 1.0, 8.0]))
def test_neither_origin_nor_scale_of_the_features_counts(offset: float, scale: float) -> None:
    x_BTF = torch.rand(4, 5, F, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain, moved = FeatureCode(F, D).double(), FeatureCode(F, D).double()
    torch.testing.assert_close(moved(scale * x_BTF + offset)[0], plain(x_BTF)[0], atol=1e-5, rtol=1e-5)


def test_the_mean_spreads_tokens_over_signatures_that_are_drawn() -> None:
    draw = torch.Generator().manual_seed(0)
    x_BTF, signature_ED = torch.rand(64, 8, F, generator=draw), torch.randn(8, D, generator=draw).sign()

    def largest_load(code_BTD: Tensor) -> float:
        count_E = torch.bincount((code_BTD @ signature_ED.T).argmax(dim=-1).flatten(), minlength=8).float()
        return float(count_E.max() / count_E.mean())

    assert largest_load(centred(x_BTF)(x_BTF)[0]) < 2.5
    assert largest_load(FeatureCode(F, D).eval()(x_BTF)[0]) > 4


def test_nothing_draws_or_trains_a_code_and_a_state_dict_brings_it_along() -> None:
    before = torch.get_rng_state()
    code = FeatureCode(F, D)
    assert torch.equal(before, torch.get_rng_state())
    assert not list(code.parameters())
    assert torch.equal(code.table_VD, FeatureCode(F, D).table_VD)
    x_BTF = torch.rand(2, 3, F)
    assert code(x_BTF)[0].grad_fn is None
    assert set(code.state_dict()) == {"table_VD", "mean_F", "num_centred"}
    file = io.BytesIO()
    torch.save(code.state_dict(), file)
    file.seek(0)
    loaded = FeatureCode(F, D)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded(x_BTF + 1)[0], code(x_BTF + 1)[0])  # in training, too: it has its mean


def test_an_average_of_weights_has_the_mean_of_its_original() -> None:
    code = FeatureCode(F, D)
    average = copy.deepcopy(code)
    code(torch.rand(2, 3, F) + 1)
    with torch.no_grad():
        for kept, new in zip(average.buffers(), code.buffers(), strict=True):
            kept.lerp_(new, 0.01)
    assert torch.equal(average.mean_F, code.mean_F)
    assert average.num_centred == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_and_autocast_round_no_code(dtype: torch.dtype) -> None:
    x_BTF = torch.randint(17, (2, 20, F)) / 16  # which all kinds of numbers hold
    code = centred(x_BTF, 3)
    whole_BTD, _ = code(x_BTF)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(code(x_BTF)[0], whole_BTD)
    code.to(dtype)
    assert code.table_VD.dtype == code.mean_F.dtype == torch.promote_types(dtype, torch.float32)
    state, parts = code.empty_state(2), []
    for piece_BTF in x_BTF.to(dtype).split(1, dim=1):
        part_BTD, state = code(piece_BTF, state=state)
        parts.append(part_BTD)
    torch.testing.assert_close(torch.cat(parts, dim=1).float(), whole_BTD, atol=1e-5, rtol=1e-5)


def test_affinities_add_up_to_the_scores() -> None:
    x_BTF, direction_ED = torch.rand(1, 3, F), torch.randn(5, D)
    code = centred(torch.rand(4, 3, F), 3)
    affinity_EJF = code.affinities(direction_ED)
    difference_TF = x_BTF[0] - code.mean_F
    sum_D = torch.stack([code._weighted(back).T @ difference_TF[2 - back] for back in range(3)]).sum(dim=0)
    score_E = torch.einsum("ejf,jf->e", affinity_EJF, difference_TF.flip(0)) / sum_D.square().mean().sqrt()
    torch.testing.assert_close(score_E, direction_ED @ code(x_BTF)[0][0, -1], atol=1e-4, rtol=1e-4)


def test_there_must_be_features() -> None:
    with pytest.raises(ValueError, match=r"num_features \(0\) and d_model \(32\) must be >= 1"):
        FeatureCode(0, D)


def frame_model(**ffn: object) -> Classifier:
    torch.manual_seed(0)
    layer = FFNConfig(**({"num_tiles": 8, "route_on": "context", "balance_rate": 0.0} | ffn))  # type: ignore[arg-type]
    return Classifier(F, 3, ClassifierConfig(D, 2, 2, 16, ffn=layer))


@pytest.mark.parametrize("ffn", [{}, {"kind": "hierarchical"}, {"kind": "sparse_lookup"}, {"routing": "learned"}], ids=str)
def test_tokens_with_the_same_features_before_them_go_to_the_same_tile_in_any_sequence(ffn: dict[str, object]) -> None:
    model = frame_model(**ffn).eval()
    row_NF = torch.randn(4, F)
    _, infos, _ = model(row_NF[[0, 1, 2, 3, 1, 2, 2, 0, 1]].unsqueeze(0), return_routing=True)
    for info in infos:
        tile_T = info["tile_idx"].reshape(-1).tolist()
        assert tile_T[1] == tile_T[8]  # rows 0, 1
        assert tile_T[2] == tile_T[5]  # rows 1, 2


def test_training_moves_no_token_while_signatures_stay_and_reaches_those_that_learn() -> None:
    for settings_of_signatures, is_learned in (({"balance_rate": 0.0}, False), ({"signatures": "learned"}, True)):
        model, x_BTF = frame_model(**settings_of_signatures), torch.rand(8, 6, F)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model(x_BTF)
        before = [info["tile_idx"] for info in model(x_BTF, return_routing=True)[1]]
        for _ in range(3):
            logits, _, aux = model(x_BTF, return_routing=True)
            assert aux is not None
            optimizer.zero_grad()
            (logits.square().mean() + aux["total_aux"]).backward()
            optimizer.step()
        after = [info["tile_idx"] for info in model(x_BTF, return_routing=True)[1]]
        gradients = [layer.router.raw_signatures.grad for layer in routed_layers(model)]
        if is_learned:
            assert all(gradient.any() for gradient in gradients)
        else:
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_compiled_model_centres_itself_once() -> None:
    model = frame_model()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for x_BTF in (torch.rand(4, 5, F) + 1, torch.rand(4, 5, F)):
        torch.testing.assert_close(compiled(x_BTF), model(x_BTF), atol=1e-5, rtol=1e-5)
    assert compiled.context_code.num_centred == 1
    torch.testing.assert_close(compiled.context_code.mean_F, model.context_code.mean_F)
