"""What a report is measured on, and how its tokens and classes are shown to a reader."""

import html
from collections.abc import Sequence

import torch
from torch import Tensor

from trix.introspection.page import picture
from trix.introspection.symbols import visible

CONTEXT_BEFORE, CONTEXT_AFTER = 20, 10


class Sample:
    """B sequences of T tokens.

    Args:
        inputs: [B, T], or float [B, T, F]. tokens: B sequences of T strings, how each token is shown; without them a sequence
            of [B, T, F] is shown as a picture, a token being one of its rows.
        labels: int64 [B] or [B, T], the classes whose claims are told; without them each distinct token is a class of its own.
        class_names: what the labels mean; without them, their numbers.

    Attributes:
        label_N: int64 [B * T], the class of each token. class_names. class_kind: "class", or "token" without labels.

    Raises:
        ValueError: neither tokens nor labels, no tokens for inputs of [B, T], or parts that do not fit each other.
    """

    def __init__(
        self,
        inputs: Tensor,
        tokens: Sequence[Sequence[str]] | None = None,
        labels: Tensor | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        shape = inputs.shape[:2]
        if tokens is None and (labels is None or inputs.dim() != 3):
            raise ValueError(f"tokens (None) must be given, or labels with inputs {tuple(inputs.shape)} of 3 dimensions")
        if tokens is not None:
            lengths = {len(sequence) for sequence in tokens}
            if len(tokens) != shape[0] or lengths != {shape[1]}:
                raise ValueError(f"tokens ({len(tokens)} of lengths {sorted(lengths)}) must fit inputs {tuple(shape)}")
        if labels is not None and labels.shape not in (shape, shape[:1]):
            raise ValueError(f"labels {tuple(labels.shape)} must have shape {tuple(shape)} or {tuple(shape[:1])}")
        self.inputs, self.tokens, self.length = inputs, tokens, shape[1]
        self.class_kind = "token" if labels is None else "class"
        if labels is None:
            assert tokens is not None
            flat = [token for sequence in tokens for token in sequence]
            self.class_names = tuple(sorted(set(flat)))
            place = {name: index for index, name in enumerate(self.class_names)}
            self.label_N = torch.tensor([place[token] for token in flat])
        else:
            label_BT = labels.reshape(len(labels), -1).expand(shape)
            self.label_N = label_BT.reshape(-1)
            self.class_names = tuple(class_names or map(str, range(int(self.label_N.max()) + 1)))
            if len(self.class_names) <= int(self.label_N.max()):
                raise ValueError(
                    f"number of class_names ({len(self.class_names)}) must be > the largest label ({int(self.label_N.max())})"
                )

    def first_tokens(self) -> list[str]:
        """How the tokens of the first sequence are written below a figure."""
        return [str(row) for row in range(self.length)] if self.tokens is None else list(self.tokens[0])

    def contexts(self, token_idx: Sequence[int], max_contexts: int) -> str:
        """HTML: the first of the tokens in their surroundings, each surrounding once."""
        shown: dict[str, None] = {}
        for index in token_idx:
            if len(shown) == max_contexts:
                break
            shown[self._context(index)] = None
        style = "pictures" if self.tokens is None else "contexts"
        return f'<div class="{style}">{"".join(shown)}</div>'

    def _context(self, index: int) -> str:
        sequence, place = divmod(index, self.length)
        if self.tokens is None:
            return picture(self.inputs[sequence], place, f"{self.class_names[self.label_N[index]]}, row {place}")
        before, after = (
            "".join(" " if token == " " else visible(token) for token in part)
            for part in (
                self.tokens[sequence][max(place - CONTEXT_BEFORE, 0) : place],
                self.tokens[sequence][place + 1 : place + 1 + CONTEXT_AFTER],
            )
        )
        marked = html.escape(visible(self.tokens[sequence][place]))
        padding = " " * (CONTEXT_BEFORE - len(before))
        return f'<div class="context">{padding}{html.escape(before)}<mark>{marked}</mark>{html.escape(after)}</div>'
