"""What `trix sae eval` says of an autoencoder and its controls: as a table, as JSON, as one page."""

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_modules.commands.output_text import print_rich
from lightning_modules.commands.sae_controls import OTHER_SEED
from lightning_modules.commands.sae_run import SAERun
from trix.introspection.page import definitions, drawing, heading, page, table
from trix.superposition.evaluation import ModelFit
from trix.superposition.evaluation.measure import EvaluationData, Measured
from trix.superposition.evaluation.overlap import RUN_TOKENS
from trix.superposition.evaluation.probing import NUM_LATENTS, NUM_REMOVED
from trix.superposition.evaluation.stability import SAME_COSINE, Stability, random_stability, stability
from trix.superposition.evaluation.verdict import LEVEL, MARGIN, NUM_DRAWS, Verdict, judge
from trix.superposition.sae import RESTRAINTS, SAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUN = "run"
# What each measure is called, and what it is, in words.
CORE = {
    "explained_variance": ("explained variance", "1 - sum |x - x_hat|² / sum |x - mean|²"),
    "mse": ("MSE", "mean of (x - x_hat)² over tokens and dimensions"),
    "cosine": ("cosine", "mean over tokens of the cosine of x and x_hat"),
    "l2_ratio": ("L2 ratio", "mean over tokens of |x_hat| / |x|"),
    "active": ("L0", "active latents per token"),
    "alive": ("alive", "share of the latents that are active at any token"),
    "frequent": ("density > 1 %", "share of the latents that are active at more than 1 % of the tokens"),
    "dense": ("density > 10 %", "share of the latents that are active at more than 10 % of the tokens"),
    "decoder_cosine": ("decoder cosine", "mean over latents of the largest cosine of its decoder row with another one"),
}
FIT = {
    "recovered_zero": ("CE recovered, zeros", "(CE with zeros - CE with x_hat) / (CE with zeros - CE of the model)"),
    "recovered_mean": ("CE recovered, mean", "the same with the mean activation in place of zeros"),
    "kl": ("KL", "KL(model || model with x_hat) of the next token, in nats"),
}


class Report:
    """The figures of a run and its controls.

    Args:
        run: what was judged. provenance: see :meth:`~lightning_modules.commands.sae_run.SAERun.provenance`. data: what all was
            measured on. saes, measured: by name, the run's own first, as ``run``. fits: what the model loses by each; empty
            where that cannot be measured.

    Attributes:
        facts: what the figures are of, as plain values. verdict: None without controls. verdict_of_other_seed: the same of the
            training with another seed.
    """

    def __init__(
        self,
        run: SAERun,
        provenance: Mapping[str, Any],
        data: EvaluationData,
        saes: Mapping[str, SAE],
        measured: Mapping[str, Measured],
        fits: Mapping[str, ModelFit],
    ) -> None:
        self.data, self.saes, self.measured, self.fits = data, saes, measured, fits
        self.facts: dict[str, Any] = {
            **provenance,
            "site": f"{run.identity.site}.{run.identity.layer}",
            "autoencoder": dict(run.task.hparams["autoencoder"]),
            "held_out_tokens": data.num_tokens,
            "held_out_documents": len(data.documents_P),
            "held_out_runs_seen": data.seen_share,
        }

    @cached_property
    def verdict(self) -> Verdict | None:
        return self._judged(RUN)

    @cached_property
    def verdict_of_other_seed(self) -> Verdict | None:
        return self._judged(OTHER_SEED)

    def _judged(self, name: str) -> Verdict | None:
        controls = {control: self.measured[control] for control in RESTRAINTS if control in self.measured}
        if not controls:
            return None
        ours = self.measured[name]
        return judge((ours.errors, ours.hits), {control: (found.errors, found.hits) for control, found in controls.items()})

    @cached_property
    def stability(self) -> dict[str, Stability]:
        """How alike the decoders are of the run and of the same with another seed; and of random rows and a frozen decoder."""
        row_KO = self.saes[RUN].W_dec.detach()
        found = {"random": random_stability(row_KO)}
        if OTHER_SEED in self.saes:
            found = {"run and other seed": stability(row_KO, self.saes[OTHER_SEED].W_dec.detach())}
            found["frozen decoder and random"] = random_stability(row_KO, self.saes[RESTRAINTS[0]].W_dec.detach())
        return found

    def as_json(self) -> str:
        """All figures. What could not be measured is null."""
        content = {
            **self.facts,
            "gamma": self.measured[RUN].core["gamma"],
            "autoencoders": {name: self._figures(name) for name in self.measured},
            "dense_probes": self._by_question(self.data.dense_hits.accuracy()[:, 0]),
            "questions_left_out": self.data.left_out,
            "stability": {name: found._asdict() for name, found in self.stability.items()},
            "verdict": self._verdict_values(self.verdict),
            "verdict_of_other_seed": self._verdict_values(self.verdict_of_other_seed),
        }
        return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"

    def _verdict_values(self, verdict: Verdict | None) -> dict[str, Any] | None:
        if verdict is None:
            return None
        return {"is_better": verdict.is_better, "text": str(verdict), **asdict(verdict), "rule": self._rule}

    def _figures(self, name: str) -> dict[str, Any]:
        found = self.measured[name]
        accuracy_QS = found.hits.accuracy()
        return {
            "core": {key: found.core[key] if key != "alive" else 1 - found.core["dead"] for key in CORE},
            "model": self.fits[name]._asdict() if name in self.fits else None,
            "probing": {
                "mean": float(accuracy_QS.mean()),
                "by_latents": {str(k): float(value) for k, value in zip(NUM_LATENTS, accuracy_QS.mean(axis=0), strict=True)},
                "by_question": {question: row.tolist() for question, row in zip(self.data.names, accuracy_QS, strict=True)},
                "latents": found.latents,
            },
            "perturbation": [asdict(part) | {"targeted": part.targeted} for part in found.perturbations],
        }

    def _by_question(self, value_Q: Iterable[float]) -> dict[str, float]:
        return {name: float(value) for name, value in zip(self.data.names, value_Q, strict=True)}

    @property
    def _rule(self) -> str:
        return (
            "An autoencoder is better than its best control if the "
            f"{LEVEL:.0%} interval of the difference lies above {MARGIN} both in explained variance and in sparse probing "
            "(balanced accuracy, mean over questions and numbers of latents), each against the control that is best there. "
            f"Intervals: {NUM_DRAWS} draws of the held-out documents, both sides measured on the same ones. What another seed "
            "changes they leave out; the verdict on the training with another seed shows it. A best.ckpt was chosen on the "
            "same held-out tokens; controls are trained for as many steps, and none is chosen."
        )

    @property
    def _notes(self) -> list[str]:
        """What is to be known besides."""
        notes = []
        if self.data.seen_share > 0:
            notes.append(
                f"{self.data.seen_share:.1%} of the held-out runs of {RUN_TOKENS} tokens also stand in training documents: "
                "figures may be better than on new text, those of the controls, too"
            )
        if self.data.left_out:
            notes.append(f"questions left out, with too few cases: {', '.join(self.data.left_out)}")
        if self.verdict_of_other_seed is not None:
            notes.append(f"the same training with another seed: {self.verdict_of_other_seed}")
        return notes

    def print(self) -> None:
        """The figures that matter most, as a table."""

        def draw(console: Any) -> None:
            from rich.table import Table

            shown = Table(box=None, pad_edge=False)
            for place, name in enumerate(("", *(_words(name) for name in self.measured))):
                shown.add_column(name, justify="right" if place else "left")
            for cells in (
                *self._core_rows(("explained_variance", "active", "alive")),
                *self._fit_rows(),
                *self._probing_rows(),
            ):
                shown.add_row(*cells)
            console.print(shown)

        print_rich(draw)
        for name, found in self.stability.items():
            print(
                f"{name}: {found.shared:.1%} of {found.num_rows} decoder rows have a counterpart of cosine > {SAME_COSINE}; "
                f"mean of the largest cosine {found.mean_max_cosine:.3f}"
            )
        for note in self._notes:
            print(note)

    def _core_rows(self, keys: Iterable[str] = CORE) -> list[list[str]]:
        cores = [found.core | {"alive": 1 - found.core["dead"]} for found in self.measured.values()]
        return [[CORE[key][0], *(_number(core[key]) for core in cores)] for key in keys]

    def _fit_rows(self) -> list[list[str]]:
        if not self.fits:
            return []
        return [[FIT[key][0], *(_number(getattr(self.fits[name], key)) for name in self.measured)] for key in FIT]

    def _probing_rows(self) -> list[list[str]]:
        accuracies = [found.hits.accuracy().mean(axis=0) for found in self.measured.values()]
        rows = [
            [f"probes of {k} latent{'s' if k > 1 else ''}", *(_number(accuracy_S[place]) for accuracy_S in accuracies)]
            for place, k in enumerate(NUM_LATENTS)
        ]
        targeted = [found.targeted for found in self.measured.values()]
        return [*rows, ["targeted perturbation", *("-" if value is None else _number(value) for value in targeted)]]

    def as_page(self) -> str:
        """One HTML page, with all figures and three drawings."""
        head = ["", *(_words(name) for name in self.measured)]
        verdict = "no verdict: there are no controls to compare with" if self.verdict is None else str(self.verdict)
        shown = {name: str(value) for name, value in self.facts.items() if not isinstance(value, dict | list)}
        shown |= {"autoencoder": _setting_words(self.facts["autoencoder"]), "held_out_runs_seen": f"{self.data.seen_share:.1%}"}
        shown |= {"command": shlex.join(self.facts["command"])}
        body = f'<p><strong>{_escaped(verdict)}</strong></p><p class="muted">{_escaped(self._rule)}</p>'
        body += "".join(f"<p>{_escaped(note)}</p>" for note in self._notes)
        body += f'<div class="passage">{definitions((_words(name), value) for name, value in shown.items())}</div>'
        body += drawing(self._summary_figure(), "the main figures by autoencoder")
        body += heading(2, "Reconstruction", f"On {self.data.num_tokens:,} held-out tokens, in float64.")
        body += _table(head, self._core_rows()) + _meanings(CORE)
        body += f"<p>gamma = |mean| / |std| of the activations: {self.measured[RUN].core['gamma']:.3f}</p>"
        body += heading(2, "The model", "Its loss when the stream is replaced by what the autoencoder makes of it.")
        if self.fits:
            some = self.fits[RUN]
            body += _table(head, self._fit_rows()) + _meanings(FIT)
            body += (
                f"<p>Loss of the model {some.loss:.4f} nats, with zeros {some.loss_zero:.4f}, with the mean "
                f"{some.loss_mean:.4f}, on {some.num_tokens:,} predictions of held-out texts.</p>"
            )
        else:
            body += "<p>Not measured: the stream between blocks can be replaced, this site cannot.</p>"
        body += heading(
            2,
            "Sparse probing",
            "Balanced accuracy, on held-out documents, of logistic regressions that read 1, 2 or 5 latents (0.5: chance). "
            "Dense: a probe that reads all activations.",
        )
        body += _table(head, self._probing_rows())
        body += f"<p>By question, with {_series(NUM_LATENTS)} latents:</p>" + self._questions_table()
        body += drawing(self._probing_figure(), "balanced accuracy by question and autoencoder")
        body += (
            f"<p>Targeted perturbation: the {NUM_REMOVED} latents that speak most for a question are set to 0; what its dense "
            "probe loses of balanced accuracy, less what the probes of the other questions lose.</p>"
        )
        body += heading(2, "Density", "Latents by the share of the tokens at which they are active.")
        body += drawing(self._density_figure(), "histogram of densities")
        body += heading(2, "Another seed", "Decoder rows of two trainings, matched one to one by the Hungarian method.")
        rows = [
            [name, f"{found.shared:.1%}", _number(found.mean_cosine), _number(found.mean_max_cosine)]
            for name, found in self.stability.items()
        ]
        body += _table(["", f"cosine > {SAME_COSINE}", "mean cosine", "mean largest cosine"], rows)
        return page(f"Autoencoder at {self.facts['site']}", body)

    def _questions_table(self) -> str:
        head = ["question", "dense", *(_words(name) for name in self.measured)]
        columns = [self.data.dense_hits.accuracy(), *(found.hits.accuracy() for found in self.measured.values())]
        rows = [
            [question, *(" ".join(f"{value:.2f}" for value in column_QS[place]) for column_QS in columns)]
            for place, question in enumerate(self.data.names)
        ]
        return _table(head, rows)

    def _summary_figure(self) -> "Figure":
        from matplotlib.figure import Figure

        shown = {"explained variance": [found.errors.explained_variance for found in self.measured.values()]}
        if self.fits:
            shown["CE recovered, mean"] = [self.fits[name].recovered_mean for name in self.measured]
        shown["sparse probing"] = [float(found.hits.accuracy().mean()) for found in self.measured.values()]
        figure = Figure(figsize=(6, 0.8 + 0.35 * len(self.measured)), layout="constrained")
        for axes, (title, values) in zip(figure.subplots(1, len(shown), sharey=True), shown.items(), strict=True):
            colours = ["#c05621", *("#4a5568" for _ in values[1:])]
            axes.barh([_words(name) for name in self.measured], values, color=colours)
            axes.set_title(title, fontsize=10)
            axes.set_xlim(min(0, *values), 1)
        axes.invert_yaxis()
        return figure

    def _probing_figure(self) -> "Figure":
        from matplotlib.figure import Figure

        names = self.data.names
        figure = Figure(figsize=(6, 1.2 + 0.45 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        place_Q = np.arange(len(names))
        axes.plot(self.data.dense_hits.accuracy()[:, 0], place_Q, "k|", markersize=14, label="dense")
        for number, (name, found) in enumerate(self.measured.items()):
            offset = 0.12 * (number - (len(self.measured) - 1) / 2)
            axes.plot(found.hits.accuracy()[:, -1], place_Q + offset, "o", markersize=5, label=_words(name))
        axes.axvline(0.5, color="#a0aec0", linewidth=1)
        axes.set_yticks(place_Q, [name.replace("$", r"\$") for name in names])
        axes.invert_yaxis()
        axes.set(xlabel=f"balanced accuracy, {NUM_LATENTS[-1]} latents")
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        return figure

    def _density_figure(self) -> "Figure":
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.2), layout="constrained")
        axes = figure.add_subplot()
        edges = np.linspace(-np.ceil(np.log10(self.data.num_tokens)), 0, 41).tolist()
        for name, found in self.measured.items():
            fired_K = found.density_K[found.density_K > 0]
            axes.hist(np.log10(fired_K), bins=edges, histtype="step", label=_words(name))
        axes.set(xlabel="log10 of the share of tokens", ylabel="latents")
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        return figure


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    return table([_escaped(cell) for cell in head], [[_escaped(cell) for cell in row] for row in rows])


def _meanings(measures: Mapping[str, tuple[str, str]]) -> str:
    text = "; ".join(f"{name}: {meaning}" for name, meaning in measures.values())
    return f'<p class="muted">{_escaped(text)}.</p>'


def _escaped(text: str) -> str:
    from html import escape

    return escape(text)


def _setting_words(settings: Mapping[str, Any]) -> str:
    """Names and values in a row, without those that are not set."""
    parts = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            parts.append(_setting_words(value))
        elif value is not None:
            parts.append(f"{_words(name)} {value}")
    return ", ".join(filter(None, parts))


def _series(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def _finite(value: Any) -> Any:
    """The same as JSON can hold it: None in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
