"""How signatures and characters are shown: colours, and signs for what has no shape."""

# Blue and orange stay apart for colour-blind readers; grey recedes.
SIGNATURE_COLOURS = {-1: "#2166ac", 0: "#eeeeee", 1: "#e08214"}
BEGINNING = "⊢"  # in an n-gram, the place of a token before the beginning of a text


def visible(text: str) -> str:
    """The text with a sign instead of each space and control character."""
    return "".join(_VISIBLE.get(character, character) for character in text)


_VISIBLE = {chr(code): chr(0x2400 + code) for code in range(32)} | {" ": "␣", "\n": "⏎", "\t": "⇥", "\x7f": "␡"}
