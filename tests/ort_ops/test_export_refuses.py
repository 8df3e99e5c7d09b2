"""What ``export`` does not take: one line each, and no file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from own_modules import BATCH, WIDTH, Own, TwoInputs, seeded
from torch import Tensor, nn

from ort_ops.export import ExportError, export
from trix.nn import TriXFFN, pack_model

pytestmark = pytest.mark.usefixtures("native_library")


class Faulty(nn.Module):
    def __init__(self, compute: Callable[[Tensor], Any], value: Tensor | None = None) -> None:
        super().__init__()
        self.compute = compute
        if value is not None:
            self.value = nn.Parameter(value)

    def forward(self, x: Tensor) -> Any:
        return self.compute(x)


def asks_for_a_value(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def raises(_: Tensor) -> Tensor:
    raise RuntimeError("of its own\nin two lines")


FAULTS: dict[str, tuple[Any, Tensor, dict[str, Any], str]] = {
    "not traceable": (
        Faulty(asks_for_a_value),
        torch.ones(3),
        {},
        r"Faulty can't be exported: GuardOnDataDependent\w+: Could not",
    ),
    "no ONNX operator": (
        Faulty(torch.linalg.svd),
        torch.ones(3, 3),
        {},
        r"Faulty can't be exported: \w+: No ONNX function .*svd",
    ),
    "raises": (Faulty(raises), torch.ones(3), {}, "Faulty fails on the example inputs: RuntimeError: of its own in two lines"),
    "complex output": (Faulty(torch.fft.fft), torch.ones(3), {}, r"output 0 \(torch.complex64\) must be of one of the types"),
    "an object": (Faulty(lambda x: (x, object())), torch.ones(3), {}, "output of type object must be tensors, or tuples"),
    "no tensor": (Faulty(lambda _: None), torch.ones(3), {}, "the output of Faulty must hold a tensor"),
    "no dependence": (Faulty(lambda _: torch.ones(3)), torch.ones(3), {}, "an output of Faulty must depend on an input"),
    "NaN": (Faulty(torch.log), -torch.ones(3), {}, "output 0 must be numbers on the example inputs: of 3 values 3 are NaN"),
    "float64 weights": (
        Own().double(),
        torch.ones(2, 10),
        {},
        r"weight project.\w+ \(torch.float64\) must be float32, float16 or",
    ),
    "float64 input": (Own(), torch.ones(2, 10).double(), {}, r"example input x \(torch.float64\) must be float32"),
    "complex weights": (Faulty(torch.abs, torch.ones(2) * 1j), torch.ones(3), {}, r"weight value \(torch.complex64\) must be"),
    "infinite weights": (Faulty(torch.abs, torch.ones(2) / 0), torch.ones(3), {}, "weight value must be finite: .* 2 infinite"),
    "empty example": (Own(), torch.ones(0, 10), {}, r"example input x \(0, 10\) must have no axis of size 0"),
    "too few inputs": (TwoInputs(), torch.ones(2, WIDTH), {}, r"must take the 1 example inputs: missing .* 'right'"),
    "unknown input": (Own(), torch.ones(2, 10), {"dynamic_shapes": {"y": {}}}, r"dynamic_shapes \(y\) must name inputs .*: x"),
    "shapes of two": (Own(), torch.ones(2, 10), {"dynamic_shapes": (None, None)}, r"dynamic_shapes \(2\) must have one entry"),
    "an axis too far": (
        Own(),
        torch.ones(2, 10),
        {"dynamic_shapes": ({5: BATCH},)},
        r"dynamic_shapes: axis \(5\) of input x must be < its number of axes \(2\)",
    ),
    "no module": (torch.relu, torch.ones(3), {}, r"module \(builtin_function_or_method\) must be an nn.Module"),
    "a fixed axis": (
        Faulty(lambda x: x.reshape(2, 5)),
        torch.ones(2, 5),
        {"dynamic_shapes": ({0: BATCH},)},
        "axis 0 of input x must take other sizes, as dynamic_shapes says, but the module computes with 2 alone",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_exported_is_told_in_one_line(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module, x, options, message = FAULTS[name]
    with pytest.raises(ExportError, match=message) as error:
        export(module, x, tmp_path / "m.onnx", **options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def spoiled(module: nn.Module) -> nn.Module:
    pack_model(module).ffn.tiles.up.row_scale.mul_(1.01)
    return module


def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ort_ops.export.pack_model", spoiled)
    with pytest.raises(ExportError, match=r"max relative difference to torch \(.*\) must be < 1e-04 .*, at x \(2, 10\)"):
        export(seeded(Own), torch.randn(2, 10), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def tied() -> nn.Module:
    module = Own(TriXFFN(WIDTH, num_tiles=2, routing="explicit"))
    module.ffn.router.raw_signatures.data[1] = module.ffn.router.raw_signatures[0]
    return module


def test_a_choice_that_rounding_decides_is_named_as_a_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ort_ops.export.pack_model", spoiled)
    with pytest.raises(ExportError, match="rounding decided between two tiles 2 times: try other example inputs"):
        export(seeded(tied), torch.randn(2, 10), tmp_path / "m.onnx")
