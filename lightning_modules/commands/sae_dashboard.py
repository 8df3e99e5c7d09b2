"""``trix sae dashboard``: one HTML page about what each latent of a trained autoencoder stands for."""

import random
from argparse import Namespace
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning_modules.commands.arguments import FILE, CommandParser
from lightning_modules.commands.output_file import check_output_file, output_folder
from lightning_modules.commands.sae_run import (
    READ_TOKENS,
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
from lightning_modules.explained_model import ExplainedModel, told_to_the_user
from lightning_modules.trust import trusted_modules, working_folder_searched
from trix.whole_file import write_whole

if TYPE_CHECKING:
    from lightning_modules.data.activation_stream import Rows
    from trix.superposition.analysis.survey import Survey
    from trix.superposition.sae import SAE
    from trix.superposition.viz import Tokenizer

DEFAULT_LATENTS = 1024
DEFAULT_EXAMPLES = 4


def run(options: Namespace) -> int:
    """Write the page, and print where it is."""
    for name in ("num_latents", "examples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} ({value}) must be >= 1")
    if options.seed < 0:
        raise UserError(f"--seed ({options.seed}) must be >= 0")
    if options.latents is not None and options.num_latents is not None:
        raise UserError("--num-latents draws latents, --latents names them: give one of the two")
    latents = None if options.latents is None else _numbers(options.latents)
    trusted = trusted_modules(options.trust)
    with working_folder_searched(trusted), told_to_the_user(options.run):
        output = _write(options, latents, trusted)
    print(f"wrote   {output}  (open it in a browser)")
    return 0


def _write(options: Namespace, latents: list[int] | None, trusted: Collection[str]) -> Path:
    from trix.superposition.analysis.survey import MAX_EXAMPLES

    run = open_run(options.run, "dashboard", trusted, places_of(options))
    output = run.ckpt.parent / f"{run.ckpt.stem}_latents.html" if options.output is None else Path(options.output)
    check_output_file(output, run.ckpt)
    name, sae = run.autoencoder(options.autoencoder)
    if options.examples > MAX_EXAMPLES:
        raise UserError(f"--examples ({options.examples}) must be <= {MAX_EXAMPLES}")
    latents, note = _chosen(latents, options.num_latents or DEFAULT_LATENTS, sae.k, options.seed)
    model = open_model(options.model, run, "dashboard", trusted)
    with run.data.rows(READ_TOKENS) as rows:
        content = _page(options, run, rows, model, sae, name, latents, note)
    with told_to_the_user(output), output_folder(output.parent):
        write_whole(content.encode(), output.resolve())  # a link stays, the file that it names is replaced
    return output


def _page(
    options: Namespace,
    run: SAERun,
    rows: "Rows",
    model: ExplainedModel,
    sae: "SAE",
    name: str,
    latents: list[int],
    note: str,
) -> str:
    from trix.superposition.analysis.survey import survey_latents
    from trix.superposition.progress import progress_bar
    from trix.superposition.viz.dashboard import Vocabulary, dashboard

    device, dump = model.backend.device, rows.dump
    with progress_bar() as progress:
        bar = progress.add_task("latents", total=2 * len(dump))
        survey = survey_latents(
            sae,
            dump.paths,
            latents,
            device,
            has_tiles="tile" in dump.manifest.columns,
            num_examples=options.examples,
            seed=options.seed,
            advance=lambda num_tokens: progress.advance(bar, num_tokens),
        )
    site = rows.target_dump.manifest.identity.site
    tokenizer, size = _tokenizer(model)
    unembed = model.backend.unembed if site in model.backend.stream_sites else None
    facts = [("autoencoder", f"{name} of {run.ckpt}"), *_facts(run, rows, model, sae, survey), ("seed", str(options.seed))]
    vocabulary = Vocabulary(tokenizer, size, unembed)
    return dashboard("Latents of a sparse autoencoder", facts, survey, sae.W_dec.detach(), vocabulary, note)


def _facts(run: SAERun, rows: "Rows", model: ExplainedModel, sae: "SAE", survey: "Survey") -> list[tuple[str, str]]:
    from trix.superposition.evaluation.reconstruction import DENSE_SHARE

    identity, target = run.identity, rows.target_dump.manifest.identity
    source = run.data.hparams.get("path") or "straight from the model"
    settings = ", ".join(f"{name} {value}" for name, value in sae.settings().items())
    explained, num_held_out = _explained_variance(run, sae, model.backend.device)
    density_K = survey.density_K
    num_dense = int((density_K > DENSE_SHARE).sum())
    writes = [("writes", f"{target.site}.{target.layer}")] if run.data.has_target else []
    return [
        ("architecture", f"{sae.architecture}, {sae.k:,} latents of width {sae.d_model}; {settings}"),
        ("model", model.path),
        ("digest of the model", identity.model),
        ("site", f"{identity.site}.{identity.layer}"),
        *writes,
        ("activations", f"{source}: {survey.num_tokens:,} tokens of {rows.dump.manifest.documents:,} texts"),
        ("explained variance", f"{explained:.4f} (on the {num_held_out:,} tokens held out of training)"),
        ("active latents per token", f"{density_K.sum():.2f}"),
        ("dead latents", f"{int((density_K == 0).sum()):,} (they fire at none of these tokens)"),
        ("dense latents", f"{num_dense:,} (they fire on more than {DENSE_SHARE:.0%} of the tokens)"),
    ]


def _explained_variance(run: SAERun, sae: "SAE", device: Any) -> tuple[float, int]:
    """On the held-out tokens, and their number."""
    import torch

    from trix.superposition.evaluation.reconstruction import ReconstructionMetric

    metric = ReconstructionMetric(sae.d_out, sae.k).to(device)
    sae.eval()
    with torch.no_grad():
        for x_ND, target_NO in run.data.val_dataloader():
            x_hat_NO, z_NK = sae(x_ND.to(device))
            metric.update(x_hat_NO, target_NO.to(device), z_NK)
    return float(metric.compute()["explained_variance"]), int(metric.num_tokens)


def _tokenizer(model: ExplainedModel) -> tuple["Tokenizer", int]:
    """How the model writes its tokens, and the number of those that it can write."""
    from trix.superposition.backends import HFCausalLM, TriXBackend

    if isinstance(model.backend, HFCausalLM):
        return model.backend.tokenizer, len(model.backend.tokenizer)
    vocabulary = cast(TriXBackend, model.backend).vocabulary
    return vocabulary, len(vocabulary)


def _chosen(latents: list[int] | None, limit: int, k: int, seed: int) -> tuple[list[int], str]:
    """The latents to show, in order, and what the page says of the choice."""
    from trix.superposition.viz.dashboard import MAX_LATENTS

    if latents is not None:
        wrong = [latent for latent in latents if latent >= k]
        if wrong:
            raise UserError(f"latent ({wrong[0]}) must be >= 0 and < k ({k})")
        if len(latents) > MAX_LATENTS:
            raise UserError(f"number of --latents ({len(latents)}) must be <= {MAX_LATENTS}")
        return latents, f"{len(latents):,} of {k:,} latents, chosen by hand."
    if limit > MAX_LATENTS:
        raise UserError(f"--num-latents ({limit}) must be <= {MAX_LATENTS}")
    if limit >= k:
        return list(range(k)), f"All {k:,} latents."
    return sorted(random.Random(seed).sample(range(k), limit)), f"{limit:,} of {k:,} latents, drawn at random."


def _numbers(text: str) -> list[int]:
    """The latents of a text like 1,5,9, sorted, each once."""
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not (part.isascii() and part.isdigit())]
    if wrong:
        raise UserError(f"--latents ({text}) must be numbers >= 0 with commas between them, as 1,5,9: {wrong[0]!r} is none")
    return sorted({int(part) for part in parts})


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog="trix sae dashboard",
        description="Write one HTML page about what each latent of an autoencoder stands for: texts in which it fires\n"
        "strongly and weakly, how often it fires, the tokens whose logits it raises and lowers, its nearest neighbours,\n"
        "and the tiles among which it fires. The page needs no network.",
        epilog="examples:\n"
        "  trix sae dashboard runs/sae --model runs/char_lm\n"
        "  trix sae dashboard runs/sae --model runs/char_lm --latents 1,5,9 --examples 10 --output latents.html",
    )
    add_run(parser)
    add_model(parser)
    add_dump(parser)
    parser.add_argument(
        "--output", metavar="FILE", help="the HTML file to write (default: next to the checkpoint, NAME_latents.html)"
    ).complete = FILE
    parser.add_argument("--latents", metavar="N,N,...", help="the latents to show")
    parser.add_argument(
        "--num-latents",
        type=int,
        metavar="N",
        help=f"largest number of latents to show; of more, as many are drawn at random (default: {DEFAULT_LATENTS})",
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=DEFAULT_EXAMPLES,
        metavar="N",
        help="largest number of examples in each of the five groups (default: %(default)s)",
    )
    add_autoencoder(parser)
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of all that is drawn at random (default: %(default)s)"
    )
    parser.add_trust()
    return parser
