"""Small exported models that several tests share; each is exported once in a process."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ort_ops.export import ExportReport, export_language_model
from trix.nn import FFNConfig, LanguageModel, LanguageModelConfig

VOCABULARY = "abcdefghijk"
CONTEXT = 12
TOP2 = FFNConfig(num_tiles=5, d_ff=5 * 9, top_k=2)


@dataclass(frozen=True)
class Exported:
    model: LanguageModel
    held_out: torch.Tensor
    path: Path
    report: ExportReport


def make_model(ffn: FFNConfig, num_layers: int = 1) -> LanguageModel:
    torch.manual_seed(0)
    config = LanguageModelConfig(20, num_layers, 2, CONTEXT, ternary_attention=True, dropout=0.0, ffn=ffn)
    model = LanguageModel(len(VOCABULARY), config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # far from initialisation: logits and gates are of all sizes
    for block in model.stack.blocks:
        if hasattr(block.ffn, "router"):
            torch.nn.init.normal_(block.ffn.router.balance_bias, std=0.1)
    return model


_WRITTEN: dict[tuple[str, int, bool], tuple[bytes, ExportReport]] = {}  # by layers and fallback: an export takes seconds


def export(folder: Path, ffn: FFNConfig, num_layers: int = 1, *, fallback: bool = True) -> Exported:
    """Export `make_model(ffn, num_layers)`. Each further layer adds half to the time: two only where the test needs two."""
    model = make_model(ffn, num_layers)
    held_out = torch.randint(0, len(VOCABULARY), (20 * CONTEXT,))
    path, key = folder / "model.onnx", (repr(ffn), num_layers, fallback)
    if key not in _WRITTEN:
        report = export_language_model(model, VOCABULARY, held_out, path, fallback)
        _WRITTEN[key] = path.read_bytes(), report
    content, report = _WRITTEN[key]
    path.write_bytes(content)
    return Exported(model, held_out, path, report)
