"""``trix sae planted``: how many features an architecture recovers where they are known, next to controls that learn less."""

import json
import math
import statistics
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.commands.arguments import FILE, CommandParser
from lightning_modules.commands.output_file import check_output_file, output_folder
from lightning_modules.commands.output_text import print_rich
from lightning_modules.commands.sae_run import EXIT_NO_BETTER
from lightning_modules.drawings import as_svg
from lightning_modules.error_text import did_you_mean
from lightning_modules.errors import UserError
from lightning_modules.explained_model import told_to_the_user
from lightning_modules.trust import is_class_path, working_folder_searched
from lightning_modules.yaml_files import read_yaml
from trix.whole_file import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

    from trix.superposition.evaluation.planted_study import PlantedScores, PlantedStudy

FACTOR = 3.0  # times the best control's recovery: what an architecture should reach
SIGNIFICANT = 0.05
OF_DATA = ("width", "num_features")
OF_STUDY = ("architecture", "k", "active", "tokens", "seeds", "controls")
JUDGED = {"recovered": "by direction", "recovered_by_activation": "by activation"}
TITLES = {
    "recovered": "recovered by direction",
    "recovered_by_frequency": "  weighted by frequency",
    "matched": "  one row, one feature",
    "mean_cosine": "mean cosine",
    "recovered_by_activation": "recovered by activation",
    "recovered_by_activation_by_frequency": "  weighted by frequency",
    "mean_correlation": "mean correlation",
    "mean_f1": "mean F1",
    "absorption": "absorption",
    "rows_per_feature": "rows per feature",
    "explained_variance": "explained variance",
    "active": "active latents",
    "dead": "dead latents",
}


@dataclass(frozen=True)
class Comparison:
    """A measure of the trained autoencoder against the control that is best in it.

    mean, of_control: means over the seeds. ratio: mean / of_control; None where the control has 0. p_value: the largest of the
    tests against each control, which are the paired t-test over seeds and Fisher's exact test over the features of all seeds;
    None with one seed. is_better: whether the mean is above that of each control, with p < 0.05.
    """

    measure: str
    mean: float
    control: str
    of_control: float
    ratio: float | None
    p_value: float | None
    is_better: bool

    @property
    def has_factor(self) -> bool:
        return self.mean > 0 and self.mean >= FACTOR * self.of_control


def run(options: Namespace) -> int:
    """Train, score, compare, print and write; the exit code says whether the architecture is better than its controls."""
    output = None if options.output is None else Path(options.output)
    if output is not None:
        if output.suffix != ".json":
            raise UserError(f"--output ({output}) must end with .json")
        for path in (output, output.with_suffix(".svg")):
            check_output_file(path, output)
    with told_to_the_user(options.output or "trix sae planted"):
        study = _study(options)
        from trix.superposition.evaluation.planted_study import run_study
        from trix.superposition.progress import progress_bar

        with progress_bar() as progress:
            num_steps = study.seeds * (1 + len(study.controls)) * study.num_steps
            task = progress.add_task(f"training {study.architecture} and its controls", total=num_steps)
            scores = run_study(study, lambda: progress.advance(task))
    found = [compare(scores, measure, study.data.num_features) for measure in JUDGED]
    print_rich(lambda console: _print(console, study, scores, found))
    if output is not None:
        try:
            with output_folder(output.parent):
                write_whole((json.dumps(_record(study, scores, found), indent=1, allow_nan=False) + "\n").encode(), output)
                write_whole(as_svg(figure(scores, study.architecture)), output.with_suffix(".svg"))
        except OSError as error:
            raise UserError(f"output {output} cannot be written: {error.strerror or error}") from error
        print(f"wrote   {output} and {output.with_suffix('.svg').name}")
    return 0 if all(comparison.is_better for comparison in found) else EXIT_NO_BETTER


def compare(scores: "dict[str, list[PlantedScores]]", measure: str, num_features: int) -> Comparison:
    """The trained autoencoder and the best control, paired by seed.

    Args:
        measure: a share of the num_features planted features.
    """
    from trix.superposition.evaluation.planted_study import RANDOM, TRAINED

    values = {name: [getattr(score, measure) for score in of_name] for name, of_name in scores.items() if name != RANDOM}
    trained = values.pop(TRAINED)
    means = {name: statistics.fmean(of_name) for name, of_name in values.items()}
    best = max(means, key=lambda name: means[name])
    mean = statistics.fmean(trained)
    p_value = None
    if len(trained) > 1:
        p_value = max(_p_value(trained, of_name, num_features) for of_name in values.values())
    ratio = mean / means[best] if means[best] > 0 else None
    is_better = p_value is not None and p_value < SIGNIFICANT and mean > means[best]
    return Comparison(measure, mean, best, means[best], ratio, p_value, is_better)


def _p_value(trained: Sequence[float], control: Sequence[float], num_features: int) -> float:
    """The larger p-value of two tests. The t-test alone takes a single feature, recovered with each seed, as certain."""
    from scipy.stats import fisher_exact

    from lightning_modules.comparison import paired_significance

    total = len(trained) * num_features
    table = [[found := round(sum(of_name) * num_features), total - found] for of_name in (trained, control)]
    return max(paired_significance(control, trained, min_pairs=2).p_value, float(fisher_exact(table).pvalue))


def _study(options: Namespace) -> "PlantedStudy":
    """What the file and the options say; options win."""
    from pydantic import ValidationError

    from trix.superposition.evaluation.planted_study import PlantedStudy

    for name in ("k", "active", "width", "num_features", "tokens", "seeds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} ({value}) must be >= 1")
    given: Any = {} if options.config is None else read_yaml(options.config)
    if not isinstance(given, dict) or not isinstance(given.get("data", {}), dict):
        raise UserError(f"{options.config} must hold keys and values, of which data has keys and values, too")
    data = given.get("data", {}) | {name: value for name in OF_DATA if (value := getattr(options, name)) is not None}
    values = given | {"data": data} | {name: value for name in OF_STUDY if (value := getattr(options, name)) is not None}
    _check_architecture(values.get("architecture"))
    try:
        return PlantedStudy.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":
            raise UserError(first["msg"].removeprefix("Value error, ")) from error
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{place} ({first['input']!r:.40}): {first['msg']}") from error


def _check_architecture(name: object) -> None:
    """Import the module of an architecture of the user's own, and name the nearest of ours where one is misspelt."""
    from lightning_modules.class_paths import import_class
    from trix.superposition.sae import ARCHITECTURES, SAE

    if not isinstance(name, str) or name in ARCHITECTURES.names:
        return
    if is_class_path(name):
        root = name.split(".")[0]
        with working_folder_searched([root]):
            import_class(name, SAE, "architecture", [root], package="trix")  # type: ignore[type-abstract]
        return
    names = ", ".join(ARCHITECTURES.names)
    hint = did_you_mean(name, ARCHITECTURES.names)
    raise UserError(f"architecture ({name!r:.40}) must be {names}, or the import path of a class{hint}")


def _defined(scores: "Sequence[PlantedScores]", measure: str) -> list[float]:
    """The values of the seeds in which the measure is defined."""
    return [value for score in scores if math.isfinite(value := getattr(score, measure))]


def _mean_and_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation; None where there are too few values."""
    return (
        statistics.fmean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
    )


def _record(study: "PlantedStudy", scores: "dict[str, list[PlantedScores]]", found: Sequence[Comparison]) -> dict[str, Any]:
    """All that was set, found and compared, and where."""
    from lightning_modules.callbacks.run_record import environment

    results = {}
    for name, of_name in scores.items():
        summary = {field.name: _mean_and_spread(_defined(of_name, field.name)) for field in fields(of_name[0])}
        results[name] = {
            "mean": {measure: mean for measure, (mean, _) in summary.items()},
            "standard_deviation": {measure: spread for measure, (_, spread) in summary.items()},
            "seeds": [
                {measure: value if math.isfinite(value) else None for measure, value in asdict(score).items()}
                for score in of_name
            ],
        }
    return {
        "study": study.model_dump(),
        "environment": environment(),
        "results": results,
        "comparisons": [asdict(comparison) | {"has_factor": comparison.has_factor} for comparison in found],
        "factor": FACTOR,
        "is_better": all(comparison.is_better for comparison in found),
    }


def _print(
    console: "Console", study: "PlantedStudy", scores: "dict[str, list[PlantedScores]]", found: Sequence[Comparison]
) -> None:
    from rich.table import Table
    from rich.text import Text

    data = study.data
    console.print(
        Text(
            f"{study.architecture}, {study.k} latents, {study.num_steps * study.batch_size:,} tokens: {data.num_features} "
            f"features in {data.width} dimensions, {data.mean_active:g} in a token; means of {study.seeds} seeds "
            "(standard deviation)"
        ),
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in scores:
        table.add_column(name.replace("_", " "), justify="right")
    for measure, title in TITLES.items():
        cells = []
        for of_name in scores.values():
            mean, spread = _mean_and_spread(_defined(of_name, measure))
            cells.append("-" if mean is None else f"{mean:.3f}" + ("" if spread is None else f" ({spread:.3f})"))
        table.add_row(title, *cells)
    console.print(table)
    for comparison in found:
        console.print(Text(_sentence(comparison)), soft_wrap=True)
    is_better = all(comparison.is_better for comparison in found)
    console.print(Text("better than its controls" if is_better else "not shown to be better than its controls"), soft_wrap=True)


def _sentence(comparison: Comparison) -> str:
    """A comparison in words: both means, how many times as much, and how sure."""
    times = "the control has none" if comparison.ratio is None else f"{comparison.ratio:.3g} times as much"
    wanted = f"{'reaches' if comparison.has_factor else 'falls short of'} the required factor of {FACTOR:g}"
    if comparison.p_value is None:
        sure = "one seed shows no difference"
    else:
        sure = f"p = {comparison.p_value:.2g}, {'' if comparison.is_better else 'not '}shown to be better"
    return (
        f"{JUDGED[comparison.measure]}: {comparison.mean:.3f} against {comparison.of_control:.3f} of {comparison.control}, "
        f"{times}; {wanted}; {sure}"
    )


def figure(scores: "dict[str, list[PlantedScores]]", title: str) -> "Figure":
    """What each contestant recovers, by direction and by activation: means as bars, seeds as dots."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7, 4), layout="constrained")
    axes = drawn.subplots()
    for place, (measure, label) in enumerate(JUDGED.items()):
        for index, of_name in enumerate(scores.values()):
            values = _defined(of_name, measure)
            left = index + 0.4 * (place - 0.5)
            axes.bar(left, _mean_and_spread(values)[0] or 0.0, 0.36, color=f"C{place}", label=None if index else label)
            axes.plot([left] * len(values), values, ".", color="black")
    axes.set_xticks(range(len(scores)), [name.replace("_", "\n") for name in scores])
    axes.set(ylim=(0, 1), ylabel="share of the planted features recovered", title=title)
    axes.legend()
    return drawn


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog="trix sae planted",
        description="Train a sparse autoencoder on synthetic activations whose features are known, and controls whose encoder\n"
        "or decoder stays random on the same activations. Prints how many features each recovers, how often parents are\n"
        "absorbed, and what is explained. Exit code 3: not shown to be better than every control.",
        epilog="examples:\n"
        "  trix sae planted\n"
        "  trix sae planted --architecture matryoshka --seeds 5 --output runs/matryoshka.json\n"
        "  trix sae planted --num-features 1024 --k 1024 --tokens 500000",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file with the settings: those below and settings (of the architecture), lr, batch_size, eval_tokens, and "
        "data: width, num_features, mean_active, zipf, correlation, parents, children, child_share, strength_spread, noise, "
        "offset; options win over it",
    ).complete = FILE
    parser.add_argument(
        "--architecture",
        metavar="NAME",
        help="standard, topk, batch_topk, ... or the import path of a class (default: batch_topk)",
    )
    parser.add_argument("--k", type=int, metavar="N", help="latents (default: 512)")
    parser.add_argument(
        "--active", type=int, metavar="N", help="active latents per token (default: as many as features fire on average, 8)"
    )
    parser.add_argument("--width", type=int, metavar="N", help="width of the activations (default: 128)")
    parser.add_argument("--num-features", type=int, metavar="N", help="planted features (default: 512)")
    parser.add_argument("--tokens", type=int, metavar="N", help="training tokens of each seed (default: 153600)")
    parser.add_argument("--seeds", type=int, metavar="N", help="repetitions; one shows no difference (default: 3)")
    parser.add_argument(
        "--controls",
        nargs="+",
        metavar="NAME",
        help="any of frozen_decoder, soft_frozen_decoder, frozen_encoder (default: all)",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write all results to this .json, and a drawing to the .svg next to it"
    )
    return parser
