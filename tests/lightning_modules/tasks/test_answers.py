"""The answers of any task over any data: tokens, classes, and what is run on them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules.data import RunData, TrixDataModule
from lightning_modules.errors import UserError
from lightning_modules.tasks import Request
from lightning_modules.tasks.answers import default_example, default_exporter, default_page, tokens_per_example
from ort_ops.graph import Activations
from ort_ops.runtime import open_model
from trix.introspection import html_report
from trix.nn import TriXFFN


class Patches(nn.Module):
    """Cuts images [B, 4, 4] into 4 tokens of 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = TriXFFN(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x.reshape(-1, 4, 4))


class Halved(nn.Sequential):
    """The second layer gets every other token of the first."""

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x)[:, ::2])


class Data(TrixDataModule):
    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.tensors = tensors

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*self.tensors), batch_size=2)


class Several(nn.Module):
    """Answers with several tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = TriXFFN(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.ffn(x)
        return y, {"mean": y.mean(-1)}


def data(*tensors: Tensor) -> RunData:
    return RunData(lambda: Data(*tensors))


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("network", "x", "length"),
    [(TriXFFN(4, 2), X, 1), (TriXFFN(4, 2), X.reshape(2, 3, 4), 3), (Patches(), torch.randn(3, 1, 4, 4), 4)],
)
def test_a_page_can_be_drawn_of_any_inputs(network: nn.Module, x: Tensor, length: int) -> None:
    assert tokens_per_example(network, x) == length
    page = default_page(network, data(x, torch.arange(len(x))), 1000, None)
    assert [len(tokens) for tokens in page.tokens or []] == [length] * len(x)
    text = html_report(page.network, page.inputs, page.tokens, labels=page.labels, class_names=page.class_names)
    assert f">{len(x) * length} tokens, in sequences of {length}<" in text


def test_the_page_is_about_the_examples_themselves() -> None:
    page = default_page(TriXFFN(4, 2), data(X), 3, None)
    assert torch.equal(page.network(page.inputs), TriXFFN.forward(page.network.network, X[:3]))  # type: ignore[operator, arg-type]
    assert page.tokens == [[",".join(f"{value:.3g}" for value in row)] for row in X[:3].tolist()]
    assert page.labels is None


LEVELS = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])


@pytest.mark.parametrize(
    ("label", "names", "expected", "expected_names"),
    [
        (torch.tensor([0, 1, 2, 0, 1, 2]), ("a", "b", "c"), [0, 1, 2, 0, 1, 2], ("a", "b", "c")),
        (torch.tensor([0, 1, 2, 0, 1, 2]), None, [0, 1, 2, 0, 1, 2], None),
        (torch.tensor([0, 3, 0, 0, 0, 0]), ("a", "b", "c"), [0, 1, 0, 0, 0, 0], ["0", "3"]),  # beyond the names: no classes
        (torch.tensor([-1, 1, 1, 1, 1, 1]), None, [0, 1, 1, 1, 1, 1], ["-1", "1"]),
        (torch.tensor([[0.5]] * 3 + [[2.0]] * 3), None, [0, 0, 0, 1, 1, 1], ["0.5", "2"]),
        (LEVELS, None, [0, 1, 2, 3, 4, 4], ["0..1", "1..2", "2..3", "3..4", "4..5"]),
        (torch.zeros(6, 3), None, None, None),
        (torch.zeros(6, dtype=torch.complex64), None, None, None),
    ],
)
def test_labels_are_classes_or_ranges_of_numbers(
    label: Tensor, names: Any, expected: list[int] | None, expected_names: Any
) -> None:
    page = default_page(TriXFFN(4, 2), data(X, label), 1000, names)
    assert (None if page.labels is None else page.labels.tolist()) == expected
    assert page.class_names == expected_names


def test_layers_that_see_other_tokens_need_an_answer_of_the_task() -> None:
    network = Halved(TriXFFN(4, 2), TriXFFN(4, 2))
    with pytest.raises(UserError, match=r"of 1 examples \(6, 3\) must be equal.*TrixTask.page"):
        default_page(network, data(X[None]), 1000, None)


def test_an_example_is_told_by_number_and_label() -> None:
    example = default_example("Task", TriXFFN(4, 2), data(X, LEVELS / 2), Request(index=5))
    assert torch.equal(example.inputs, X[5:])
    assert example.subject == "example 5, label 2.5"
    assert default_example("Task", TriXFFN(4, 2), data(X), Request(index=5)).subject == "example 5"
    patched = default_example("Task", Patches(), data(torch.zeros(3, 1, 4, 4)), Request(index=1))
    assert patched.tokens == [f"example 1, token {place}" for place in range(4)]
    with pytest.raises(UserError, match=r"^Task needs one of its validation examples: --index N$"):
        default_example("Task", TriXFFN(4, 2), data(X), Request(prompt="a"))


@pytest.mark.parametrize(("network", "names"), [(TriXFFN(4, 2), ["output_0"]), (Several(), ["output_0", "output_1"])])
def test_a_network_with_any_number_of_outputs_is_exported(network: nn.Module, names: list[str], tmp_path: Path) -> None:
    exporter = default_exporter(network.eval(), data(X), 1000)
    exporter(tmp_path / "a.onnx", fallback=True, activations=Activations(), external_data=False)
    session = open_model(tmp_path / "a.onnx")
    outputs = session.run_outputs({"input": X[:3].numpy()})
    assert list(outputs) == names
    expected = network(X[:3]) if isinstance(network, TriXFFN) else network(X[:3])[0]
    torch.testing.assert_close(torch.from_numpy(outputs["output_0"]), expected.detach(), rtol=1e-5, atol=1e-6)
