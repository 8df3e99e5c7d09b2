"""Text in which the activation of a latent stands behind each token, as HTML."""

import html
from collections.abc import Sequence

from trix.introspection.symbols import visible

LEFT_OUT = "…"
NO_TEXT = "·"  # a token with a colour, but without a text of its own
# The opacity --a of a token is its own; in the dark the colour is deeper, so that light text stays readable on it.
PASSAGE_STYLE = """
:root { --mark: 224 130 20 } mark { background: rgb(var(--mark) / var(--a)); color: inherit }
mark.own { text-decoration: underline; text-underline-offset: .2em }
"""
DARK_PASSAGE_STYLE = ":root { --mark: 156 74 0 }"


def passage(
    texts: Sequence[str],
    values: Sequence[float],
    largest: float,
    *,
    goes_on: tuple[bool, bool] = (False, False),
    place: int | None = None,
    min_alpha: float = 0.0,
) -> str:
    """A paragraph of escaped tokens. Behind a token with activation z > 0 stands a colour of opacity

        min_alpha + (1 - min_alpha) z / largest,

    and a pointer held over it shows z. White space and control characters are visible; spaces in a token without a colour stay
    spaces.

    Args:
        texts, values: token by token. goes_on: whether there is text left out before and after. place: of a token that is
            underlined.
    """
    before, after = (LEFT_OUT if is_cut else "" for is_cut in goes_on)
    tokens = (
        _token(text, value, largest, min_alpha, index == place)
        for index, (text, value) in enumerate(zip(texts, values, strict=True))
    )
    return f'<p class="passage" dir="auto">{before}{"".join(tokens)}{after}</p>'


def _token(text: str, value: float, largest: float, min_alpha: float, is_own: bool) -> str:
    if value == 0:
        return html.escape(" ".join(map(visible, text.split(" "))), quote=False)
    alpha = min_alpha + (1 - min_alpha) * value / largest
    kind = ' class="own"' if is_own else ""
    shown = html.escape(visible(text), quote=False) or NO_TEXT
    return f'<mark{kind} style="--a:{alpha:.3g}" title="{value:.4g}">{shown}</mark>'
