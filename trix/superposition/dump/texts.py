"""The tokens of all texts, and in which batches a model reads them.

N tokens of all texts, B texts of a batch, T tokens of its longest text.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trix.superposition.backends.base_model import CausalLMBackend

if TYPE_CHECKING:
    import pandas as pd

TEXTS_AT_ONCE = 1024
ORDER_SEED = 0


class TextBatch(NamedTuple):
    """document_B: int64, numbers of the texts. id_BT: int64, 0 for padding. is_token_BT: bool, False for padding."""

    document_B: Tensor
    id_BT: Tensor
    is_token_BT: Tensor


@dataclass(frozen=True)
class TokenizedTexts:
    """Ragged rows: the tokens of text d are id_N[start[d]:start[d + 1]].

    id_N: int32. start: int64 [texts + 1]. label: int64 [texts].
    """

    id_N: NDArray[np.int32]
    start: NDArray[np.int64]
    label: NDArray[np.int64]

    @classmethod
    def from_frame(cls, df: "pd.DataFrame", text_col: str, label_col: str, backend: CausalLMBackend, max_len: int) -> Self:
        """The texts of a frame, in its order.

        Raises:
            ValueError: a column that the frame lacks, a text that is no str, labels that are no ints, or as the tokenizer.
        """
        for column in (text_col, label_col):
            if column not in df.columns:
                raise ValueError(f"column ({column!r}) must be one of the frame's: {', '.join(map(str, df.columns))}")
        texts = df[text_col].tolist()
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"{text_col} of row {row} ({text!r}) must be a str")
        label = df[label_col].to_numpy()
        if label.dtype.kind not in "iub":
            raise ValueError(f"{label_col} ({label.dtype}) must be ints; load_titles_csv numbers names")
        ids: list[NDArray[np.int32]] = []
        start = np.zeros(len(texts) + 1, dtype=np.int64)
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            found = backend.tokenize(texts[first : first + TEXTS_AT_ONCE], max_len)
            is_token_BT = found["attention_mask"].bool()
            ids.append(found["input_ids"][is_token_BT].to("cpu", torch.int32).numpy())
            start[first + 1 : first + 1 + len(is_token_BT)] = is_token_BT.sum(dim=1).cpu().numpy()
        return cls(np.concatenate([np.zeros(0, dtype=np.int32), *ids]), start.cumsum(), label.astype(np.int64))

    @property
    def length(self) -> NDArray[np.int64]:
        """Tokens of each text."""
        return np.diff(self.start)

    def digest(self) -> str:
        """SHA-256, in hex, of tokens, their division into texts, and labels."""
        total = hashlib.sha256()
        for array in (self.start, self.label, self.id_N):
            total.update(np.ascontiguousarray(array).data)
        return total.hexdigest()

    def batches(self, batch_size: int) -> list[NDArray[np.int64]]:
        """The texts that have tokens, in batches of like length; the batches come in an order drawn with a fixed seed, so that
        each part of a dump holds short texts and long ones.
        """
        length = self.length
        by_length = np.argsort(length, kind="stable")
        by_length = by_length[length[by_length] > 0]
        batches = [by_length[first : first + batch_size] for first in range(0, len(by_length), batch_size)]
        return [batches[index] for index in np.random.default_rng(ORDER_SEED).permutation(len(batches))]

    def batch(self, document: NDArray[np.int64]) -> TextBatch:
        """Some texts, padded on the right to the longest of them."""
        length = self.length[document]
        place_BT = np.arange(length.max())[None, :]
        is_token_BT = place_BT < length[:, None]
        id_BT = np.zeros(is_token_BT.shape, dtype=np.int64)
        id_BT[is_token_BT] = self.id_N[(self.start[document][:, None] + place_BT)[is_token_BT]]
        return TextBatch(torch.from_numpy(document), torch.from_numpy(id_BT), torch.from_numpy(is_token_BT))
