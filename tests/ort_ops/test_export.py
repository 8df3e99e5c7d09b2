from pathlib import Path
from typing import Any

import exported_models
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from exported_models import TOP2

from ort_ops import file_format, schema
from ort_ops.export import ExportError, export_classifier, export_language_model
from ort_ops.file_format import Activations
from ort_ops.library import session_options
from ort_ops.runtime import ExportedModel
from ort_ops.signature_layers import read_model
from ort_ops.state import empty_state
from ort_ops.surgery import Edit, operate_on_file
from trix.evolution import merge_tiles, raise_k, split_tile
from trix.nn import Classifier, ClassifierConfig, FFNConfig, LanguageModel, LanguageModelConfig, RotaryAttention

pytestmark = pytest.mark.usefixtures("native_library")
rotate = RotaryAttention._rotate
LOOKUPS = [
    FFNConfig(kind="sparse_lookup", num_tiles=8, top_k=2),
    FFNConfig(kind="sparse_lookup_v2", num_tiles=8, top_k=3, route_on="embedding"),
]


def export_anew(folder: Path) -> None:
    """Export TOP2 without the stored copy: what the test has spoiled must take part."""
    tokens = torch.randint(0, len(exported_models.VOCABULARY), (20 * exported_models.CONTEXT,))
    export_language_model(exported_models.make_model(TOP2), exported_models.VOCABULARY, tokens, folder / "model.onnx")


def make_classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(6, 3, ClassifierConfig(16, 2, 2, 5, ffn=FFNConfig(num_tiles=4))).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> exported_models.Exported:
    return exported_models.export(tmp_path_factory.mktemp("export"), TOP2, num_layers=2)


@pytest.mark.parametrize(
    "ffn",
    [
        FFNConfig(num_tiles=4),
        FFNConfig(num_tiles=4, top_k=2, routing="emergent"),
        FFNConfig(num_tiles=4, routing="learned"),
        FFNConfig(num_tiles=4, route_on="hidden"),
        FFNConfig(num_tiles=6, max_k=3, confidence_threshold=1.0),
        FFNConfig(kind="hierarchical", num_tiles=9, top_k=2),
        *LOOKUPS,
        FFNConfig(kind="dense"),
        FFNConfig(kind="none"),
    ],
    ids=lambda ffn: f"{ffn.kind}-{ffn.routing}-{ffn.route_on}-{ffn.max_k}",
)
def test_every_kind_of_layer_exports_within_float_rounding(ffn: FFNConfig, tmp_path: Path) -> None:
    report = exported_models.export(tmp_path, ffn).report
    assert report.used_library
    assert report.parity.max_relative_difference < 1e-5
    assert report.parity.num_unexplained == 0
    assert report.stepwise_parity.max_relative_difference < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    if ffn.kind in ("trix", "hierarchical") and ffn.routing != "learned":
        assert_that_nothing_stands_between_routing_and_tiles(onnx.load(tmp_path / "model.onnx").graph)


@pytest.mark.parametrize("route_on", ["hidden", "context"])
def test_tiles_of_weight_one_export(route_on: Any, tmp_path: Path) -> None:
    ffn = FFNConfig(num_tiles=5, top_k=2, route_on=route_on, signatures="learned", routing_args={"gate": "ones"})
    report = exported_models.export(tmp_path, ffn, num_layers=2).report
    assert report.parity.num_unexplained == 0
    for use_library in (True, False):
        assert ExportedModel(tmp_path / "model.onnx", use_library).check_parity().max_relative_difference < 1e-5


def assert_that_nothing_stands_between_routing_and_tiles(graph: onnx.GraphProto) -> None:
    by_output = {name: node for node in graph.node for name in node.output}
    layers = [node for node in graph.node if node.op_type == "TernaryFFN"]
    assert len(layers) == 1
    for layer in layers:
        route = by_output[layer.input[1]]
        assert route.op_type == "SignatureRoute"
        assert list(route.output) == [*layer.input[1:3], ""]  # nobody reads the scores
    operators = [node.op_type for node in graph.node]
    assert not {"GatherElements", "GatherND", "Sigmoid", "ReduceMax", "TopK"} & set(operators)
    assert operators.count("Softmax") == 1  # that of attention


def test_layers_whose_tiles_were_merged_and_split_export_as_they_are(tmp_path: Path) -> None:
    model = exported_models.make_model(FFNConfig(num_tiles=5, top_k=1), num_layers=2)
    first, second = (block.ffn for block in model.stack.blocks)
    merge_tiles(first, 0, 1)
    merge_tiles(second, 2, 3)
    split_tile(second, 4, 3)
    raise_k(second)
    raise_k(first)
    held_out = torch.randint(0, len(exported_models.VOCABULARY), (20 * exported_models.CONTEXT,))
    report = export_language_model(model, exported_models.VOCABULARY, held_out, tmp_path / "model.onnx")
    assert report.parity.max_relative_difference < 1e-5
    assert report.parity.num_unexplained == 0
    session = ort.InferenceSession(tmp_path / "model.onnx", session_options())
    token = held_out.reshape(-1, exported_models.CONTEXT)
    tile_idx = session.run(["tile_idx"], {"token": token.numpy(), **empty_state(session, len(token))})[0]
    assert tile_idx.shape[-1] == 2
    assert not (tile_idx[:, :, 0] == 1).any()


def test_logits_and_tiles_match_torch_at_other_batch_sizes_and_lengths(exported: exported_models.Exported) -> None:
    session = ort.InferenceSession(exported.path, session_options())
    for shape in [(1, 1), (3, 7), (5, exported_models.CONTEXT)]:
        token = torch.randint(0, len(exported_models.VOCABULARY), shape)
        logits, tile_idx = session.run(["logits", "tile_idx"], {"token": token.numpy(), **empty_state(session, len(token))})
        expected, infos, _ = exported.model(token, return_routing=True)
        np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=1e-4, atol=1e-4)
        assert np.array_equal(tile_idx, torch.stack([info["tile_idx"] for info in infos], dim=2).numpy())


def test_the_model_given_is_left_as_it_was(tmp_path: Path) -> None:
    model = exported_models.make_model(TOP2, num_layers=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_language_model(model, exported_models.VOCABULARY, torch.zeros(24, dtype=torch.int64), tmp_path / "m.onnx")
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_in_float64_are_rounded(tmp_path: Path) -> None:
    model = exported_models.make_model(TOP2, num_layers=2)
    held_out = torch.randint(0, 11, (60,))
    rounded = export_language_model(model, exported_models.VOCABULARY, held_out, tmp_path / "single.onnx")
    report = export_language_model(model.double(), exported_models.VOCABULARY, held_out, tmp_path / "double.onnx")
    assert report == rounded
    assert (tmp_path / "double.onnx").read_bytes() == (tmp_path / "single.onnx").read_bytes()
    assert model.head.weight.dtype == torch.float64
    features = torch.randn(8, 5, 6, dtype=torch.float64)
    classifier = make_classifier().double()
    report = export_classifier(classifier, ["a", "b", "c"], features, tmp_path / "classifier.onnx")
    assert report.parity.max_relative_difference < 1e-5


def test_weights_are_packed_and_operators_are_ours(exported: exported_models.Exported) -> None:
    proto = onnx.load(exported.path)
    ours = [node.op_type for node in proto.graph.node if node.domain == schema.DOMAIN]
    assert sorted(set(ours)) == ["SignatureRoute", "TernaryFFN", "TernaryTileMatMul"]
    assert ours.count("SignatureRoute") == 1  # all layers read the same embedding
    packed = [i for i in proto.graph.initializer if i.data_type == onnx.TensorProto.UINT8]
    assert len(packed) == 2 * (2 + 1 + 2)  # per layer: up, down, signatures, attention in and out
    largest_float = max(np.prod(i.dims) for i in proto.graph.initializer if i.data_type == onnx.TensorProto.FLOAT)
    assert largest_float <= len(exported_models.VOCABULARY) * 20  # the embedding; no float matrix of a tile


def test_the_mass_of_a_merged_tile_is_in_the_file_and_an_insertion_clears_it(tmp_path: Path) -> None:
    model = exported_models.make_model(FFNConfig(num_tiles=5))
    layer = model.stack.blocks[0].ffn
    merge_tiles(layer, 2, 3)
    held_out = torch.randint(0, len(exported_models.VOCABULARY), (20 * exported_models.CONTEXT,))
    export_language_model(model, exported_models.VOCABULARY, held_out, tmp_path / "m.onnx")
    found = read_model(tmp_path / "m.onnx")[2][0]
    np.testing.assert_array_equal(found.log_mass_E, layer.router.log_mass_E.numpy())
    assert found.log_mass_E[2] != 0
    assert found.is_free_E.tolist() == [False, False, False, True, False]
    signature_D = np.array([1, 0, -1, 0, 1] * 4)
    operate_on_file(tmp_path / "m.onnx", tmp_path / "new.onnx", Edit("insert", 0, 2, "", signature_D))
    layer.insert_signature(2, torch.from_numpy(signature_D))
    token = held_out.reshape(-1, exported_models.CONTEXT)
    with torch.no_grad():
        expected = model(token).numpy()
    np.testing.assert_allclose(ExportedModel(tmp_path / "new.onnx").run(token.numpy())[0], expected, rtol=1e-3, atol=1e-3)


def test_a_lookup_with_a_free_slot_takes_an_insertion(tmp_path: Path) -> None:
    model = exported_models.make_model(FFNConfig(kind="sparse_lookup_v2", num_tiles=4))
    layer = model.stack.blocks[0].ffn
    layer.remove_tile(1)
    held_out = torch.randint(0, len(exported_models.VOCABULARY), (20 * exported_models.CONTEXT,))
    export_language_model(model, exported_models.VOCABULARY, held_out, tmp_path / "m.onnx")
    signature_D = np.array([1, 0, -1, 0, 1] * 4)
    operate_on_file(tmp_path / "m.onnx", tmp_path / "new.onnx", Edit("insert", 0, 1, "", signature_D))
    layer.insert_signature(1, torch.from_numpy(signature_D))
    token = held_out.reshape(-1, exported_models.CONTEXT)
    with torch.no_grad():
        expected, infos, _ = model(token, return_routing=True)
    assert (infos[0]["tile_idx"] == 1).any()
    found = ExportedModel(tmp_path / "new.onnx").run(token.numpy())[0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ffn", LOOKUPS, ids=lambda ffn: ffn.kind)
def test_a_sparse_lookup_layer_is_one_node(ffn: FFNConfig, tmp_path: Path) -> None:
    exported = exported_models.export(tmp_path, ffn)
    proto = onnx.load(exported.path)
    ours = [node.op_type for node in proto.graph.node if node.domain == schema.DOMAIN]
    assert (ours.count("SignatureRoute"), ours.count("SparseLookup")) == (0, 1)
    token = exported.held_out.reshape(-1, exported_models.CONTEXT).numpy()
    sessions = [ort.InferenceSession(exported.path, options) for options in (session_options(), ort.SessionOptions())]
    native, portable = (session.run(None, {"token": token, **empty_state(session, len(token))}) for session in sessions)
    np.testing.assert_allclose(portable[0], native[0], rtol=0, atol=1e-5 * np.abs(native[0]).max())
    np.testing.assert_array_equal(portable[1], native[1])


def test_the_file_says_what_it_is_and_no_path_of_this_machine(exported: exported_models.Exported) -> None:
    proto = onnx.load(exported.path)
    metadata = file_format.from_properties({p.key: p.value for p in proto.metadata_props})
    assert metadata["vocabulary"] == exported_models.VOCABULARY
    assert metadata["config"]["ffn"]["top_k"] == 2
    assert metadata["export_parity"]["num_tokens"] == 240
    assert str(Path(torch.__file__).parent).encode() not in exported.path.read_bytes()


@pytest.mark.parametrize("group_size", [128, 0])
def test_activations_of_8_bits_drift_little_and_are_told(tmp_path: Path, group_size: int) -> None:
    model = exported_models.make_model(TOP2, num_layers=2)
    held_out = torch.randint(0, len(exported_models.VOCABULARY), (20 * exported_models.CONTEXT,))
    path, activations = tmp_path / "m.onnx", Activations(8, group_size)
    report = export_language_model(model, exported_models.VOCABULARY, held_out, path, activations=activations)
    assert report.parity.max_relative_difference < 1e-5  # of the same graph at 24 bits
    assert 1e-4 < report.drift.relative_rms_difference < 0.2
    assert report.drift.top_agreement > 0.8
    assert "8 bits  against torch: relative RMS difference of the logits " in str(report)
    nodes = [node for node in onnx.load(path).graph.node if node.op_type in ("TernaryTileMatMul", "TernaryFFN")]
    values = [{attribute.name: attribute.i for attribute in node.attribute} for node in nodes]
    expected = {"activation_bits": 8, "group_size": group_size, "min_magnitude": 0}
    assert values == [expected] * 2 * 3  # a layer: attention in and out, tiles
    exported = ExportedModel(path)
    assert exported.metadata["activations"] == {"bits": 8, "group_size": group_size}
    assert exported.metadata["drift"]["relative_rms_difference"] == report.drift.relative_rms_difference
    parity = exported.check_parity()
    assert parity.max_relative_difference < 1e-5
    assert "with its own answers when it was written" in str(parity)
    assert ExportedModel(path, use_library=False).check_parity().max_relative_difference < 0.2


@pytest.mark.usefixtures("traced_anew")
def test_a_graph_that_forgets_what_was_before_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RotaryAttention, "_rotate", lambda self, x, start: rotate(self, x, 0 * start))
    how = r"read token by token \(the mixers' state\)"
    with pytest.raises(ExportError, match=rf"^{how}: max relative difference to torch \(.*\) must be < 1e-04"):
        export_anew(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_projections_of_a_size_that_torch_leaves_unfolded_export(tmp_path: Path) -> None:
    config = LanguageModelConfig(128, 1, 2, 8, True, 0.0, FFNConfig(num_tiles=2))
    tokens = torch.randint(0, 11, (16,))
    report = export_language_model(LanguageModel(11, config), exported_models.VOCABULARY, tokens, tmp_path / "m.onnx")
    assert report.parity.max_relative_difference < 1e-5
    assert report.file_bytes < report.float32_bytes / 5


def test_without_fallback_the_file_needs_the_library(tmp_path: Path) -> None:
    path = exported_models.export(tmp_path, TOP2, num_layers=2, fallback=False).path
    assert not onnx.load(path).functions
    with pytest.raises(Exception, match="is not a registered function/op"):
        ort.InferenceSession(path)


def test_classifier_exports(tmp_path: Path) -> None:
    model = make_classifier()
    held_out = torch.randn(40, 5, 6)
    path = tmp_path / "classifier.onnx"
    report = export_classifier(model, ["a", "b", "c"], held_out, path)
    assert report.parity.num_tokens == 200
    logits, tile_idx = ExportedModel(path).run(held_out[:7].numpy())
    np.testing.assert_allclose(logits, model(held_out[:7]).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert tile_idx is not None
    assert tile_idx.shape == (7, 5, 2, 1)
    with pytest.raises(ExportError, match=r"class_names \(2\) must name each of the 3 classes"):
        export_classifier(model, ["a", "b"], held_out, path)


@pytest.mark.parametrize("ffn", [FFNConfig(num_tiles=4), FFNConfig(kind="dense")], ids=["trix", "dense"])
def test_a_classifier_of_characters_exports_with_its_padding(ffn: FFNConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vocabulary = "\0?abcdefgh"
    model = Classifier(None, 3, ClassifierConfig(16, 1, 2, 6, window=3, ffn=ffn), len(vocabulary)).eval()
    held_out = torch.randint(1, 10, (40, 6)) * (torch.arange(6) < torch.randint(1, 7, (40, 1)))
    path = tmp_path / "classifier.onnx"
    export_classifier(model, ["a", "b", "c"], held_out, path, vocabulary=vocabulary)
    exported = ExportedModel(path)
    assert exported.metadata["vocabulary"] == vocabulary
    assert exported.check_parity().num_unexplained == 0
    for token in (held_out[:7], held_out[:1, :4]):
        np.testing.assert_allclose(exported.run(token.numpy())[0], model(token).detach().numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ExportError, match=r"vocabulary \(none\) must have vocab_size \(10\) characters"):
        export_classifier(model, ["a", "b", "c"], held_out, path)


@pytest.mark.parametrize(
    ("vocabulary", "ffn"),
    [(None, {}), (None, {"signatures": "drawn", "context_tokens": 3}), ("\0?abcdefgh", {})],
    ids=["features", "features, as drawn", "ids"],
)
def test_a_classifier_that_routes_on_context_goes_to_the_same_tiles_in_any_batch(
    vocabulary: str | None, ffn: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = ClassifierConfig(32, 2, 2, 6, ffn=FFNConfig(num_tiles=8, route_on="context", **ffn))
    if vocabulary is None:
        model = Classifier(5, 3, config)
        held_out = torch.rand(40, 6, 5)
        model(held_out)  # its mean is then theirs
    else:
        model = Classifier(None, 3, config, len(vocabulary))
        held_out = torch.randint(1, 10, (40, 6)) * (torch.arange(6) >= torch.randint(0, 3, (40, 1)))
    path = tmp_path / "classifier.onnx"
    report = export_classifier(model.eval(), ["a", "b", "c"], held_out, path, vocabulary=vocabulary)
    assert report.parity.num_unexplained == 0
    for use_library in (True, False):
        exported = ExportedModel(path, use_library)
        for part in (held_out, held_out[:1]):
            logits, tile_idx = exported.run(part.numpy())
            expected, infos, _ = model(part, return_routing=True)
            np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=1e-4, atol=1e-5)
            assert np.array_equal(tile_idx, torch.stack([info["tile_idx"] for info in infos], dim=2).numpy())


def test_a_model_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(packed: torch.nn.Module) -> torch.nn.Module:
        packed.stack.blocks[0].ffn.tiles.up.row_scale.mul_(1.01)  # type: ignore[union-attr, operator]
        return packed

    from trix.nn import pack_model

    monkeypatch.setattr("ort_ops.export.pack_model", lambda model: spoiled(pack_model(model)))
    with pytest.raises(ExportError, match=r"max relative difference to torch \(.*\) must be < 1e-04"):
        export_anew(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_errors_state_the_rule_and_both_values(tmp_path: Path) -> None:
    model = exported_models.make_model(TOP2)
    token = torch.zeros(24, dtype=torch.int64)
    with pytest.raises(ExportError, match=r"vocabulary \(2 characters\) must have vocab_size \(11\) characters"):
        export_language_model(model, "ab", token, tmp_path / "m.onnx")
    for values, message in (((16, 128), r"bits .*\(16\) must be 24 or 8"), ((8, 32), r"group_size .*\(32\) must be 128 or 0")):
        with pytest.raises(ValueError, match=message):
            Activations(*values)
    short = LanguageModel(11, LanguageModelConfig(16, 1, 2, 3))
    with pytest.raises(ExportError, match=r"context_length \(3\) must be >= 4 to be exported"):
        export_language_model(short, exported_models.VOCABULARY, token, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"held-out text \(1 tokens\) must have at least 2 tokens"):
        export_language_model(model, exported_models.VOCABULARY, token[:1], tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"held_out_tokens \(torch.int32, 1 axes\) must be int64 with one axis"):
        export_language_model(model, exported_models.VOCABULARY, token.int(), tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"the folder of the output \(.*missing\) must exist"):
        export_language_model(model, exported_models.VOCABULARY, token, tmp_path / "missing" / "m.onnx")
    with pytest.raises(ExportError, match=r"vocabulary \(11 characters, 1 different\) must hold each once"):
        export_language_model(model, "a" * 11, token, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"the output \(.*\) must be a file, it is a folder"):
        export_language_model(model, exported_models.VOCABULARY, token, tmp_path)
    assert list(tmp_path.iterdir()) == []
