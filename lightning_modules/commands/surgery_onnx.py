"""``trix surgery model.onnx``: the same edits on an exported model, without torch."""

from argparse import Namespace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_modules.commands.output_file import output_folder
from lightning_modules.errors import UserError
from lightning_modules.signature_values import read_signature
from ort_ops.signature_layers import read_model
from ort_ops.surgery import Edit, VerificationError, operate_on_file, routed_layer


def run_onnx_surgery(options: Namespace, model: Path, output: Path) -> int:
    """Write the edited file, and print what has changed."""
    if options.ngrams is not None:
        raise UserError(
            f"{model}: --ngrams needs a checkpoint: an exported model does not contain the codes; insert in the checkpoint and "
            "export that"
        )
    try:
        signature_D = None if options.signature is None else _signature(options.signature, model, options.layer)
        edit = Edit(options.action, options.layer, options.tile, options.tag, signature_D, freeze=not options.no_freeze)
        with output_folder(output.parent):
            report = operate_on_file(model, output, edit)
    except UserError:
        raise
    except (ValueError, VerificationError) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"output {output} cannot be written: {error.strerror or error}") from error
    after = "removed" if options.action == "remove" else _described(report.after_D, report.is_frozen)
    print(f"edited  layer {options.layer}, tile {options.tile}: {options.action}, tag {options.tag!r}")
    print(f"before  {_described(report.before_D, report.was_frozen)}")
    print(f"after   {after}")
    print(f"changed {', '.join([*report.changed, 'metadata'])}")
    print(
        f"routing {report.num_rerouted} of the {report.num_tokens} tokens of the file's example go to other tiles at the layer"
    )
    print(f"wrote   {output}  (run and read again: the edit stands, the other {report.num_equal} constants are equal)")
    return 0


def _signature(text: str, model: Path, layer: int) -> NDArray[np.float64]:
    _, _, layers, _ = read_model(model)
    return np.array(read_signature(text, routed_layer(model, layers, layer).signature_ED.shape[1]))


def _described(signature_D: NDArray[np.int8], is_frozen: bool) -> str:
    counts = f"{int((signature_D > 0).sum())} +, {int((signature_D < 0).sum())} -, {int((signature_D == 0).sum())} zeros"
    return f"{counts}, {'frozen' if is_frozen else 'not frozen'}"
