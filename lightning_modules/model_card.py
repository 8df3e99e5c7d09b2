"""The card of a model: a README.md in Markdown, with the front matter that the Hugging Face Hub reads."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules.tasks.task import TrixTask
    from ort_ops.export import ExportReport
    from trix.nn import RoutedLayer

MAX_OPERATIONS = 50  # of a layer's surgery history
LANGUAGE_MODEL = "language_model"
_FRONT = "---\nlibrary_name: trix\ntags: [ternary, mixture-of-experts, onnx]\nPIPELINE---"
_LIMITS = """The figures come from the validation data of the training, which also chose the checkpoint where the best one is
kept. Nothing else was measured. The weights can be used and read, but no training goes on from them: the state of the
optimizer stays in the checkpoint."""
_USE = """```python
from lightning_modules.tasks import load_pretrained

task = load_pretrained("FOLDER")  # or the name of a repository of the Hub
```

`model.onnx` is the same network with ternary weights of 2 bits. It runs in onnxruntime, and faster with the operators of the
`trix` package than with the portable definition of them that the file may carry."""
_GENERATE = """

```bash
trix generate FOLDER/model.onnx --prompt "The "
```"""


def model_card(
    name: str, task: "TrixTask", checkpoint: Mapping[str, Any], facts: Mapping[str, str], report: "ExportReport"
) -> str:
    """What the network is, what it learned from and how well, what was done to its tiles, how exact the file is, its limits.

    Args:
        name: title of the card. checkpoint: its content, see ``load_checkpoint``. facts: what is known of the training and its
            data. report: of the export.
    """
    from trix.nn import routed_layers

    layers, kind = routed_layers(task.network), task.task_name.replace("_", " ")
    is_language_model = task.task_name == LANGUAGE_MODEL
    training = {
        "steps": f"{checkpoint['global_step']:,}",
        "parameters": f"{sum(parameter.numel() for parameter in task.network.parameters()):,}",
        "tiles in each layer": ", ".join(str(layer.num_tiles) for layer in layers) or "none",
        **facts,
    }
    metrics = {metric: f"{value:.4g}" for metric, value in last_metrics(checkpoint).items()}
    sections = [
        _FRONT.replace("PIPELINE", "pipeline_tag: text-generation\n" if is_language_model else ""),
        f"# {_plain(name)}",
        f"A {kind} of TriX: sparse layers, whose ternary tiles are chosen by signatures that can be read and edited."
        if layers
        else f"A {kind} of TriX.",
        _USE + (_GENERATE if is_language_model else ""),
        f"## Training\n\n{_table(training)}",
        f"## Validation\n\n{_table(metrics) if metrics else 'The checkpoint was written before the first validation.'}",
        f"## What was done to signatures and tiles\n\n{_surgery(layers)}",
        f"## The ONNX file against torch\n\n```\n{report}\n```",
        f"## Limits\n\n{_LIMITS}",
        f"Written by trix {version('trix')} on {datetime.now(UTC):%Y-%m-%d}.",
    ]
    return "\n\n".join(sections) + "\n"


def last_metrics(checkpoint: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of the last validation before a checkpoint was written, which RunNotebook keeps; {} where there are none."""
    states = checkpoint.get("callbacks", {})
    found = states.get("RunNotebook", {}).get("last", {}) if isinstance(states, Mapping) else {}
    return {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, float)}


def _surgery(layers: "Sequence[RoutedLayer]") -> str:
    lines = []
    for index, layer in enumerate(layers):
        history = layer.get_surgery_history()
        for entry in history[:MAX_OPERATIONS]:
            tile = f"tile {entry['tile_idx']}" if entry["tile_idx"] >= 0 else "all tiles"
            tag = f" ({_plain(entry['tag'])})" if entry["tag"] else ""
            lines.append(f"- layer {index}, {tile}: {_plain(entry['operation'])} after {entry['step']:,} batches{tag}")
        if len(history) > MAX_OPERATIONS:
            lines.append(f"- layer {index}: {len(history) - MAX_OPERATIONS} more")
    return "\n".join(lines) or "Nothing."


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_plain(name)} | {_plain(value)} |" for name, value in rows.items())])


def _plain(text: str) -> str:
    """The text on one line, with nothing in it that Markdown or HTML reads as more than text."""
    joined = " ".join(text.split())
    return "".join(f"\\{character}" if character in "\\`*_{}[]<>#|!~$&" else character for character in joined)
