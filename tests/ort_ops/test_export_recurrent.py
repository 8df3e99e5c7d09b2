"""Language models whose mixers have a state of fixed size, exported: they answer as torch, whole and in pieces."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ort_ops.export import export_language_model
from ort_ops.library import session_options
from ort_ops.runtime import ExportedModel, LanguageModelSession
from ort_ops.state import StatefulReader
from trix.nn import FFNConfig, LanguageModel, LanguageModelConfig

pytestmark = pytest.mark.usefixtures("native_library")
VOCABULARY = "abcdefghijk"
CONTEXT = 40
HERMITIAN = {"hopping": "hermitian"}
CASES: dict[str, dict[str, Any]] = {
    "hermitian and attention": {"mixer": "resolvent", "mixer_args": HERMITIAN, "attention_at": (1,), "num_layers": 2},
    "hermitian, vector state": {"mixer": "resolvent", "mixer_args": HERMITIAN | {"d_state": 0}},
    "one way": {"mixer": "resolvent", "mixer_args": {"hopping": "one_way", "gauge": False, "d_state": 5}},
    "one way, expanded": {"mixer": "resolvent", "mixer_args": {"expand": 2}},
    "ssd": {"mixer": "ssd"},
}
STATES = {
    "hermitian and attention": ["conv_0", "carry_0", "pivot_0", "key_1", "value_1"],
    "hermitian, vector state": ["conv_0", "carry_0", "pivot_0"],
    "one way": ["conv_0", "carry_0"],
    "one way, expanded": ["conv_0", "carry_0"],
    "ssd": ["conv_0", "carry_0"],
}


class Exported(NamedTuple):
    name: str
    path: Path
    model: LanguageModel
    native: ExportedModel
    portable: ExportedModel


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    network = {"d_model": 24, "num_layers": 1, "n_heads": 2, "context_length": CONTEXT, "ternary_attention": True}
    config = LanguageModelConfig(**(network | CASES[request.param]), dropout=0.0, ffn=FFNConfig(num_tiles=4))
    model = LanguageModel(len(VOCABULARY), config).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # far from initialisation
    path = tmp_path_factory.mktemp("recurrent") / "model.onnx"
    report = export_language_model(model, VOCABULARY, torch.randint(0, 11, (4 * CONTEXT,)), path)
    for parity in (report.parity, report.stepwise_parity):
        assert parity.max_relative_difference < 1e-5
        assert parity.routing_agreement == 1.0
    return Exported(request.param, path, model, ExportedModel(path), ExportedModel(path, use_library=False))


def test_both_paths_answer_as_torch(exported: Exported) -> None:
    for shape in ((3, CONTEXT), (1, 1), (2, 7)):
        token_BT = torch.randint(0, 11, shape)
        expected = exported.model(token_BT).detach().numpy()
        for model in (exported.native, exported.portable):
            found, _ = model.run(token_BT.numpy())
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@settings(max_examples=10, deadline=None, derandomize=True)
@given(cuts=st.sets(st.integers(1, CONTEXT - 1)), batch_size=st.integers(1, 3), seed=st.integers(0, 99))
def test_read_in_any_pieces_a_text_is_answered_as_a_whole(
    exported: Exported, cuts: set[int], batch_size: int, seed: int
) -> None:
    token_BT = np.random.default_rng(seed).integers(0, 11, (batch_size, CONTEXT))
    for model in (exported.native, exported.portable):
        whole, _ = model.run(token_BT)
        reader = StatefulReader(model.session, batch_size)
        logits = [reader.read(part, ["logits"])[0] for part in np.split(token_BT, sorted(cuts), axis=1)]
        np.testing.assert_allclose(np.concatenate(logits, axis=1), whole, rtol=0, atol=1e-5 * np.abs(whole).max())


def test_the_state_is_what_the_mixers_keep(exported: Exported) -> None:
    inputs = {value.name: value.shape for value in exported.native.session.get_inputs()}
    assert list(inputs) == ["token", *(f"past_{name}" for name in STATES[exported.name])]
    for layer, specs in enumerate(exported.model.state_specs()):
        for spec in specs:
            assert inputs[f"past_{spec.name}_{layer}"] == list(spec.shape)


def test_it_generates_what_torch_does(exported: Exported) -> None:
    token = [0, 3]
    for _ in range(20):
        token.append(int(exported.model(torch.tensor([token]))[0, -1].argmax()))
    expected = "".join(VOCABULARY[place] for place in token[2:])
    assert "".join(LanguageModelSession(exported.path).generate("ad", 20, temperature=0.0)) == expected


def test_what_only_weights_decide_is_computed_when_the_file_is_loaded(exported: Exported, tmp_path: Path) -> None:
    """The open end, the gauge and the like: a step computes nothing twice. Softplus is of the dynamics, one node each."""
    import onnx

    options = session_options()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimised.onnx"), 4
    ort.InferenceSession(exported.path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    known = {value.name for value in graph.input}
    for node in graph.node:
        assert known & set(node.input), f"{node.op_type} {node.output} depends on no input"
        known |= set(node.output)
    num_softplus = sum(node.op_type == "Softplus" for node in graph.node)
    assert num_softplus == (1 if exported.name == "ssd" else 2)
