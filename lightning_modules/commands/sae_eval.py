"""``trix sae eval``: how good a trained autoencoder is, each figure beside those of controls that were trained like it."""

from argparse import Namespace
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_modules.commands.arguments import FILE, CommandParser
from lightning_modules.commands.output_file import check_output_file, check_output_folder, output_folder
from lightning_modules.commands.sae_run import (
    EXIT_NO_BETTER,
    READ_TOKENS,
    SAERun,
    add_dump,
    add_model,
    add_run,
    open_model,
    open_run,
    places_of,
)
from lightning_modules.errors import UserError
from lightning_modules.explained_model import TEXT, ExplainedModel, read_texts, told_to_the_user
from lightning_modules.trust import trusted_modules, working_folder_searched
from trix.whole_file import write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_modules.commands.sae_controls import Training
    from lightning_modules.commands.sae_report import Report
    from lightning_modules.data.activation_stream import Rows

T = TypeVar("T")

DEFAULT_TOKENS = 16_384
BATCH_TEXTS = 64
JSON_NAME, PAGE_NAME = "eval.json", "eval.html"


def run(options: Namespace) -> int:
    """Measure, write JSON and a page, print; 3 where the autoencoder is no better than its best control.

    Raises:
        UserError: what does not fit, before anything is trained or written.
    """
    if options.num_tokens < 2:
        raise UserError(f"--num-tokens ({options.num_tokens}) must be >= 2")
    trusted = trusted_modules(options.trust)
    with working_folder_searched(trusted), told_to_the_user(options.run):
        return _evaluate(options, trusted)


def _evaluate(options: Namespace, trusted: Collection[str]) -> int:
    from lightning_modules.commands.sae_controls import run_version, training_of
    from lightning_modules.tasks.sparse_autoencoder import MAIN

    opened = open_run(options.run, "eval", trusted, places_of(options))
    model = open_model(options.model, opened, "eval", trusted)
    if len(opened.task.autoencoders) > 1:
        print(f"judging {MAIN}, the main one of the autoencoders {', '.join(opened.task.autoencoders)}")
    training = None if options.no_controls else training_of(opened, sorted(trusted))
    folder = run_version(opened.ckpt)
    output = folder / "eval" if options.output is None else Path(options.output)
    check_output_folder(output)
    for name in (JSON_NAME, PAGE_NAME):
        check_output_file(output / name, opened.ckpt)
    with opened.data.rows(READ_TOKENS) as rows:
        report = _report(options, opened, rows, model, training, folder)
    files = {JSON_NAME: report.as_json(), PAGE_NAME: report.as_page()}
    with output_folder(output):
        for name, content in files.items():
            write_whole(content.encode(), output / name)
    report.print()
    print(f"wrote   {output / JSON_NAME} and {output / PAGE_NAME}")
    verdict = report.verdict
    if verdict is None:
        print("no verdict: there are no controls to compare with")
        return 0
    print(verdict)
    return 0 if verdict.is_better else EXIT_NO_BETTER


def _report(
    options: Namespace, opened: SAERun, rows: "Rows", model: ExplainedModel, training: "Training | None", folder: Path
) -> "Report":
    from lightning_modules.commands.sae_controls import FOLDER, trained_controls
    from lightning_modules.commands.sae_report import Report
    from lightning_modules.tasks.sparse_autoencoder import MAIN
    from trix.superposition.evaluation import model_fits
    from trix.superposition.evaluation.measure import Split, evaluation_data, measure

    texts = _text_batches(options, opened, model)
    backend: Any = model.backend
    split = Split(*rows)
    measured_on = evaluation_data(split, getattr(backend, "vocabulary", None) or backend.tokenizer)
    saes = {"run": opened.task.autoencoders[MAIN].fold_().eval()}
    measured = measure(measured_on, saes)  # first: what cannot be measured needs no controls
    if training is not None:
        controls = trained_controls(training, folder / FOLDER, _training, print)
        saes |= controls
        for name, sae in _tracked(list(controls.items()), "measuring the controls"):
            measured |= measure(measured_on, {name: sae})
    layer = opened.identity.layer
    fits = model_fits(backend, layer, saes, lambda: _tracked(texts, "measuring the model's loss")) if texts else {}
    return Report(opened, opened.provenance(model, rows, options.command), measured_on, saes, measured, fits)


def _text_batches(options: Namespace, opened: SAERun, model: ExplainedModel) -> "list[dict[str, Tensor]]":
    """Held-out texts as tokens; none where the model's loss cannot be measured.

    Raises:
        UserError: no texts.
    """
    from trix.superposition.backends.base_model import RESIDUAL

    site, layer, max_len = opened.identity.site, opened.identity.layer, opened.identity.settings.max_len
    if site != RESIDUAL or opened.data.has_target:
        print(f"cross-entropy is not measured: site ({site}.{layer}) must be {RESIDUAL}, and the target x itself, for that")
        return []
    if options.text is None:
        texts = model.held_out_texts(options.num_tokens, max_len)
    else:
        texts = read_texts(options.text)[TEXT].tolist()
    batches: list[dict[str, Tensor]] = []
    num_tokens = 0
    for first in range(0, len(texts), BATCH_TEXTS):
        if num_tokens >= options.num_tokens:
            break
        batches.append(model.backend.tokenize(texts[first : first + BATCH_TEXTS], max_len))
        num_tokens += int(batches[-1]["attention_mask"].sum())
    if num_tokens < 2:
        raise UserError(f"{options.text or options.model}: tokens of the texts ({num_tokens}) must be >= 2")
    return batches


def _training(batches: Iterator[Any], num_steps: int, name: str) -> Iterator[Any]:
    return _tracked(batches, f"training {name}", num_steps)


def _tracked(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items, while stderr says how far it is and how long the rest takes. total: number of items that have no len."""
    from trix.superposition.progress import progress_bar

    with progress_bar() as progress:
        yield from progress.track(items, total, description=what)


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog="trix sae eval",
        description="Measure an autoencoder on held-out activations and on its model: reconstruction, what the model loses,\n"
        "what single latents tell, whether another seed finds the same. Controls are trained on the same activations, with\n"
        "some weights kept random (arXiv:2602.14111). They are kept in the folder of the run, and trained only once.\n\n"
        "Exit code 3: no better than its best control, in explained variance or in sparse probing.",
        epilog="examples:\n"
        "  trix sae eval runs/sae --model runs/char_lm\n"
        "  trix sae eval runs/sae --model runs/char_lm --no-controls --num-tokens 50000 --output figures\n"
        "  trix sae eval runs/smollm_sae --model SmolLM2-135M --text titles.csv",
    )
    add_run(parser)
    add_model(parser)
    add_dump(parser)
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="texts on which the model's loss is measured: the paragraphs of a file, or a .csv with the columns text and label "
        "(default: the text that the model was validated on)",
    ).complete = FILE
    parser.add_argument(
        "--num-tokens",
        type=int,
        default=DEFAULT_TOKENS,
        metavar="N",
        help="about how many tokens of the texts are read (default: %(default)s)",
    )
    parser.add_argument(
        "--output", metavar="DIR", help=f"where {JSON_NAME} and {PAGE_NAME} go (default: the folder eval of the run's version)"
    )
    parser.add_argument("--no-controls", action="store_true", help="train no controls: figures without a verdict")
    parser.add_trust()
    return parser
