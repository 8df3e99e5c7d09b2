"""The exported file: put together from a traced graph and its record, verified against torch, and only then given its name."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from torch import nn

from ort_ops.external_data import data_path, remove_old_data
from ort_ops.external_weights import data_digest, has_large_weights, move_out, set_location, weight_bytes
from ort_ops.file_format import SINGLE_FILE_BYTES, Activations, FileRecord, LayerRecord, describe_size
from ort_ops.graph import missing_functions, set_activations
from ort_ops.parity import Drift, OutputDrift, OutputParity, Parity
from ort_ops.signature_layers import signature_nodes
from ort_ops.tracing import Traced
from ort_ops.verification import Expectation, ExportError, open_session
from trix.nn import RoutedLayer, SparseLookupFFN, TernaryWeight
from trix.routing import SignatureRouter
from trix.whole_file import whole_file, whole_files


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it compares with torch on held-out input.

    parity: on whole sequences, activations at 24 bits; of somebody's own module, on the example inputs and at other sizes of
    their dynamic axes. used_library: the check ran the native kernels, not the portable functions. float32_bytes: the
    parameters at 4 bytes each. stepwise_parity: the comparison where a language model reads half a sequence, then
    token by token. drift: what activations of 8 bits change, where the file has them. outputs: their names in the file.
    data_file, data_bytes: name and size of its external data, which file_bytes counts too. other_sizes: of somebody's own
    module, the sizes of the inputs, besides those of the examples, that parity was checked at; None where the inputs have no
    axes whose sizes may change.
    """

    parity: Parity | OutputParity
    used_library: bool
    file_bytes: int
    float32_bytes: int
    stepwise_parity: Parity | None = None
    drift: Drift | OutputDrift | None = None
    outputs: tuple[str, ...] = ()
    data_file: str | None = None
    data_bytes: int = 0
    other_sizes: tuple[str, ...] | None = None

    def __str__(self) -> str:
        kernels = "native kernels" if self.used_library else "portable functions, the native library was not found"
        lines = [f"size    {describe_size(self.file_bytes, self.float32_bytes)}", f"parity  {self.parity} ({kernels})"]
        if self.data_file is not None:
            lines.insert(1, f"data    {self.data_bytes / 1e6:.2f} MB of it in {self.data_file}, which belongs next to the file")
        if self.other_sizes is not None:
            sizes = (
                f"also checked at {'; '.join(self.other_sizes)}" if self.other_sizes else "the module refused all others tried"
            )
            lines.append(f"sizes   {sizes}")
        if self.stepwise_parity is not None:
            lines.append(f"stepwise {self.stepwise_parity}")
        if self.drift is not None:
            lines.append(f"8 bits  {self.drift}")
        return "\n".join(lines)


class OutputFile(NamedTuple):
    """Where the file goes, and what it has besides the graph."""

    path: Path
    fallback: bool
    activations: Activations
    external_data: bool


def check_output(file: OutputFile) -> None:
    """Raises ExportError where no file can be written."""
    if not file.path.parent.is_dir():
        raise ExportError(f"the folder of the output ({file.path.parent}) must exist")
    if file.path.is_dir():
        raise ExportError(f"the output ({file.path}) must be a file, it is a folder")


def write_file(model: nn.Module, traced: Traced, expected: Expectation, file: OutputFile, **about: Any) -> ExportReport:
    """Write the file and verify it; what about says of it becomes its FileRecord."""
    proto = traced.proto
    if file.fallback:
        proto.functions.extend(missing_functions(proto))
    record = FileRecord(
        float32_bytes=_num_parameters(model) * 4,
        activations=file.activations,
        reference=expected.reference(),
        layers=_layer_records(proto.graph, traced.wrapped),
        **about,
    )
    target = file.path.resolve()  # a link stays, the file that it names is replaced
    wants_data = file.external_data or weight_bytes(proto) > SINGLE_FILE_BYTES
    if wants_data and has_large_weights(proto):
        report = _write_pair(proto, record, expected, target)
    else:
        with whole_file(target) as partial:
            report = _write_verified(proto, record, expected, partial)
    remove_old_data(target)
    return report


def _num_parameters(model: nn.Module) -> int:
    """Parameters of the model with all weights in their float form."""
    packed = [module for module in model.modules() if isinstance(module, TernaryWeight) and module.is_packed]
    return sum(parameter.numel() for parameter in model.parameters()) + sum(weight.shape.numel() for weight in packed)


def _write_pair(proto: onnx.ModelProto, record: FileRecord, expected: Expectation, target: Path) -> ExportReport:
    data = data_path(target, data_digest(proto, target.parent))
    with whole_files(data, target) as (partial_data, partial):
        move_out(proto, partial_data, target.parent)
        report = _write_verified(proto, record, expected, partial)
        set_location(proto, data.name)
        _save(proto, record, partial)
        data_bytes = partial_data.stat().st_size
        return replace(report, file_bytes=partial.stat().st_size + data_bytes, data_file=data.name, data_bytes=data_bytes)


def _write_verified(proto: onnx.ModelProto, record: FileRecord, expected: Expectation, path: Path) -> ExportReport:
    _save(proto, record, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
        session, used_library = open_session(path)
    except Exception as error:  # of onnx and onnxruntime, which share no base class
        raise ExportError(f"onnxruntime can't load the file: {' '.join(str(error).split())}") from error
    parity = expected.parity(session)
    record.export_parity = asdict(parity) | {"used_library": used_library}
    report = ExportReport(parity, used_library, 0, record.float32_bytes, expected.stepwise_parity(session))
    if record.activations.bits != Activations().bits:
        set_activations(proto.graph, record.activations)
        _save(proto, record, path)
        session, _ = open_session(path)
        found = expected.drift(session)
        report = replace(report, drift=found)
        # Its answers are no longer torch's: wherever the file goes, it is compared with what it answered here.
        record.reference, record.drift = expected.reference(session), asdict(found)
    _save(proto, record, path)
    outputs = tuple(value.name for value in proto.graph.output)
    return replace(report, file_bytes=path.stat().st_size, outputs=outputs)


def _layer_records(graph: onnx.GraphProto, wrapped: nn.Module) -> list[LayerRecord]:
    """One per node that routes by signatures, in order; told by the name of its signatures."""
    layers = {
        f"{name}.router.packed_signatures": (module, module.router)
        for name, module in wrapped.named_modules(remove_duplicate=False)
        if isinstance(module, RoutedLayer) and isinstance(module.router, SignatureRouter)
    }
    sources = [set(layers).intersection(nodes.constants) for nodes in signature_nodes(graph)]
    return [_layer_record(*layers[source.pop()]) if source else LayerRecord() for source in sources]


def _layer_record(layer: RoutedLayer, router: SignatureRouter) -> LayerRecord:
    claims = layer.claims.count_EC if isinstance(layer, SparseLookupFFN) and layer.claims.count_EC.any() else None
    return LayerRecord(
        kind=type(layer).__name__,
        source=router.source,
        step=int(layer.surgery_log.step),
        frozen=router.is_frozen_E.nonzero().flatten().tolist(),
        history=layer.get_surgery_history(),
        claims=None if claims is None else claims.tolist(),
        d_model=layer.d_model,
    )


def _save(proto: onnx.ModelProto, record: FileRecord, path: Path) -> None:
    onnx.helper.set_model_props(proto, record.to_properties())
    path.write_bytes(proto.SerializeToString())
