import inspect

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trix.nn import SparseLookupBlockV2, SparseLookupFFN, SparseLookupFFNv2
from trix.nn.sparse_lookup_v2 import ScoreCalibrationSpline
from trix.routing import calibration


def with_signatures(raw_ED: torch.Tensor, **arguments) -> SparseLookupFFNv2:
    ffn = SparseLookupFFNv2(raw_ED.shape[1], raw_ED.shape[0], **arguments).to(raw_ED.dtype)
    with torch.no_grad():
        ffn.router.raw_signatures.copy_(raw_ED)
    return ffn


def test_extends_v1_and_has_the_documented_arguments() -> None:
    assert issubclass(SparseLookupFFNv2, SparseLookupFFN)
    assert ScoreCalibrationSpline is calibration.ScoreCalibrationSpline
    documented = {
        "d_model": 128,
        "num_tiles": 64,
        "tiles_per_cluster": 8,
        "grid_size": 16,
        "compress_hidden": None,
        "dropout": 0.1,
        "use_score_calibration": True,
        "ternary_weight": 0.01,
        "sparsity_weight": 0.01,
        "diversity_weight": 0.01,
    }
    for built in (SparseLookupFFNv2, SparseLookupBlockV2):
        parameters = inspect.signature(built).parameters
        assert documented.items() <= {name: p.default for name, p in parameters.items()}.items()
    assert list(inspect.signature(SparseLookupFFNv2).parameters)[:10] == list(documented)
    assert SparseLookupFFNv2().compress[0].out_features == 32


def test_the_surgery_workflow_runs_as_documented(capsys: pytest.CaptureFixture[str]) -> None:
    # 1. Create model
    ffn = SparseLookupFFNv2(
        d_model=64,
        num_tiles=16,
        tiles_per_cluster=4,
        ternary_weight=0.01,
    )

    # 2. Train normally for a while
    optimizer = torch.optim.Adam(ffn.parameters())
    for _ in range(100):
        x = torch.randn(8, 32, 64)
        output, _, aux = ffn(x)
        loss = output.sum() + aux["total_aux"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # 3. Insert a designed signature for a specific concept
    concept_signature = torch.zeros(64)
    concept_signature[:8] = 1.0  # Positive features
    concept_signature[8:12] = -1.0  # Negative features

    ffn.insert_signature(0, concept_signature, freeze=True, tag="my_concept")

    # 4. Continue training (signature stays fixed)
    for _ in range(100):
        x = torch.randn(8, 32, 64)
        labels = torch.randint(0, 10, (8, 32))
        output, _, aux = ffn(x, labels=labels)
        loss = output.sum() + aux["total_aux"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(ffn.get_tile_signatures()[0], concept_signature)

    # 5. Check if tile claims target class
    claim_rate = ffn.get_claim_rate(tile_idx=0, target_class=0)
    print(f"Tile 0 claims {claim_rate:.1%} of class 0")

    # 6. Optionally unfreeze to let it refine
    ffn.unfreeze_signature(0)

    # 7. Check signature evolution
    analysis = ffn.get_signature_analysis(0)
    print(f"Final positive dims: {analysis['positive_dims']}")

    assert "Final positive dims: [0, 1, 2, 3, 4, 5, 6, 7]" in capsys.readouterr().out
    assert analysis["negative_dims"] == [8, 9, 10, 11]
    assert analysis["zero_count"] == 52
    assert [(h["operation"], h["step"]) for h in ffn.get_surgery_history()] == [("insert", 100), ("unfreeze", 200)]
    assert ffn.claims.count_EC.sum() == 100 * 8 * 32
    assert ffn.claims.num_classes == 10


@pytest.mark.parametrize(("d_model", "num_tiles"), [(128, 64), (64, 16)])
def test_an_inserted_signature_claims_the_class_it_was_designed_for(d_model: int, num_tiles: int) -> None:
    rates = []
    for seed in range(30):
        torch.manual_seed(seed)
        ffn = SparseLookupFFNv2(d_model, num_tiles)
        signature = torch.zeros(d_model)
        signature[:16] = 1.0
        ffn.insert_signature(0, signature, tag="concept")
        x, labels = torch.randn(8, 32, d_model), torch.randint(0, 10, (8, 32))
        x[labels == 0, :16] = 2.0
        ffn.eval()(x, labels=labels)
        rates.append(ffn.get_claim_rate(tile_idx=0, target_class=0))
        assert ffn.get_tile_purity(0)[0] == 0
    assert sum(rates) / len(rates) >= 0.99


def test_the_calibration_learns_from_the_task_and_never_reroutes() -> None:
    torch.manual_seed(0)
    ffn = SparseLookupFFNv2(512, 32, dropout=0.0)
    x = torch.randn(4, 64, 512)
    _, before, _ = ffn(x)
    ffn(x)[0].square().mean().backward()
    for parameter in (ffn.calibration.increment, ffn.router.raw_signatures):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    with torch.no_grad():
        ffn.calibration.increment.copy_(torch.tensor([9.0, -9, 9, -9, 9, -9, 9]))
    _, after, _ = ffn(x)
    assert torch.equal(after["tile_idx"], before["tile_idx"])
    assert torch.equal(after["tile_idx"], after["scores"].argmax(dim=-1))
    assert not torch.equal(after["weight"], before["weight"])


def test_training_the_calibration_lowers_the_loss_with_all_else_fixed() -> None:
    torch.manual_seed(0)
    ffn = SparseLookupFFNv2(32, 8, dropout=0.0)
    x = torch.randn(256, 32)
    with torch.no_grad():
        update, info, _ = ffn(x)
        target = x + (update - x) / info["weight"].unsqueeze(-1) * info["weight"].unsqueeze(-1) ** 3
    optimizer = torch.optim.Adam(ffn.calibration.parameters(), lr=0.05)
    losses = []
    for _ in range(100):
        loss = (ffn(x)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_without_calibration_the_gate_is_the_sigmoid_of_the_score() -> None:
    ffn = SparseLookupFFNv2(16, 4, use_score_calibration=False)
    _, info, _ = ffn(torch.randn(9, 16))
    best = info["scores"].gather(-1, info["tile_idx"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(info["weight"], best.sigmoid())
    assert not any("calibration" in name for name, _ in ffn.named_parameters())


def test_regularisers_by_hand() -> None:
    ffn = with_signatures(torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0.9, 0.2, -1.3, 0.5]]))
    assert ffn.compute_ternary_loss().item() == pytest.approx((0.1 + 0.2 + 0.3 + 0.5) / 12)
    counts = [(1.09 * v * v / (v * v + 0.09)) for v in (0.9, 0.2, 1.3, 0.5)]
    expected = (0.0 + (2 / 4 - 0.3) + (sum(counts) / 4 - 0.3)) / 3
    assert ffn.compute_sparsity_loss().item() == pytest.approx(expected, rel=1e-5)
    raw = ffn.router.raw_signatures.detach()
    cosines = [torch.cosine_similarity(raw[i], raw[j], dim=0).item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert ffn.compute_diversity_loss().item() == pytest.approx(sum(max(c - 0.5, 0.0) for c in cosines) / 3, rel=1e-5)


@pytest.mark.parametrize("name", ["ternary", "sparsity", "diversity"])
def test_a_regulariser_is_zero_at_its_goal_weighted_in_the_output_and_gone_in_evaluation(name: str) -> None:
    goal = with_signatures(torch.eye(10))
    assert getattr(goal, f"compute_{name}_loss")().item() == 0.0
    ffn = with_signatures(torch.rand(5, 10) + 0.2, **{f"{name}_weight": 3.0})
    x = torch.randn(4, 10)
    _, _, aux = ffn(x)
    torch.testing.assert_close(aux[name], 3.0 * getattr(ffn, f"compute_{name}_loss")())
    assert aux[name] > 0
    assert ffn.eval()(x)[2][name] == 0.0


@pytest.mark.parametrize("name", ["ternary", "sparsity", "diversity"])
def test_gradients_of_the_regularisers(name: str) -> None:
    torch.manual_seed(0)
    raw = torch.randn(4, 10, dtype=torch.float64)
    raw[1] = raw[0] + 0.1 * torch.randn(10)
    ffn = with_signatures(raw)

    def loss(raw: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(Regulariser(ffn, name), {"ffn.router.raw_signatures": raw}, ())

    value = raw.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (value,))
    loss(value).backward()
    assert value.grad is not None
    assert value.grad.abs().sum() > 0


class Regulariser(torch.nn.Module):
    def __init__(self, ffn: SparseLookupFFNv2, name: str) -> None:
        super().__init__()
        self.ffn, self.name = ffn, name

    def forward(self) -> torch.Tensor:
        return getattr(self.ffn, f"compute_{self.name}_loss")()


@pytest.mark.parametrize(
    ("name", "statistic"), [("ternary", "ternary_fraction"), ("sparsity", "sparsity"), ("diversity", "diversity")]
)
def test_steps_on_a_regulariser_reach_its_goal_and_leave_frozen_tiles_alone(name: str, statistic: str) -> None:
    torch.manual_seed(0)
    raw = torch.randn(8, 20) * 0.3 + (0.5 if name == "diversity" else 0.0)
    ffn = with_signatures(raw)
    ffn.freeze_signature(2)
    frozen_D = ffn.get_raw_signatures()[2]
    assert torch.equal(frozen_D, raw[2].sign() * (raw[2].abs() > 0.3))
    optimizer = torch.optim.Adam(ffn.parameters(), lr=0.02)
    before = ffn.get_island_stats()[statistic]
    for _ in range(150):
        loss = getattr(ffn, f"compute_{name}_loss")()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ffn.get_island_stats()[statistic] > before + 0.1
    assert torch.equal(ffn.get_raw_signatures()[2], frozen_D)


def test_island_stats_by_hand() -> None:
    stats = with_signatures(torch.tensor([[1.05, 0.05, 0.2, -0.5], [0.91, -0.95, 0.0, 0.0]])).get_island_stats()
    assert stats["ternary_fraction"] == pytest.approx(6 / 8)  # 0.2 and -0.5 are near nothing
    assert stats["sparsity"] == pytest.approx(4 / 8)
    assert stats["mean_pairwise_similarity"] == pytest.approx(0.5)  # (1, 0, 0, -1) and (1, -1, 0, 0)
    assert stats["diversity"] == pytest.approx(0.5)
    alone = SparseLookupFFNv2(8, 1)
    assert alone.get_island_stats()["diversity"] == 1.0
    assert alone.compute_diversity_loss() == 0.0


def test_raw_signatures_are_not_ternary_by_construction() -> None:
    assert 0.0 < SparseLookupFFNv2(64, 16).get_island_stats()["ternary_fraction"] < 0.5


def test_negative_weights_are_refused() -> None:
    for name in ("ternary_weight", "sparsity_weight", "diversity_weight"):
        with pytest.raises(ValueError, match=rf"{name} \(-0.1\) must be >= 0"):
            SparseLookupFFNv2(8, 2, **{name: -0.1})


def test_the_number_of_tiles_does_not_enter_the_work_of_a_token_beyond_its_scores() -> None:
    def flops(num_tiles: int) -> int:
        ffn = SparseLookupFFNv2(32, num_tiles).eval()
        with FlopCounterMode(display=False) as counter:
            ffn(torch.randn(100, 32))
        return counter.get_total_flops() - 2 * 100 * 32 * num_tiles

    assert flops(16) == flops(1024)


@pytest.mark.parametrize("use_score_calibration", [True, False])
def test_a_packed_layer_has_the_gate_of_its_curve(use_score_calibration: bool) -> None:
    ffn = SparseLookupFFNv2(16, 8, top_k=2, use_score_calibration=use_score_calibration).eval()
    with torch.no_grad():
        if ffn.calibration is not None:
            ffn.calibration.increment.normal_()
        x = torch.randn(50, 16) * torch.rand(50, 1) * 5
        y = ffn(x)[0]
        ffn.pack()
        torch.testing.assert_close(ffn(x)[0], y)
