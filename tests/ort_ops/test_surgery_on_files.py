"""Surgery on an exported file gives what the same surgery on the torch model gives, and changes nothing else."""

import copy
from collections.abc import Callable
from pathlib import Path

import exported_models
import numpy as np
import onnx
import pytest
import torch
from exported_models import CONTEXT, VOCABULARY, Exported

from ort_ops.panels import to_panels
from ort_ops.runtime import ExportedModel
from ort_ops.signature_layers import SignatureLayer, read_model, signature_nodes
from ort_ops.surgery import Edit, VerificationError, operate_on_file
from trix.nn import FFNConfig, LanguageModel, RoutedLayer, routed_layers

pytestmark = pytest.mark.usefixtures("native_library")
MODELS = {  # layer and number of layers, of which the last is edited
    "two tiles": (exported_models.TOP2, 2),
    "adaptive": (FFNConfig(num_tiles=4, max_k=2), 1),
    "emergent": (FFNConfig(num_tiles=4, routing="emergent"), 1),
    "lookup": (FFNConfig(kind="sparse_lookup_v2", num_tiles=4, route_on="hidden"), 1),
    "one route for all layers": (FFNConfig(num_tiles=4, route_on="context", signatures="learned"), 2),
    "one route, adaptive": (FFNConfig(num_tiles=4, max_k=2, route_on="context", signatures="learned"), 2),
}
SIGNATURE_D = torch.tensor([1, 0, -1, 0, 1] * 4, dtype=torch.int8)


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported_models.export(tmp_path_factory.mktemp("surgery"), *MODELS[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported_models.export(tmp_path_factory.mktemp("plain"), FFNConfig(num_tiles=4), num_layers=2)


def assert_same(path: Path, model: LanguageModel, use_library: bool = True) -> None:
    token_BT = torch.randint(0, len(VOCABULARY), (40, CONTEXT), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, infos, _ = model(token_BT, return_routing=True)
    logits, tile_idx = ExportedModel(path, use_library).run(token_BT.numpy())
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-3, rtol=1e-3)
    assert tile_idx is not None
    best_BT = infos[-1]["tile_idx"].reshape(40, CONTEXT, -1)[..., 0]
    np.testing.assert_array_equal(tile_idx.reshape(40, CONTEXT, len(infos), -1)[..., -1, 0], best_BT.numpy())


def edit_last(model: LanguageModel, operation: str) -> Edit:
    signature_D = SIGNATURE_D.numpy() if operation == "insert" else None
    return Edit(operation, len(routed_layers(model)) - 1, 2, "concept", signature_D)


def edited(model: LanguageModel, act: Callable[[RoutedLayer], None]) -> LanguageModel:
    model = copy.deepcopy(model)
    act(routed_layers(model)[-1])
    return model


def test_an_inserted_signature_computes_as_in_torch(exported: Exported, tmp_path: Path) -> None:
    output = tmp_path / "new.onnx"
    report = operate_on_file(exported.path, output, edit_last(exported.model, "insert"))
    expected = edited(exported.model, lambda layer: layer.insert_signature(2, SIGNATURE_D, tag="concept"))
    assert_same(output, expected)
    assert_same(output, expected, use_library=False)
    assert report.is_frozen
    assert not report.was_frozen
    assert (report.after_D == SIGNATURE_D.numpy()).all()
    *others, record = read_model(output)[3]
    history = [{**entry, "file": "onnx"} for entry in routed_layers(expected)[-1].get_surgery_history()]
    assert record.history == history
    assert record.frozen == [2]
    assert all(other.history == [] for other in others)


def test_a_removed_tile_counts_for_nothing_as_in_torch_and_comes_back(exported: Exported, tmp_path: Path) -> None:
    removed, back = tmp_path / "removed.onnx", tmp_path / "back.onnx"
    operate_on_file(exported.path, removed, edit_last(exported.model, "remove"))
    without = edited(exported.model, lambda layer: layer.remove_tile(2))
    assert_same(removed, without)
    assert_same(removed, without, use_library=False)
    operate_on_file(removed, back, edit_last(exported.model, "insert"))
    assert_same(back, edited(without, lambda layer: layer.insert_signature(2, SIGNATURE_D)))
    assert [entry["operation"] for entry in read_model(back)[3][-1].history] == ["remove", "insert"]


def test_only_the_metadata_changes_when_a_signature_is_frozen(plain: Exported, tmp_path: Path) -> None:
    frozen, learning = tmp_path / "frozen.onnx", tmp_path / "learning.onnx"
    operate_on_file(plain.path, frozen, Edit("freeze", 0, 1, "keep"))
    operate_on_file(frozen, learning, Edit("unfreeze", 0, 1, "go"))
    assert read_model(frozen)[3][0].frozen == [1]
    assert read_model(learning)[3][0].frozen == []
    assert onnx.load(learning).graph == onnx.load(plain.path).graph
    assert "with its own answers when it was written" in str(ExportedModel(frozen).check_parity())
    assert "with torch" in str(ExportedModel(plain.path).check_parity())


def test_a_checkpoints_history_and_flags_travel_into_the_file(tmp_path: Path) -> None:
    model = exported_models.make_model(FFNConfig(num_tiles=4))
    layer = routed_layers(model)[0]
    layer.insert_signature(1, SIGNATURE_D, tag="first")
    layer.remove_tile(3)
    held_out = torch.randint(0, len(VOCABULARY), (4 * CONTEXT,))
    exported_models.export_language_model(model, VOCABULARY, held_out, tmp_path / "m.onnx")
    _, _, layers, records = read_model(tmp_path / "m.onnx")
    assert records[0].history == layer.get_surgery_history()
    assert (records[0].frozen, records[0].source, records[0].kind) == ([1], "explicit", "TriXFFN")
    assert layers[0].is_free_E.tolist() == [False, False, False, True]
    np.testing.assert_array_equal(layers[0].signature_ED, layer.get_tile_signatures().numpy())
    with pytest.raises(ValueError, match=r"the signature of tile_idx \(1\) must not be frozen"):
        operate_on_file(tmp_path / "m.onnx", tmp_path / "n.onnx", Edit("remove", 0, 1, ""))
    with pytest.raises(ValueError, match=r"tile_idx \(3\) must be a tile in use, not a free slot"):
        operate_on_file(tmp_path / "m.onnx", tmp_path / "n.onnx", Edit("remove", 0, 3, ""))


def test_constants_that_layers_share_are_changed_for_one_alone(tmp_path: Path) -> None:
    model = exported_models.make_model(FFNConfig(num_tiles=4), num_layers=2)
    first, second = routed_layers(model)
    second.router.load_state_dict(first.router.state_dict() | {"balance_bias": second.router.balance_bias})
    held_out = torch.randint(0, len(VOCABULARY), (4 * CONTEXT,))
    path, output = tmp_path / "m.onnx", tmp_path / "new.onnx"
    exported_models.export_language_model(model, VOCABULARY, held_out, path)
    assert len({nodes.node.input[1] for nodes in signature_nodes(onnx.load(path).graph)}) == 1
    operate_on_file(path, output, edit_last(model, "insert"))
    assert_same(output, edited(model, lambda layer: layer.insert_signature(2, SIGNATURE_D)))
    np.testing.assert_array_equal(read_model(output)[2][0].signature_ED, read_model(path)[2][0].signature_ED)


MISTAKES = [
    (Edit("freeze", 2, 0, ""), r"layer \(2\) must be >= 0 and < number of routed layers \(2\)"),
    (Edit("freeze", 0, 4, ""), r"tile_idx \(4\) must be >= 0 and < num_tiles \(4\)"),
    (Edit("unfreeze", 0, 1, ""), r"nothing to unfreeze: tile \(1\) of layer \(0\) is not frozen"),
    (Edit("insert", 0, 1, "", np.ones(3)), r"signature \(3,\) must have shape \(20,\)"),
    (Edit("insert", 0, 1, "", np.full(20, 0.5)), r"signature\[0\] \(0.5\) must be -1, 0 or 1"),
]


@pytest.mark.parametrize(("edit", "message"), MISTAKES)
def test_a_mistake_leaves_no_file(edit: Edit, message: str, plain: Exported, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        operate_on_file(plain.path, tmp_path / "new.onnx", edit)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_keeps_as_many_tiles_as_a_token_goes_to(plain: Exported, tmp_path: Path) -> None:
    path = plain.path
    for tile in range(3):
        path, before = tmp_path / f"{tile}.onnx", path
        operate_on_file(before, path, Edit("remove", 0, tile, ""))
    with pytest.raises(ValueError, match=r"tiles in use and in reach after it \(0\) must be >= top_k \(1\)"):
        operate_on_file(path, tmp_path / "none.onnx", Edit("remove", 0, 3, ""))


@pytest.mark.parametrize("part", ["signature", "bias", "constant"])
def test_what_does_not_verify_is_not_written(
    part: str, plain: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_constant = SignatureLayer._set_constant

    def set_wrongly(self: SignatureLayer, of_input: str, value: np.ndarray) -> None:
        if (part, of_input) == ("signature", "signatures"):
            value = to_panels(np.roll(self.signature_ED, 1, axis=0))
        elif (part, of_input) == ("bias", "bias"):
            value = np.roll(value, 1)
        elif (part, of_input) == ("constant", "signatures"):
            self._graph.initializer[0].raw_data = self._graph.initializer[0].raw_data[::-1]
        set_constant(self, of_input, value)

    monkeypatch.setattr(SignatureLayer, "_set_constant", set_wrongly)
    with pytest.raises(VerificationError, match="; no file is written"):
        operate_on_file(plain.path, tmp_path / "new.onnx", edit_last(plain.model, "insert"))
    assert list(tmp_path.iterdir()) == []


def test_without_layers_routed_by_signatures_there_is_nothing_to_edit(tmp_path: Path) -> None:
    exported = exported_models.export(tmp_path, FFNConfig(num_tiles=4, routing="learned"))
    with pytest.raises(ValueError, match=r"layers routed by signatures in the file \(0\) must be >= 1"):
        operate_on_file(exported.path, tmp_path / "new.onnx", Edit("freeze", 0, 0, ""))


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = exported_models.make_model(FFNConfig(num_tiles=4), num_layers=2)
    with torch.no_grad():
        model.stack.blocks[1].ffn.tiles.up.weight[0, 0, 0] = float("nan")
        model.stack.blocks[1].ffn.tiles.up.weight[0, 0, 1] = float("inf")
    tokens = torch.zeros(CONTEXT, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"weight stack.blocks.1.feed_forward.inner.tiles.up.weight must be finite: .* 1 are NaN, 1 infinite"
    ):
        exported_models.export_language_model(model, VOCABULARY, tokens, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
