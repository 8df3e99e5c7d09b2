"""``trix dump``: the activations of a trained model, or of one of Hugging Face, written to disk for sparse autoencoders."""

from argparse import Namespace
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_modules.checkpoint_data import load_task, run_data
from lightning_modules.commands.arguments import FILE, CommandParser
from lightning_modules.errors import UserError
from lightning_modules.run_folder import best_checkpoint
from lightning_modules.trust import trusted_modules, working_folder_searched

if TYPE_CHECKING:
    import pandas as pd

    from lightning_modules.data import RunData
    from trix.superposition.backends import CausalLMBackend

DEFAULT_TOKENS = 200_000
TEXT, LABEL = "text", "label"
HF_CONFIG = "config.json"


def run_dump(arguments: list[str]) -> int:
    """Write the dump of each site, and print where it is and what is in it."""
    options = make_parser().parse_strictly(arguments)
    for name in ("num_tokens", "max_len", "batch_size", "shard_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} ({value}) must be >= 1")
    if options.num_tokens is not None and options.text is not None:
        raise UserError("--num-tokens belongs to the run's own text: of a --text all is read")
    trusted = trusted_modules(options.trust)
    with working_folder_searched(trusted):
        try:
            _dump(options, trusted)
        except ImportError as error:
            if error.name is None:  # it says itself what to install
                raise UserError(str(error)) from error
            extra = "transformers" if error.name == "transformers" else "superposition"
            raise UserError(f"{error.name} must be installed for this: pip install 'trix[{extra}]'") from error
        except OSError as error:
            raise UserError(f"{error.filename or options.output}: {error.strerror or error}") from error
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error
    return 0


def _dump(options: Namespace, trusted: Collection[str]) -> None:
    from trix.superposition.config import DumpConfig
    from trix.superposition.dump import ActivationDump, dump_sites

    backend, frame, max_len = _model_and_texts(options, trusted)
    config = DumpConfig(
        layer=0,
        max_len=max_len,
        batch_size=options.batch_size,
        dtype=options.dtype,
        shard_tokens=options.shard_tokens,
        drop_sinks=not options.keep_sinks,
        strict=options.strict,
    )
    for folder in dump_sites(frame, TEXT, LABEL, backend, config, options.site, options.output).values():
        manifest = ActivationDump(folder).manifest
        dropped = ", ".join(f"{count} {reason}" for reason, count in manifest.dropped.model_dump().items() if count)
        left_out = f"; left out: {dropped}" if dropped else ""
        print(f"wrote   {folder}  ({manifest.tokens} tokens of {manifest.documents} texts, width {manifest.d_model}{left_out})")


def _model_and_texts(options: Namespace, trusted: Collection[str]) -> tuple["CausalLMBackend", "pd.DataFrame", int]:
    """The model, its texts, and how many tokens of each are read."""
    path = Path(options.model)
    if (path / HF_CONFIG).is_file():
        from trix.superposition.backends import HFCausalLM

        if options.text is None:
            raise UserError(f"{path} needs texts to read: --text FILE")
        return HFCausalLM.from_pretrained(str(path)), _frame(options.text), options.max_len or 128
    from lightning_modules.tasks.backend import backend_of

    ckpt = best_checkpoint(path)
    task, checkpoint = load_task(str(ckpt), "dump", trusted)
    backend = backend_of(task, ckpt)
    limit = backend.model.config.context_length
    max_len = options.max_len or limit
    if max_len > limit:
        raise UserError(f"--max-len ({max_len}) must be <= context_length ({limit}) of the model")
    if options.text is not None:
        return backend, _frame(options.text), max_len
    data = run_data(task, checkpoint, ckpt, trusted)
    return backend, _training_text(data, backend.vocabulary, options.num_tokens or DEFAULT_TOKENS, max_len), max_len


def _frame(path: str) -> "pd.DataFrame":
    """The paragraphs of a text file, or the texts of a CSV file with the columns text and label."""
    from trix.superposition.data import load_text, load_titles_csv

    return load_titles_csv(path, TEXT, LABEL) if path.lower().endswith(".csv") else load_text(path, TEXT, LABEL)


def _training_text(data: "RunData", vocabulary: str, num_tokens: int, max_len: int) -> "pd.DataFrame":
    """Windows of the text that the model was trained on, as training reads it."""
    import pandas as pd

    texts: list[str] = []
    for token_BT in data.training_inputs(num_tokens):
        texts += ["".join(vocabulary[index] for index in token_T) for token_T in token_BT[:, :max_len].tolist()]
    needed = -(-num_tokens // max_len)
    return pd.DataFrame({TEXT: texts[:needed], LABEL: 0})


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog="trix dump",
        description="Write the activations of a model at one or several sites, token by token, for `trix fit` of sparse\n"
        "autoencoders. Stopped, it goes on where it was when it is called again.",
        epilog="examples:\n"
        "  trix dump runs/char_lm --site resid_pre.2 --output runs/char_lm/acts\n"
        "  trix dump runs/char_lm --site router_in.1 ffn_out.1 --num-tokens 500000 --output runs/char_lm/acts\n"
        "  trix dump SmolLM2-135M --site resid_pre.15 --text titles.csv --output acts",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a checkpoint, a run folder, or the folder of a model of Hugging Face"
    ).complete = FILE
    parser.add_argument(
        "--site",
        nargs="+",
        required=True,
        metavar="NAME.LAYER",
        help="what is read: resid_pre (what enters a block), resid_mid, router_in, ffn_out; of a model of Hugging Face "
        "resid_pre, mlp_in, mlp_out; each gets a folder of its own",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where the folders of the sites go")
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="texts to read: the paragraphs of a file, or a .csv with the columns text and label (default: the text that the "
        "model was trained on)",
    ).complete = FILE
    parser.add_argument(
        "--num-tokens", type=int, metavar="N", help=f"of the text that the model was trained on (default: {DEFAULT_TOKENS})"
    )
    parser.add_argument(
        "--max-len", type=int, metavar="N", help="tokens of a text that are read (default: the model's context, or 128)"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="texts in a batch (default: %(default)s)")
    parser.add_argument("--shard-tokens", type=int, default=65536, metavar="N", help="tokens in a file (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="as stored (default: %(default)s)")
    parser.add_argument("--keep-sinks", action="store_true", help="keep the tokens in which attention gathers")
    parser.add_argument(
        "--strict", action="store_true", help="stop at an activation that is not finite, instead of leaving it out"
    )
    parser.add_trust()
    return parser
