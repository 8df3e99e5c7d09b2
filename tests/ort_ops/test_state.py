from pathlib import Path
from typing import Any

import exported_models
import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ort_ops.export import export_classifier, export_language_model
from ort_ops.runtime import ExportedModel, LanguageModelSession
from ort_ops.state import StatefulReader, empty_state
from trix.nn import Classifier, ClassifierConfig, FFNConfig, LanguageModel, LanguageModelConfig, Mixer
from trix.outputs import State, StateSpec, TokenContext

pytestmark = pytest.mark.usefixtures("native_library")
CONTEXT = exported_models.CONTEXT


@pytest.fixture(scope="module", params=[True, False], ids=["native", "portable"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    path = exported_models.export(tmp_path_factory.mktemp("state"), exported_models.TOP2, num_layers=2).path
    return ExportedModel(path, request.param, num_threads=1)


@settings(max_examples=15, deadline=None)
@given(cuts=st.sets(st.integers(1, CONTEXT - 1)), batch_size=st.integers(1, 4), seed=st.integers(0, 99))
def test_read_in_any_pieces_a_batch_is_answered_as_a_whole(
    model: ExportedModel, cuts: set[int], batch_size: int, seed: int
) -> None:
    token_BT = np.random.default_rng(seed).integers(0, 11, (batch_size, CONTEXT))
    whole_logits, whole_idx = model.run(token_BT)
    reader = StatefulReader(model.session, batch_size)
    answers = [reader.read(part, ["logits", "tile_idx"]) for part in np.split(token_BT, sorted(cuts), axis=1)]
    logits, tile_idx = (np.concatenate(output, axis=1) for output in zip(*answers, strict=True))
    np.testing.assert_allclose(logits, whole_logits, atol=1e-5 * np.abs(whole_logits).max())
    assert np.array_equal(tile_idx, whole_idx)
    assert reader.num_tokens == CONTEXT


def test_names_and_shapes_are_those_that_stand_in_the_document(model: ExportedModel) -> None:
    inputs = {value.name: value.shape for value in model.session.get_inputs()}
    assert list(inputs) == ["token", "past_key_0", "past_value_0", "past_key_1", "past_value_1"]
    assert inputs["past_value_1"] == ["batch", 2, "past", 10]
    outputs = [value.name for value in model.session.get_outputs()]
    assert outputs == ["logits", "tile_idx", *(name.replace("past", "present") for name in list(inputs)[1:])]
    assert {value.shape for value in empty_state(model.session, 3).values()} == {(3, 2, 0, 10)}


class Alone(Mixer):
    """Each token by itself: nothing is kept of those before."""

    def __init__(self, d_model: int, **_: Any) -> None:
        super().__init__()
        self.project = nn.Linear(d_model, d_model)

    def state_specs(self) -> tuple[StateSpec, ...]:
        return ()

    def forward(self, x_BTD: Tensor, context: TokenContext, state: State | None = None) -> tuple[Tensor, State, None]:
        return self.project(x_BTD), (), None


def test_a_language_model_that_keeps_nothing_generates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mixer = f"{Alone.__module__}.{Alone.__qualname__}"
    config = LanguageModelConfig(16, 1, 2, CONTEXT, False, 0.0, FFNConfig(num_tiles=4), mixer=mixer)
    model = LanguageModel(11, config).eval()
    report = export_language_model(model, exported_models.VOCABULARY, torch.randint(0, 11, (60,)), tmp_path / "m.onnx")
    assert report.stepwise_parity.max_relative_difference < 1e-5
    session = LanguageModelSession(tmp_path / "m.onnx")
    assert [value.name for value in session.session.get_inputs()] == ["token"]
    token = [0, 3]
    for _ in range(20):
        token.append(int(model(torch.tensor([token[-1:]]))[0, -1].argmax()))
    expected = "".join(exported_models.VOCABULARY[place] for place in token[2:])
    assert "".join(session.generate("ad", 20, temperature=0.0)) == expected


def test_a_classifier_keeps_nothing(tmp_path: Path) -> None:
    classifier = Classifier(6, 2, ClassifierConfig(16, 1, 2, 5, ffn=FFNConfig(kind="none"))).eval()
    export_classifier(classifier, ["a", "b"], torch.randn(4, 5, 6), tmp_path / "c.onnx")
    assert empty_state(ort.InferenceSession(tmp_path / "c.onnx"), 3) == {}
