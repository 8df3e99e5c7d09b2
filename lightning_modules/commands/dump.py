"""``trix dump``: the activations of a trained model, or of one of Hugging Face, written to disk for sparse autoencoders."""

from argparse import Namespace
from collections.abc import Collection

from lightning_modules.commands.arguments import FILE, CommandParser
from lightning_modules.errors import UserError
from lightning_modules.explained_model import LABEL, TEXT, frame_of, read_model, told_to_the_user
from lightning_modules.trust import trusted_modules, working_folder_searched

DEFAULT_TOKENS = 200_000


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
    with working_folder_searched(trusted), told_to_the_user(options.output):
        _dump(options, trusted)
    return 0


def _dump(options: Namespace, trusted: Collection[str]) -> None:
    from trix.superposition.config import DumpConfig
    from trix.superposition.dump import ActivationDump, dump_sites

    model = read_model(options.model, "dump", trusted)
    max_len = model.max_len(options.max_len)
    frame = frame_of(model, options.text, options.num_tokens or DEFAULT_TOKENS, max_len)
    config = DumpConfig(
        layer=0,
        max_len=max_len,
        batch_size=options.batch_size,
        dtype=options.dtype,
        shard_tokens=options.shard_tokens,
        drop_sinks=not options.keep_sinks,
        strict=options.strict,
    )
    for folder in dump_sites(frame, TEXT, LABEL, model.backend, config, options.site, options.output).values():
        manifest = ActivationDump(folder).manifest
        dropped = ", ".join(f"{count} {reason}" for reason, count in manifest.dropped.model_dump().items() if count)
        left_out = f"; left out: {dropped}" if dropped else ""
        print(f"wrote   {folder}  ({manifest.tokens} tokens of {manifest.documents} texts, width {manifest.d_model}{left_out})")


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
