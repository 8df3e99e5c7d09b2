"""What a model loses: nothing with a perfect reconstruction, all with zeros, whatever the padding, and no hook is left."""

import pytest
import torch
import torch.nn.functional as F
from planted_backend import LETTERS, WIDTH, PlantedWithSinks
from small_dumps import trix_backend
from torch import Tensor, nn

from trix.superposition.evaluation import model_fit, model_fits

TEXTS = ["abcabcab", "hgfedcba abc", "b", "caabbc"]


class Scaled(nn.Module):
    """x_hat = scale * x, after a change of the width that it says it has."""

    def __init__(self, scale: float, d_model: int = 32) -> None:
        super().__init__()
        self.scale, self.d_model = scale, d_model

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale * x_ND, x_ND


def test_a_perfect_reconstruction_loses_nothing_and_zeros_lose_all() -> None:
    backend = trix_backend()
    batch = backend.tokenize(TEXTS, 16)
    perfect, none = (model_fit(backend, 1, Scaled(scale), lambda: [batch]) for scale in (1.0, 0.0))
    logits = backend.model(batch["input_ids"], mask_BT=batch["attention_mask"].bool())[:, :-1]
    is_predicted = batch["attention_mask"][:, 1:].bool()
    loss = F.cross_entropy(logits[is_predicted], batch["input_ids"][:, 1:][is_predicted])
    assert perfect.loss == pytest.approx(float(loss), abs=1e-5)
    assert perfect.num_tokens == sum(len(text) - 1 for text in TEXTS)
    assert perfect.loss_sae == pytest.approx(perfect.loss, abs=1e-6)
    assert (perfect.recovered_zero, perfect.recovered_mean) == pytest.approx((1.0, 1.0), abs=1e-4)
    assert perfect.kl == pytest.approx(0.0, abs=1e-6)
    assert none.loss_sae == pytest.approx(none.loss_zero, abs=1e-6)
    assert none.recovered_zero == pytest.approx(0.0, abs=1e-4)
    assert none.kl > 1e-3


def test_the_batches_do_not_matter() -> None:
    backend = trix_backend()
    together = model_fit(backend, 2, Scaled(0.5), lambda: [backend.tokenize(TEXTS, 16)])
    apart = model_fit(backend, 2, Scaled(0.5), lambda: [backend.tokenize([text], 16) for text in TEXTS])
    assert together == pytest.approx(apart, abs=1e-5)


def test_several_are_measured_as_each_would_be_alone() -> None:
    backend = trix_backend()
    batches = [backend.tokenize(TEXTS, 16)]
    together = model_fits(backend, 1, {"half": Scaled(0.5), "most": Scaled(0.9)}, lambda: batches)
    for name, scale in (("half", 0.5), ("most", 0.9)):
        assert together[name] == pytest.approx(model_fit(backend, 1, Scaled(scale), lambda: batches), abs=1e-6)
    assert together["half"].kl > together["most"].kl > 0


def test_sinks_pass_as_they_are() -> None:
    backend = PlantedWithSinks()
    batch = backend.tokenize(["absab", "ba"], 8)  # s has eleven times the norm of the others
    seen: list[Tensor] = []
    backend.block(0).register_forward_hook(lambda _, __, output: seen.append(output))
    model_fit(backend, 0, Scaled(1.0, WIDTH), lambda: [batch])
    original, *_, zero, _ = seen
    is_passed = torch.tensor([[True, False, True, False, False], [True, False, True, True, True]])  # the last three: padding
    assert torch.equal((zero == original).all(dim=-1), is_passed)
    assert LETTERS.index("s") in batch["input_ids"]


def test_no_hook_is_left_and_what_does_not_fit_is_named() -> None:
    backend = trix_backend()
    batch = backend.tokenize(TEXTS, 16)

    class Failing(Scaled):
        def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
            raise RuntimeError("in the autoencoder")

    with pytest.raises(RuntimeError, match="in the autoencoder"):
        model_fit(backend, 1, Failing(1.0), lambda: [batch])
    assert not backend.block(1)._forward_pre_hooks
    for layer, sae, batches, message in (
        (3, Scaled(1.0), [batch], r"layer \(3\) must be >= 0 and < number of layers \(3\)"),
        (1, Scaled(1.0, 8), [batch], r"d_model of the autoencoder \(8\) must be the stream's \(32\)"),
        (1, Scaled(1.0), [], r"number of tokens to replace \(0\) must be >= 1"),
        (1, Scaled(1.0), [backend.tokenize(["a", "b"], 4)], r"number of tokens with one after them \(0\) must be >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            model_fit(backend, layer, sae, lambda batches=batches: batches)
