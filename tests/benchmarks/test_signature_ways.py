"""The ways to find signatures on context: what defines each of them."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import signature_ways
from cases import context_routing as case
from cases.char_lm_quality import take_step

from lightning_modules.data.text import TextDataModule
from trix.introspection import NgramReader, count_ngrams
from trix.nn import FFNConfig, LanguageModel, LanguageModelConfig, TriXFFN, routed_layers

PATIENCE = 4
ROUTING = "signature_ways.HysteresisRouter"


def hysteresis_layer() -> TriXFFN:
    """One whose learned signatures are all +1, as are those in force."""
    settings: dict[str, Any] = {"routing": ROUTING, "routing_args": {"patience": PATIENCE}, "balance_rate": 0.0}
    layer = FFNConfig(num_tiles=3, **settings).build(6)
    assert isinstance(layer, TriXFFN)
    ask(layer, 1.0, batches=PATIENCE + 1)
    assert (layer.get_tile_signatures() == 1).all()
    return layer


def ask(layer: TriXFFN, value: float, batches: int) -> None:
    """Train for some batches with learned signatures of this value; no optimizer moves them."""
    assert isinstance(layer.router, signature_ways.HysteresisRouter)
    assert layer.router.raw_signatures is not None
    layer.router.raw_signatures.data.fill_(value)
    for _ in range(batches):
        layer(torch.randn(5, 6)).sum().backward()


def test_a_value_that_is_asked_for_in_too_few_batches_changes_nothing() -> None:
    layer = hysteresis_layer()
    for _ in range(3):
        ask(layer, -1.0, batches=PATIENCE - 1)
        assert (layer.get_tile_signatures() == 1).all()
        ask(layer, 1.0, batches=1)  # the count begins anew
    ask(layer, -1.0, batches=PATIENCE)
    assert (layer.get_tile_signatures() == -1).all()


def test_two_other_values_in_turns_change_nothing() -> None:
    layer = hysteresis_layer()
    for value in (-1.0, 0.0) * PATIENCE:
        ask(layer, value, batches=PATIENCE - 1)
    assert (layer.get_tile_signatures() == 1).all()


def test_the_count_survives_a_state_dict() -> None:
    layer, other = hysteresis_layer(), hysteresis_layer()
    ask(layer, -1.0, batches=PATIENCE - 1)
    other.load_state_dict(layer.state_dict())
    ask(other, -1.0, batches=1)
    assert (other.get_tile_signatures() == -1).all()


def test_the_learned_value_gets_the_gradient_of_the_one_in_force() -> None:
    layer, plain = hysteresis_layer(), FFNConfig(num_tiles=3, balance_rate=0.0).build(6)
    assert isinstance(plain, TriXFFN)
    plain.load_state_dict(layer.state_dict(), strict=False)
    ask(layer, -1.0, batches=0)
    x = torch.randn(5, 6)
    found = []
    for one in (layer, plain):
        one.zero_grad()
        one(x).square().sum().backward()
        found.append(one.get_parameter("router.raw_signatures").grad)
    assert found[0] is not None
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found)


def markov_text(length: int) -> Tensor:
    """Twelve characters; which ones follow a pair depends on whether its second one is even."""
    draw = torch.Generator().manual_seed(0)
    text = [0, 0]
    for low in torch.randint(6, (length,), generator=draw).tolist():
        text.append(low if text[-1] % 2 else 6 + low)
    return torch.tensor(text).reshape(1, -1)


def test_clusters_are_of_pairs_that_the_same_characters_follow() -> None:
    pairs, group_N = signature_ways.pair_clusters(count_ngrams(markov_text(3000), 3), 12, 2, seed=0)
    is_common_N = pairs.count_N >= 10
    is_same_N = (group_N == pairs.id_NJ[:, 1] % 2)[is_common_N]
    assert is_common_N.sum() == 72
    assert is_same_N.all() or not is_same_N.any()


@pytest.mark.parametrize("num_clusters", [1, 7, 16])
def test_every_pair_has_a_cluster_and_no_cluster_is_far_too_heavy(num_clusters: int) -> None:
    share_V = 1.0 / torch.arange(1, 21)  # as the characters of a text
    text = share_V.multinomial(5000, replacement=True, generator=torch.Generator().manual_seed(0)).reshape(5, -1)
    pairs, group_N = signature_ways.pair_clusters(count_ngrams(text, 3), 20, num_clusters, seed=0)
    assert pairs.count_N.sum() == 5 * 999
    whole = {tuple(pair) for pair in text.unfold(1, 2, 1)[:, :-1].flatten(0, 1).tolist()}
    assert {tuple(pair) for pair in pairs.id_NJ.tolist() if pair[0] >= 0} == whole
    load_G = torch.bincount(group_N, weights=pairs.count_N, minlength=num_clusters)
    assert len(load_G) == num_clusters
    assert load_G.min() > 0
    assert load_G.max() <= max(2.5 * load_G.mean(), pairs.count_N.max())


def test_the_pairs_of_a_cluster_go_to_its_tile() -> None:
    config = LanguageModelConfig(64, num_layers=1, ffn=FFNConfig(num_tiles=2, route_on="context"))
    model, text = LanguageModel(12, config), markov_text(3000)
    signature_ways.set_signatures(model, signature_ways.cluster_signatures(model, text, seed=0), "clusters")
    pairs, group_N = signature_ways.pair_clusters(count_ngrams(text, 3), 12, 2, seed=0)
    tile_N = NgramReader(model).decide(pairs.id_NJ).tile_idx[:, 0]
    assert pairs.count_N[tile_N == group_N].sum() > 0.9 * pairs.count_N.sum()
    assert routed_layers(model)[0].frozen_tiles().all()


def test_tiles_for_which_there_are_no_pairs_keep_their_signatures() -> None:
    config = LanguageModelConfig(16, num_layers=1, n_heads=2, ffn=FFNConfig(num_tiles=8, route_on="context"))
    model = LanguageModel(2, config)
    (before_ED,) = (layer.get_tile_signatures() for layer in routed_layers(model))
    (found_ED,) = signature_ways.cluster_signatures(model, torch.tensor([[0, 1] * 20]), seed=0)
    num_new = int((found_ED != before_ED).any(dim=1).sum())
    assert 1 <= num_new <= 3  # those of 01, 10, and 0 at the beginning


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(case, "FINISHED", tmp_path / "runs.jsonl")
    monkeypatch.setattr(case, "D_MODEL", 16)
    path = tmp_path / "text.txt"
    path.write_text("".join("etaoinshrd ,"[token] for token in markov_text(8000).flatten().tolist()))
    return str(path)


def test_the_signatures_of_a_short_run_are_given_to_a_fresh_model_and_stay(text: str) -> None:
    data = TextDataModule(path=text, seed=3, batches_per_epoch=12)
    batches = [*data.train_dataloader()]
    config = case.config_of(case.LEARNED, "attention")
    expected = signature_ways.learned_signatures(config, data.vocab_size, batches[:3], 3, 0.1, "")

    def fresh() -> LanguageModel:
        torch.manual_seed(3)
        return LanguageModel(data.vocab_size, case.config_of(case.SHORT, "attention"))

    drawn, model = fresh(), fresh()
    case.prepare(case.SHORT, model, data, 0.1)
    for name, parameter in model.named_parameters():
        assert "raw_signatures" in name or torch.equal(parameter, drawn.get_parameter(name))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        found = [layer.get_tile_signatures() for layer in routed_layers(model)]
        torch.testing.assert_close(found, expected)
        take_step(model, optimizer, *batches[0])
    assert any((one.get_tile_signatures() != two).any() for one, two in zip(routed_layers(drawn), expected, strict=True))


def test_growth_splits_tiles_in_the_first_half_and_moves_no_signature_besides() -> None:
    torch.manual_seed(0)
    first, steps = signature_ways.NUM_FIRST, 32
    ffn = FFNConfig(num_tiles=first + 8, route_on="context", signatures="learned", balance_rate=0.0)
    model = LanguageModel(20, LanguageModelConfig(16, num_layers=1, n_heads=2, context_length=32, ffn=ffn))
    (layer,) = routed_layers(model)
    assert isinstance(layer, TriXFFN)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    growth = signature_ways.Growth(model, optimizer, steps)
    assert (~layer.free_slots()).nonzero().flatten().tolist() == [*range(first)]
    for step in range(1, steps + 1):
        token_BT = torch.randint(20, (4, 33))
        take_step(model, optimizer, token_BT[:, :-1], token_BT[:, 1:])
        in_use, signature_ED, num_acts = ~layer.free_slots(), layer.get_tile_signatures(), len(layer.get_surgery_history())
        growth.after_step(step, token_BT[:, :-1], token_BT[:, 1:])
        assert model.training
        torch.testing.assert_close(layer.get_tile_signatures()[in_use], signature_ED[in_use])
        assert int((~layer.free_slots()).sum()) == first + min(step // 2, 8)
        for act in layer.get_surgery_history()[num_acts:]:
            source_idx, target_idx = int(act["tag"].split()[-1]), act["tile_idx"]
            assert in_use[source_idx]
            for weight in layer.tiles.tile_parameters():
                assert torch.equal(weight[source_idx], weight[target_idx])
                moment = optimizer.state[weight]["exp_avg"]
                assert torch.equal(moment[source_idx], moment[target_idx])
    assert layer.frozen_tiles().all()


def test_growth_gives_the_new_tile_ngrams_of_the_one_with_the_highest_loss() -> None:
    torch.manual_seed(0)
    ffn = FFNConfig(num_tiles=signature_ways.NUM_FIRST + 8, route_on="context", signatures="learned")
    model = LanguageModel(20, LanguageModelConfig(64, num_layers=1, context_length=32, ffn=ffn))
    growth = signature_ways.Growth(model, torch.optim.AdamW(model.parameters()), 16)
    token_BT = torch.randint(20, (16, 33))
    growth.batches.append((token_BT[:, :-1], token_BT[:, 1:]))
    losses = growth._losses()
    before = growth.reader.claims(losses)
    source_idx = int(before.rates().argmax())
    growth._split(0, signature_ways.NUM_FIRST, losses)
    after = growth.reader.claims(losses)
    assert routed_layers(model)[0].get_surgery_history()[-1]["tag"].endswith(f"of tile {source_idx}")
    (costliest, _), *_ = before.of_tile(source_idx)
    is_costliest_N = (losses.id_NJ == torch.tensor(costliest)).all(dim=1)
    assert after.is_claimed(signature_ways.NUM_FIRST)[is_costliest_N].all()
    assert after.rates()[source_idx] < before.rates()[source_idx]


def test_each_way_is_measured(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = [case.DRAWN, case.HYSTERESIS, case.SHORT, case.CLUSTERS, case.GROWN, case.ADAPTIVE, case.DIVERSE]
    monkeypatch.setattr(case, "STEPS_A_TURN", 1)
    monkeypatch.setattr(case, "ROUNDS", 1)
    rows = case.run([2], [0], ["attention"], 1e-2, 0.0, text, ways, False)
    run_of = {row["layer"]: row["runs"][0] for row in rows}
    assert set(run_of) == set(ways)
    assert run_of[case.ADAPTIVE]["active_parameters"] > run_of[case.DRAWN]["active_parameters"]
    assert len({run["loss_nats"] for run in run_of.values()}) == len(ways)


def test_the_seconds_of_what_comes_before_training_count_in_steps(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*_: object) -> None:
        clock = time.thread_time
        monkeypatch.setattr(case.time, "thread_time", lambda: clock() + 100.0)

    monkeypatch.setattr(case, "prepare", prepare)
    run = case.finished_or_run(case.config_of(case.SHORT, "attention"), case.SHORT, 1, 0, 1e-2, text)
    assert run["cpu_seconds"] < 50.0
    assert run["extra_steps"] == pytest.approx(100.0 / run["cpu_seconds"], rel=0.05)
