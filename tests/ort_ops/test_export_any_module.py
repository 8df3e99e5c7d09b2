"""``export`` of somebody's own modules: what the file answers, what it holds, and what it says of what it cannot hold."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from own_modules import (
    BATCH,
    TIME,
    WIDTH,
    Branches,
    ByPhase,
    Counting,
    LookupWrapper,
    Own,
    SharedLayers,
    Tokens,
    TwoInputs,
    WithMask,
    answers,
    assert_close,
    seeded,
)
from torch import nn

from lightning_modules.cli import main
from ort_ops.export import ExportError, export
from ort_ops.file_format import Activations, ModelFileError
from ort_ops.runtime import ExportedModel, open_model
from ort_ops.signature_layers import read_model
from ort_ops.surgery import Edit, operate_on_file
from trix.nn import (
    DenseFFN,
    FFNConfig,
    GatedFFN,
    HierarchicalTriXFFN,
    SparseLookupFFN,
    SparseLookupFFNv2,
    TriXBlock,
    TriXFFN,
    TriXLinear,
    TriXStack,
    pack_model,
)

pytestmark = pytest.mark.usefixtures("native_library")


def attention_block(ffn: FFNConfig) -> nn.Module:
    return TriXBlock(WIDTH, 2, ffn, context_length=12, ternary_attention=True)


TOKENS = ({0: BATCH, 1: TIME},)
MODULES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "a block": (lambda: attention_block(FFNConfig(num_tiles=4, top_k=2)), TOKENS),
    "a stack": (lambda: TriXStack(2, WIDTH, 2, FFNConfig(kind="sparse_lookup", num_tiles=4), context_length=12), TOKENS),
    "a lookup alone": (lambda: nn.Sequential(SparseLookupFFN(WIDTH, 8)), TOKENS),
    "a lookup last": (lambda: nn.Sequential(TriXLinear(WIDTH, WIDTH), SparseLookupFFNv2(WIDTH, 8, top_k=2)), TOKENS),
    "a lookup in the middle": (
        lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), LookupWrapper(SparseLookupFFN(WIDTH, 8)), TriXLinear(WIDTH, 4)),
        TOKENS,
    ),
    "shared layers": (SharedLayers, TOKENS),
    "branches": (Branches, ({0: BATCH},)),
    "a mask": (WithMask, ({0: BATCH},)),
    "a control": (lambda: nn.Sequential(DenseFFN(WIDTH, 32), nn.ReLU()), TOKENS),
    "gated": (lambda: GatedFFN(WIDTH, num_tiles=4), TOKENS),
    "by phase": (ByPhase, TOKENS),
    "many tiles": (lambda: HierarchicalTriXFFN(WIDTH, num_tiles=9), TOKENS),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_file_answers_as_torch_with_and_without_the_library(name: str, tmp_path: Path) -> None:
    make, shapes = MODULES[name]
    module, path = seeded(make), tmp_path / "m.onnx"
    report = export(module, torch.randn(2, 5, WIDTH), path, dynamic_shapes=shapes)
    assert report.parity.max_relative_difference < 1e-5
    time = 7 if len(shapes[0]) == 2 else 5
    for x in (torch.randn(4, time, WIDTH), torch.randn(1, time, WIDTH)):
        expected = answers(module, x)
        first = expected[0] if isinstance(expected, tuple) else expected
        for use_library in (True, False):
            model = ExportedModel(path, use_library)
            found = model.run_outputs({model.session.get_inputs()[0].name: x.numpy()})
            assert_close(found["output_0"], first)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]


def test_an_own_module_with_dynamic_batch_and_time(tmp_path: Path) -> None:
    module, path = seeded(Own), tmp_path / "m.onnx"
    report = export(module, torch.randn(1, 1, 10), path, dynamic_shapes={"x": {0: BATCH, 1: TIME}})
    assert report.outputs == ("output_0",)
    model = open_model(path)
    source = model.session.get_inputs()[0]
    assert (source.name, source.shape) == ("x", ["batch", "time", 10])
    for shape in ((3, 7, 10), (1, 1, 10), (5, 2, 10)):
        x = torch.randn(shape)
        assert_close(model.run_outputs({"x": x.numpy()})["output_0"], answers(module, x))
    assert "max relative difference" in str(model.check_parity())


class OfOneSize(nn.Module):
    """Takes any number of rows as it is traced, but refuses all but four when it runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and x.shape[0] != 4:
            raise ValueError("other rows")
        return 2 * x


def test_the_report_says_at_which_sizes_the_file_was_checked(tmp_path: Path) -> None:
    x = torch.randn(4, 10)
    report = export(seeded(lambda: nn.Linear(10, 3)), x, tmp_path / "m.onnx", dynamic_shapes=({0: BATCH},))
    assert report.other_sizes == ("input (5, 10)", "input (1, 10)")
    assert "sizes   also checked at input (5, 10); input (1, 10)" in str(report)
    report = export(seeded(lambda: nn.Linear(10, 3)), x, tmp_path / "m.onnx")
    assert report.other_sizes is None
    assert "sizes   " not in str(report)
    report = export(OfOneSize(), x, tmp_path / "m.onnx", dynamic_shapes=({0: BATCH},))
    assert report.other_sizes == ()
    assert "sizes   the module refused all others tried" in str(report)


def test_no_packed_weight_is_in_the_file_as_floats(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    export(seeded(SharedLayers), torch.randn(2, 5, WIDTH), path)
    tensors = onnx.load(path).graph.initializer
    assert max(np.prod(t.dims) for t in tensors if t.data_type == onnx.TensorProto.FLOAT) < WIDTH * WIDTH
    # Two linear layers, up, down and signatures of the tiles: a layer that is called twice is there once.
    assert sum(t.data_type == onnx.TensorProto.UINT8 for t in tensors) == 2 + 3


def test_without_dynamic_shapes_sizes_are_those_of_the_example(tmp_path: Path) -> None:
    export(seeded(Own), torch.randn(2, 5, 10), tmp_path / "m.onnx")
    model = open_model(tmp_path / "m.onnx")
    assert model.session.get_inputs()[0].shape == [2, 5, 10]
    with pytest.raises(ModelFileError, match=r"m\.onnx: onnxruntime can't run it: .*Got: 3 Expected: 2"):
        model.run_outputs({"x": np.zeros((3, 5, 10), dtype=np.float32)})


def test_two_inputs_and_the_tensors_of_a_nested_output(tmp_path: Path) -> None:
    module, path = seeded(TwoInputs), tmp_path / "m.onnx"
    left, right = torch.randn(2, WIDTH), torch.randn(2, WIDTH)
    names = {"input_names": ["a", "view"], "output_names": ["sum", "a projection"]}
    report = export(module, (left, right), path, dynamic_shapes=({0: BATCH}, {0: BATCH}), **names)
    assert report.outputs == ("sum", "a projection")
    left, right = torch.randn(3, WIDTH), torch.randn(3, WIDTH)
    found = open_model(path).run_outputs({"a": left.numpy(), "view": right.numpy()})
    expected = answers(module, left, right)
    assert_close(found["sum"], expected["sum"])
    assert_close(found["a projection"], expected["rest"][1][0])
    for wrong, message in (
        ({"output_names": ["a"]}, r"output_names \(\['a'\]\) must name each of the 2 output tensors"),
        ({"input_names": ["a", "a"]}, r"input_names \(\['a', 'a'\]\) must be distinct"),
        ({"input_names": "ab"}, r"input_names \('ab'\) must name each of the 2 input tensors"),
    ):
        with pytest.raises(ExportError, match=message):
            export(module, (left, right), path, **wrong)


def test_a_lookup_reports_its_routing_but_no_losses(tmp_path: Path) -> None:
    module, path = seeded(lambda: SparseLookupFFNv2(WIDTH, 8, top_k=2)), tmp_path / "m.onnx"
    x = torch.randn(6, WIDTH)
    report = export(module, x, path, dynamic_shapes=({0: BATCH},))
    assert len(report.outputs) == 5
    y, info, losses = answers(module, x)
    assert all(float(loss) == 0 for loss in losses.values())
    found = open_model(path).run_outputs({"x": x.numpy()})
    for actual, expected in zip(found.values(), (y, *info.values()), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("form", ["training", "bfloat16", "float16", "packed"])
def test_the_module_may_be_in_any_form_and_stays_in_it(form: str, tmp_path: Path) -> None:
    module, x, path = seeded(Own).eval(), torch.randn(2, 5, 10), tmp_path / "m.onnx"
    if form == "training":
        module.train()
    elif form == "packed":
        pack_model(module)
    else:
        module, x = module.to(getattr(torch, form)), x.to(getattr(torch, form))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    report = export(module, x, path)
    assert module.training == (form == "training")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert report.float32_bytes == sum(p.numel() for p in Own().parameters()) * 4
    expected = answers(module.float() if form != "packed" else module, x.float())
    assert_close(open_model(path).run_outputs({"x": x.float().numpy()})["output_0"], expected)


def test_activations_of_8_bits_drift_and_are_told(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    report = export(seeded(Own), torch.randn(2, 5, 10), path, activations=Activations(8, 0))
    assert 1e-4 < report.drift.relative_rms_difference < 0.2
    assert "8 bits  against torch: relative RMS difference of the outputs" in str(report)
    parity = open_model(path).check_parity()
    assert parity.max_relative_difference < 1e-5
    assert "with its own answers when it was written" in str(parity)


def test_without_fallback_the_file_needs_the_library(tmp_path: Path) -> None:
    export(seeded(Own), torch.randn(2, 5, 10), tmp_path / "m.onnx", fallback=False)
    with pytest.raises(ModelFileError, match="needs the native library"):
        ExportedModel(tmp_path / "m.onnx", use_library=False)


LAYERS = st.sampled_from(["linear", "ternary", "tiles", "two tiles", "lookup", "norm", "dense", "activation"])


def made(kind: str, width: int, new_width: int) -> tuple[nn.Module, int]:
    if kind == "linear":
        return nn.Linear(width, new_width), new_width
    if kind == "ternary":
        return TriXLinear(width, new_width, num_tiles=1, bias=new_width % 2 == 0), new_width
    layers = {
        "tiles": lambda: TriXFFN(width, num_tiles=3, routing="explicit"),
        "two tiles": lambda: TriXFFN(width, num_tiles=4, top_k=2),
        "lookup": lambda: LookupWrapper(SparseLookupFFN(width, 5)),
        "norm": lambda: nn.RMSNorm(width),
        "dense": lambda: DenseFFN(width, 9),
        "activation": nn.GELU,
    }
    return layers[kind](), width


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(kinds=st.lists(LAYERS, min_size=2, max_size=5), widths=st.lists(st.integers(1, 40), min_size=6, max_size=6))
def test_random_structures(kinds: list[str], widths: list[int], tmp_path: Path) -> None:
    torch.manual_seed(1)
    layers, width = [], widths[0]
    for kind, new_width in zip(kinds, widths[1:], strict=False):
        layer, width = made(kind, width, new_width)
        layers.append(layer)
    module, path = nn.Sequential(*layers), tmp_path / "m.onnx"
    export(module, torch.randn(3, widths[0]), path, dynamic_shapes=({0: BATCH},))
    x = torch.randn(9, widths[0])
    assert_close(open_model(path).run_outputs({"input": x.numpy()})["output_0"], answers(module, x))


def test_surgery_and_inspection_of_layers_of_several_widths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    layers = (TriXFFN(WIDTH, num_tiles=4), TriXLinear(WIDTH, 24), SparseLookupFFN(24, 5))
    module = seeded(lambda: nn.Sequential(*layers))
    x = torch.randn(40, WIDTH)
    export(module, x, "m.onnx", dynamic_shapes=({0: BATCH},))
    _, about, found, records = read_model(Path("m.onnx"))
    assert about.module == "Sequential"
    assert [record.kind for record in records] == ["TriXFFN", "SparseLookupFFN"]
    assert [layer.signature_ED.shape for layer in found] == [(4, WIDTH), (5, 24)]
    signature_D = np.array([1, 0, -1] * 8)
    report = operate_on_file(Path("m.onnx"), Path("new.onnx"), Edit("insert", 1, 2, "tag", signature_D))
    assert report.num_tokens == 40
    module[2].insert_signature(2, torch.from_numpy(signature_D))
    y, info, _ = answers(module, x)
    outputs = open_model("new.onnx").run_outputs({"input": x.numpy()})
    assert_close(outputs["output_0"], y)
    assert_close(outputs["output_4"], info["scores"])  # which another node of the graph computes
    for command in (
        ["inspect", "new.onnx"],
        ["surgery", "m.onnx", "remove", "--layer", "0", "--tile", "1", "--tag", "t", "--output", "removed.onnx"],
    ):
        assert main(command) == 0
    page = Path("new.html").read_text()
    for text in (
        "module (Sequential)",
        "SparseLookupFFN, 5 tiles, 24 dimensions",
        "TriXFFN, 4 tiles, 16 dimensions",
        "output_4",
    ):
        assert text in page
    for text in ("<dt>configuration</dt>", "<th>usage</th>"):  # the file has neither
        assert text not in page
    for command, message in (
        (["generate", "m.onnx", "--prompt", "a"], "m.onnx: task (module) must be language_model"),
        (["bench", "m.onnx"], "m.onnx: task (module) must be language_model or classifier"),
    ):
        capsys.readouterr()
        assert main(command) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(ModelFileError, match=r"task \(module\) must be of a model with logits"):
        open_model("m.onnx").run(x.numpy())


def test_the_example_in_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert export.__doc__ is not None
    values: dict[str, Any] = {}
    exec(textwrap.dedent(export.__doc__.split("Example:\n")[1]), values)
    assert values["outputs"]["output_0"].shape == (7, 32)


def test_tokens_and_truth_values_are_inputs_and_whole_numbers_outputs(tmp_path: Path) -> None:
    module, path = seeded(Tokens), tmp_path / "m.onnx"
    token, mask = torch.randint(0, 11, (1, 5)), torch.ones(1, 5, dtype=torch.bool)
    export(module, (token, mask), path, dynamic_shapes=({0: BATCH, 1: TIME}, {0: BATCH, 1: TIME}))
    token, mask = torch.randint(0, 11, (3, 7)), torch.rand(3, 7) < 0.5
    expected = answers(module, token, mask)
    found = open_model(path).run_outputs({"token": token.numpy(), "mask": mask.numpy()})
    assert_close(found["output_0"], expected[0])
    np.testing.assert_array_equal(found["output_1"], expected[1].numpy())


def test_what_the_verification_changes_in_a_module_is_no_part_of_the_file(tmp_path: Path) -> None:
    module, x, path = seeded(Counting), torch.randn(2, WIDTH), tmp_path / "m.onnx"
    export(module, x, path)
    assert float(module.calls) == 0
    for _ in range(2):  # a file has no state
        assert_close(open_model(path).run_outputs({"x": x.numpy()})["output_0"], answers(seeded(Counting), x))
