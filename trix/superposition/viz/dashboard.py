"""All that one page can show of the latents of an autoencoder: facts of the whole, a list of latents, a card of each.

Legend: K latents, M of them that are shown, V vocabulary, A tokens or neighbours kept, H bins of a histogram.
"""

import base64
import hashlib
import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from trix.introspection.page import code, definitions, heading, page
from trix.superposition.analysis.directions import DirectionLogits, direction_logits, nearest_rows
from trix.superposition.analysis.stats import DENSITY_BORDERS, log_densities
from trix.superposition.analysis.survey import SAMPLE_SIZE, Floats, LatentRecord, Survey
from trix.superposition.viz.dashboard_style import SCRIPT, STYLE
from trix.superposition.viz.passages import LEFT_OUT, PASSAGE_STYLE, passage
from trix.superposition.viz.token_texts import Tokenizer, token_texts, whole_characters

MAX_BYTES = 9_000_000  # of all cards together
MAX_LATENTS = 4096
MAX_TOKEN_CHARACTERS = 40  # of a longer token the rest is left out


@dataclass(frozen=True)
class Vocabulary:
    """How the model writes tokens. size: V. unembed: logits of streams [N, O]; None where decoder rows are no such streams."""

    tokenizer: Tokenizer
    size: int
    unembed: Callable[[Tensor], Tensor] | None


def dashboard(
    title: str, facts: Iterable[tuple[str, str]], survey: Survey, row_KO: Tensor, vocabulary: Vocabulary, note: str = ""
) -> str:
    """A standalone HTML page about an autoencoder, which loads nothing; all texts are escaped.

    It can be read without its script, which searches and sorts. The cards of the latents have MAX_BYTES together. If they need
    more, the last examples of each group are left out of the largest cards, which say so.

    Args:
        title: heading. facts: name and value of what is known of the whole autoencoder. survey: of the latents to show, at most
            MAX_LATENTS. row_KO: decoder. note: what is said of the choice of latents.

    Raises:
        ValueError: more latents, a token id that the tokenizer does not know, or as :func:`direction_logits`.
    """
    records = survey.latents
    if len(records) > MAX_LATENTS:
        raise ValueError(f"number of latents on a page ({len(records)}) must be <= {MAX_LATENTS}")
    latents = [record.latent for record in records]
    logits = None
    if vocabulary.unembed is not None:
        logits = direction_logits(row_KO[latents], vocabulary.unembed, vocabulary.size)
    cards = _Cards(survey, vocabulary.tokenizer, logits, nearest_rows(row_KO, latents))
    head = f"<style>{PASSAGE_STYLE}{STYLE}</style>{_policy()}"  # the colour in the dark comes after that in the light
    parts = [
        f"<main>{definitions(facts)}",
        _density_section(survey.density_K),
        heading(2, "Latents", f"{note} The number leads to the card of the latent."),
        '<p><a href="#cards">Skip the list</a></p>',
        cards.search(),
        cards.list(),
        _explanation(survey, is_with_logits=logits is not None),
        *cards.cards(),
        f"</main><script>{SCRIPT}</script>",
    ]
    return page(title, "".join(parts), head)


def _policy() -> str:
    """The page loads nothing, and runs no script but its own."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f'<meta http-equiv="Content-Security-Policy" content="{policy}">'


def _density_section(density_K: Floats) -> str:
    count_H, _ = np.histogram(log_densities(density_K), DENSITY_BORDERS)
    text = f"{count_H[0]:,} of {len(density_K):,} latents never fire."
    used = np.flatnonzero(count_H[1:]) + 1
    if len(used) == 0:
        return heading(2, "How often latents fire", text)
    text += " The others, by the share of the tokens on which they fire, on a logarithmic scale:"
    first, last = int(used[0]), int(used[-1])
    low, high = 10 ** DENSITY_BORDERS[first], 10 ** DENSITY_BORDERS[last + 1]
    drawing = _histogram(count_H[first : last + 1].tolist(), "latents", low, high)
    return heading(2, "How often latents fire", text) + drawing


def _explanation(survey: Survey, *, is_with_logits: bool) -> str:
    logits = (
        "Logits: the decoder row, scaled to a mean square of 1, goes through the final norm and the head of the model as if it "
        "were the whole stream; what an empty stream gives is subtracted. Nothing that later blocks would do is in it. "
        if is_with_logits
        else "There are no logits, as the decoder does not write into the residual stream. "
    )
    tiles = (
        "Tiles: the best tile of the tokens at which the latent fires; share of these tokens, and lift, which is that share "
        "over the share among all tokens: 1 by chance. Where the token alone decides the tile, this only says on which tokens "
        "the latent fires. "
        if any(record.tiles for record in survey.latents)
        else ""
    )
    text = (
        "The stronger the colour behind a token, the larger the activation, up to the largest one of the latent; a pointer "
        "held over a token shows the number. The token that an example was chosen for is underlined. Top: the largest "
        "activations. The other groups divide the activations above 0, ordered by size, into four parts of equal number, and "
        f"show tokens drawn from each at random (of more than {SAMPLE_SIZE} activations, from a random sample of that many). "
        f"The passages of a latent do not overlap. {LEFT_OUT} stands for text left out. {logits}{tiles}Mass: the part of the "
        "latent in the summed activation times norm of the decoder row, over all latents."
    )
    return heading(2, "Cards", text, anchor="cards")


class _Cards:
    """The list of latents, and their cards."""

    def __init__(
        self, survey: Survey, tokenizer: Tokenizer, logits: DirectionLogits | None, neighbours: tuple[Tensor, Tensor]
    ) -> None:
        self.survey, self.tokenizer, self.logits = survey, tokenizer, logits
        self.neighbour_MA, self.cosine_MA = neighbours
        self.shown = {record.latent for record in survey.latents}
        ids = {token for record in survey.latents for group in record.groups for one in group.examples for token in one.token_N}
        if logits is not None:
            ids |= {*logits.top_MA.flatten().tolist(), *logits.bottom_MA.flatten().tolist()}
        known = sorted(ids)
        self.text_of = dict(zip(known, token_texts(tokenizer, known), strict=True))

    def search(self) -> str:
        return (
            '<p id="tools" hidden><label>Search latents by number or text: <input id="search" type="search"></label> '
            '<span id="found" class="muted" role="status"></span></p>'
        )

    def list(self) -> str:
        names = ("latent", "fires on", "mass", "largest", "fires most on", "raises most")
        head = "".join(f'<th scope="col">{name}</th>' for name in names)
        rows = "".join(self._row(index, record) for index, record in enumerate(self.survey.latents))
        return (
            '<div class="scroll list" tabindex="0" role="region" aria-label="list of latents">'
            f'<table id="list"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        )

    def _row(self, index: int, record: LatentRecord) -> str:
        raised = ""
        if self.logits is not None:
            raised = " ".join(self._code(token) for token in self.logits.top_MA[index, :3].tolist())
        cells = (
            f'<a href="#l{record.latent}">{record.latent}</a>',
            _percent(record.num_active / self.survey.num_tokens),
            _percent(record.mass_share),
            f"{record.largest:.3g}",
            "".join(map(self._code, _strongest(record))),
            raised,
        )
        return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"

    def cards(self) -> Iterable[str]:
        parts = [(self._head(index, record), self._groups(record)) for index, record in enumerate(self.survey.latents)]
        cards = [_card(head, groups) for head, groups in parts]
        limit = _largest_size([len(card.encode()) for card in cards], MAX_BYTES)
        for card, (head, groups) in zip(cards, parts, strict=True):
            num_examples = max((len(examples) for _, examples in groups), default=0)
            while len(card.encode()) > limit and num_examples > 0:
                num_examples -= 1
                card = _card(head, groups, num_examples)
            yield card

    def _head(self, index: int, record: LatentRecord) -> str:
        title = f'<section id="l{record.latent}"><h3>Latent {record.latent}</h3>'
        blocks = []
        if record.num_active == 0:
            fires = f"Dead: it fires at none of {self.survey.num_tokens:,} tokens."
        else:
            fires = (
                f"Fires on {_percent(record.num_active / self.survey.num_tokens)} of the tokens ({record.num_active:,}); "
                f"{_percent(record.mass_share)} of the mass; largest activation {record.largest:.4g}."
            )
            blocks.append(f"<div><h4>Activations</h4>{_histogram(record.count_H, 'tokens', 0, record.largest)}</div>")
        if self.logits is not None:
            blocks.append(self._logits(index, self.logits))
        blocks.append(f"<div><h4>Nearest decoder rows, by cosine</h4>{self._neighbours(index)}</div>")
        if record.tiles:
            rows = "".join(f"<li>tile {tile.tile}: {_percent(tile.share)}, lift {tile.lift:.3g}</li>" for tile in record.tiles)
            blocks.append(f"<div><h4>Tiles</h4><ol>{rows}</ol></div>")
        text = f'<p class="muted">{fires} <a href="#list">Back to the list</a></p>'
        return f'{title}{text}<div class="facts">{"".join(blocks)}</div>'

    def _logits(self, index: int, logits: DirectionLogits) -> str:
        lists = []
        for name, token_MA, value_MA in (
            ("Largest logits", logits.top_MA, logits.top_value_MA),
            ("Smallest logits", logits.bottom_MA, logits.bottom_value_MA),
        ):
            pairs = zip(token_MA[index].tolist(), value_MA[index].tolist(), strict=True)
            rows = "".join(f"<li>{self._code(token)} {value:+.3g}</li>" for token, value in pairs)
            lists.append(f"<div><h4>{name}</h4><ol>{rows}</ol></div>")
        low, high = float(logits.bottom_value_MA[index, 0]), float(logits.top_value_MA[index, 0])
        drawing = _histogram(logits.count_MH[index].tolist(), "tokens of the vocabulary", low, high)
        return f"{''.join(lists)}<div><h4>Logits</h4>{drawing}</div>"

    def _neighbours(self, index: int) -> str:
        rows = []
        for latent, cosine in zip(self.neighbour_MA[index].tolist(), self.cosine_MA[index].tolist(), strict=True):
            name = f'<a href="#l{latent}">{latent}</a>' if latent in self.shown else str(latent)
            rows.append(f"<li>{name} {cosine:+.2f}</li>")
        return f"<ol>{''.join(rows)}</ol>"

    def _groups(self, record: LatentRecord) -> Sequence[tuple[str, Sequence[str]]]:
        """Heading and examples of each group."""
        found = []
        for group in record.groups:
            span = f"{group.low:.3g} to {group.high:.3g}"
            title = f'<h4>{html.escape(group.name)} <span class="muted">activations {span}</span></h4>'
            examples = []
            for one in group.examples:
                texts = whole_characters(self.tokenizer, one.token_N, [self.text_of[token] for token in one.token_N])
                shown = list(map(_cut, texts))
                examples.append(passage(shown, one.value_N, record.largest, goes_on=one.goes_on, place=one.place))
            found.append((title, examples))
        return found

    def _code(self, token: int) -> str:
        return code(_cut(self.text_of[token]))


def _strongest(record: LatentRecord) -> list[int]:
    """The token with the largest activation, none of a dead latent."""
    return [one.token_N[one.place] for group in record.groups[:1] for one in group.examples[:1]]


def _card(head: str, groups: Sequence[tuple[str, Sequence[str]]], limit: int | None = None) -> str:
    """At most ``limit`` examples of each group, and how many that leaves out."""
    text = "".join(title + "".join(examples[:limit]) for title, examples in groups)
    num_left_out = 0 if limit is None else sum(len(examples[limit:]) for _, examples in groups)
    more = f'<p class="muted">{num_left_out} more examples would make the page too long.</p>' if num_left_out else ""
    return f"{head}{text}{more}</section>"


def _largest_size(sizes: Sequence[int], room: int) -> int:
    """The size to which the largest have to be cut so that all fit into the room."""
    for index, size in enumerate(sorted(sizes)):
        share = room // (len(sizes) - index)
        if size > share:
            return share
        room -= size
    return max(sizes)


def _histogram(counts: Sequence[int], unit: str, low: float, high: float) -> str:
    """Bars, with their range below and the number of the tallest one."""
    tallest = max(counts)
    heights = [round(100 * count / tallest) or int(count > 0) for count in counts]
    path = "".join(f"M{place} 100v-{height}h1v{height}z" for place, height in enumerate(heights) if height)
    label = f"{low:.3g} to {high:.3g}; tallest bar: {tallest:,} {unit}"
    view = f'viewBox="0 0 {len(counts)} 100" preserveAspectRatio="none"'
    drawing = f'<svg class="bars" {view} role="img" aria-label="histogram, {label}"><path d="{path}"/></svg>'
    return f'{drawing}<p class="muted">{label}</p>'


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TOKEN_CHARACTERS else text[:MAX_TOKEN_CHARACTERS] + LEFT_OUT


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
