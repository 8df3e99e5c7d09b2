import copy

import pytest
import torch

from trix.nn import Classifier, ClassifierConfig, FFNConfig, GatedFFN, HashFFN, LanguageModel, LanguageModelConfig
from trix.outputs import RowContext
from trix.routing import HashRouter


def test_the_learned_gate_gets_gradient_and_learns_to_route() -> None:
    torch.manual_seed(0)
    ffn = GatedFFN(16, 4, balance_weight=0.0, balance_rate=0.0)
    x, target = torch.randn(256, 16), torch.randn(256, 16).sign()
    before = ffn(x, return_routing=True)[1]["tile_idx"]
    optimizer = torch.optim.Adam(ffn.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = (ffn(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert ffn.router.gate_ED.grad.abs().sum() > 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert not torch.equal(ffn(x, return_routing=True)[1]["tile_idx"], before)


def test_the_hash_follows_its_formula_and_the_token_alone() -> None:
    ffn = HashFFN(16, 5).eval()
    token = torch.randint(0, 1000, (3, 7))
    _, info, aux = ffn(torch.randn(3, 7, 16), True, token)
    factor, offset = ffn.router.factor, ffn.router.offset
    by_hand = [[(int(t) * factor + offset) % (2**31 - 1) % 5 for t in row] for row in token]
    assert info["tile_idx"].squeeze(-1).tolist() == by_hand
    assert info["weight"].eq(1).all()
    assert torch.equal(info["scores"].argmax(-1, keepdim=True), info["tile_idx"])
    assert aux["total_aux"].item() == 0.0
    other = ffn(torch.randn(3, 7, 16), return_routing=True, token_idx=token)[1]
    assert torch.equal(other["tile_idx"], info["tile_idx"])


@pytest.mark.parametrize("num_tiles", [*range(2, 65), 128, 256])
def test_the_default_hash_spreads_a_vocabulary(num_tiles: int) -> None:
    token = torch.arange(64 * num_tiles)
    tile_idx = HashRouter(4, num_tiles)(torch.zeros(len(token), 4), RowContext(token)).tile_idx
    count = torch.bincount(tile_idx.flatten(), minlength=num_tiles)
    assert count.min() > 16
    assert count.max() < 192


def test_over_the_seeds_two_ids_share_a_tile_once_in_num_tiles() -> None:
    token = torch.tensor([3, 4, 3, 1003])
    x = torch.zeros(4, 4)
    tile_idx = torch.stack([HashRouter(4, 5, seed)(x, RowContext(token)).tile_idx[:, 0] for seed in range(2000)])
    for other in (1, 3):
        assert (tile_idx[:, 0] == tile_idx[:, other]).double().mean().item() == pytest.approx(1 / 5, abs=0.045)  # 5 sigma


def test_a_hashed_layer_computes_and_trains_its_tiles() -> None:
    ffn = HashFFN(12, 3).double()
    x, token = torch.randn(10, 12, dtype=torch.float64), torch.arange(10)
    y, info, _ = ffn(x, True, token)
    torch.testing.assert_close(y, ffn.tiles(x, info["tile_idx"], info["weight"]))
    y.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in ffn.parameters())
    ffn.pack()
    torch.testing.assert_close(ffn(x, token_idx=token), y)


def test_a_language_model_hands_its_tokens_to_hashed_layers() -> None:
    model = LanguageModel(11, LanguageModelConfig(16, 2, 2, 12, ffn=FFNConfig(num_tiles=4, routing="hash"))).eval()
    token = torch.randint(0, 11, (3, 8))
    logits, infos, _ = model(token, return_routing=True)
    for info in infos:
        assert torch.equal(info["tile_idx"][token == 5], info["tile_idx"][token == 5][:1].expand(int((token == 5).sum()), 1))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(token), logits)
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time", max=12)}
    program = torch.export.export(model, (token,), dynamic_shapes=(dims,))
    torch.testing.assert_close(program.module()(token[:2, :5]), model(token[:2, :5]))


def test_errors_say_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"routing \('hash'\) needs the id of each token, got None"):
        HashFFN(8, 2)(torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"token ids \(2\) must be one for each of the tokens \(3\)"):
        HashFFN(8, 2)(torch.randn(3, 8), token_idx=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"needs the id of each token"):
        Classifier(4, 2, ClassifierConfig(ffn=FFNConfig(num_tiles=2, routing="hash")))(torch.randn(1, 3, 4))
    with pytest.raises(ValueError, match=r"top_k \(2\) must be 1 and max_k \(None\) None under routing \('hash'\)"):
        FFNConfig(num_tiles=4, routing="hash", top_k=2).build(8)
    with pytest.raises(ValueError, match="no signatures to freeze"):
        HashFFN(8, 2).freeze_signature(0)
