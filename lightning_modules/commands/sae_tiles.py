"""``trix sae tiles``: which latents go with which tiles of the model, whether they decide, and one page about it."""

import json
from argparse import Namespace
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_modules.commands.arguments import FILE, CommandParser
from lightning_modules.commands.output_file import check_output_file, check_output_folder, output_folder
from lightning_modules.commands.sae_run import (
    SAERun,
    add_autoencoder,
    add_dump,
    add_model,
    add_run,
    open_model,
    open_run,
    places_of,
)
from lightning_modules.errors import UserError
from lightning_modules.explained_model import told_to_the_user
from lightning_modules.trust import trusted_modules, working_folder_searched
from trix.whole_file import write_whole

if TYPE_CHECKING:
    from trix.superposition.tiles.report import TileReport

DEFAULT_TOKENS = 100_000
RECORD_FILE, PAGE_FILE = "tiles.json", "tiles.html"


def run(options: Namespace) -> int:
    """Write the record and the page, and print the figures."""
    for name, least in {"num_tokens": 1, "layer": 0, "seed": 0}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} ({value}) must be >= {least}")
    trusted = trusted_modules(options.trust)
    with working_folder_searched(trusted):
        sae_run = open_run(options.run, "tiles", trusted, places_of(options))
        folder = sae_run.ckpt.parent / "tiles" if options.output is None else Path(options.output)
        check_output_folder(folder)
        for name in (RECORD_FILE, PAGE_FILE):
            check_output_file(folder / name, sae_run.ckpt)
        with told_to_the_user(folder):
            _report(options, sae_run, folder, trusted)
    return 0


def _report(options: Namespace, sae_run: SAERun, folder: Path, trusted: Collection[str]) -> None:
    from trix.superposition.backends import TriXBackend
    from trix.superposition.tiles.page import tile_page, tile_record
    from trix.superposition.tiles.report import tile_report

    model = open_model(options.model, sae_run, "tiles", trusted)
    if not isinstance(model.backend, TriXBackend):
        raise UserError(f"{model.path} must be a model of this project: those of Hugging Face have no tiles")
    if sae_run.data.has_target:
        raise UserError(f"{sae_run.ckpt} must reconstruct the activations that it reads, which a transcoder does not")
    name, sae = sae_run.autoencoder(options.autoencoder)
    with sae_run.data.rows(options.num_tokens) as rows:
        report = tile_report(model.backend, sae, rows.dump, options.layer, options.num_tokens, options.seed)
        provenance = sae_run.provenance(model, rows, options.command)
    provenance |= {"autoencoder": name, "num_tokens": options.num_tokens, "seed": options.seed}
    record = json.dumps(tile_record(report, provenance), indent=1, allow_nan=False)
    facts = {
        "autoencoder": f"{name} of {sae_run.ckpt}",
        "model": f"{model.path} (digest {provenance['model_digest'][:12]})",
        "activations": f"{report.num_tokens:,} tokens of {report.num_documents:,} documents at {report.site}",
        "seed": str(options.seed),
        "trix": provenance["environment"]["packages"]["trix"] or "unknown",
    }
    page = tile_page(report, model.backend.vocabulary, facts)
    with output_folder(folder):
        write_whole(record.encode(), folder / RECORD_FILE)
        write_whole(page.encode(), folder / PAGE_FILE)
    _print(report)
    print(f"wrote   {folder / RECORD_FILE}")
    print(f"wrote   {folder / PAGE_FILE}  (open it in a browser)")


def _print(report: "TileReport") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from trix.superposition.tiles.page import summary_rows

    table = Table(title=f"tiles of layer {report.layer}, latents of {report.site}", title_justify="left")
    for name in ("", "found", "control"):
        table.add_column(name)
    for row in summary_rows(report):
        table.add_row(*map(Text, row))
    console = Console()
    console.print(table)
    for note in report.notes:
        console.print(Text(note), soft_wrap=True)


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog="trix sae tiles",
        description="Say which latents of a sparse autoencoder go with which tiles of the model that it explains, and whether\n"
        "they decide: enriched latents per tile, what they say of the tile beyond the token, the tile predicted from them,\n"
        "their contributions removed, signatures compared. Each figure stands next to its control.",
        epilog="examples:\n"
        "  trix sae tiles runs/sae --model runs/char_lm\n"
        "  a model whose tiles hidden states decide, and a causal check at its router:\n"
        "  trix fit --config configs/char_lm.yaml --model.init_args.network.ffn.route_on hidden "
        "--trainer.logger.init_args.name hidden\n"
        "  trix dump runs/hidden --site router_in.2 --output runs/hidden/acts\n"
        "  trix fit --config configs/sae.yaml --data.path runs/hidden/acts/router_in.2\n"
        "  trix sae tiles runs/sae --model runs/hidden",
    )
    add_run(parser)
    add_model(parser)
    add_dump(parser)
    add_autoencoder(parser)
    parser.add_argument(
        "--layer", type=int, metavar="L", help="the layer whose tiles are read (default: that of the activations)"
    )
    parser.add_argument(
        "--num-tokens",
        type=int,
        default=DEFAULT_TOKENS,
        metavar="N",
        help="the most tokens of the activations to read (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of every draw (default: %(default)s)")
    parser.add_argument(
        "--output", metavar="DIR", help=f"where {RECORD_FILE} and {PAGE_FILE} go (default: tiles, next to the checkpoint)"
    ).complete = FILE
    parser.add_trust()
    return parser
