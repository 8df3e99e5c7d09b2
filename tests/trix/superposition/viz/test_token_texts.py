import pytest
from hypothesis import given
from hypothesis import strategies as st

from trix.superposition.viz.token_texts import PART, token_texts, whole_characters


class Pieces:
    """A tokenizer of Hugging Face, as far as it is used: pieces of SentencePiece and of byte-level pairs."""

    PIECES = ("▁the", "cat", "Ġsat", "Ã©", "▁")
    DECODED = ("the", "cat", " sat", "é", "")

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        return [self.PIECES[idx] if idx < len(self.PIECES) else None for idx in ids]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.DECODED[idx] for idx in ids)

    def __call__(self, texts: object) -> object:
        raise AssertionError("it would tokenize")


def test_a_vocabulary_a_tokenizer_or_a_function_says_how_tokens_are_written() -> None:
    assert token_texts("abc ", [2, 3, 0]) == ["c", " ", "a"]
    assert token_texts(Pieces(), [0, 1, 2, 3, 4]) == [" the", "cat", " sat", "é", " "]
    assert token_texts(lambda ids: [str(-idx) for idx in ids], [7, 8]) == ["-7", "-8"]


def test_ids_that_a_tokenizer_does_not_know() -> None:
    for idx in (-1, 3):
        with pytest.raises(ValueError, match=rf"token id \({idx}\) must be >= 0 and < size of the vocabulary \(3\)"):
            token_texts("abc", [0, idx])
    with pytest.raises(ValueError, match=r"token id \(9\) must be in the tokenizer's vocabulary"):
        token_texts(Pieces(), [9])
    with pytest.raises(ValueError, match=r"texts of the tokenizer \(1\) must be as many as the ids that it got \(2\)"):
        token_texts(lambda ids: [str(ids)], [1, 2])


class Bytes:
    """A tokenizer of Hugging Face in which each byte is a token."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [chr(idx) for idx in ids]

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


@given(text=st.text(st.characters(codec="utf-8", exclude_characters=PART), max_size=12), cut=st.integers(0, 3))
def test_characters_that_are_spread_over_tokens_stand_whole_at_the_first(text: str, cut: int) -> None:
    ids = list(text.encode())[cut:]
    texts = whole_characters(Bytes(), ids, token_texts(Bytes(), ids))
    assert len(texts) == len(ids)
    expected = bytes(ids).decode(errors="ignore").replace(PART, "")
    assert "".join(texts).replace(PART, "") == expected
    if cut == 0:
        firsts = [place for place, byte in enumerate(ids) if byte & 0xC0 != 0x80]
        assert [place for place, shown in enumerate(texts) if shown] == firsts


def test_other_tokenizers_know_whole_characters_alone() -> None:
    assert whole_characters(PART + "a", [0, 1], [PART, "a"]) == [PART, "a"]


def test_with_a_tokenizer_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="needs a tokenizer of transformers")
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(
        ["a cat sat é"] * 9,
        tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe)
    ids = tokenizer("a cat é")["input_ids"]
    assert token_texts(tokenizer, ids) == ["a", " cat", " é"]
