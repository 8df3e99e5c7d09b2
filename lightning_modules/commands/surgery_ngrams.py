"""``trix surgery CKPT insert --ngrams``: a signature for n-grams, what it will claim, and what it claims."""

from argparse import Namespace
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_modules.checkpoint_data import run_data
from lightning_modules.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_modules.tasks import TrixTask
    from lightning_modules.tasks.answers import Page
    from trix.introspection.ngram_design import Forecast
    from trix.introspection.ngrams import CountedText, NgramReader

MEASURED_TOKENS = 16384
ESCAPED = {"n": "\n", "t": "\t", ",": ",", "-": "-", "\\": "\\"}
MAX_POSSIBLE = 2**16  # n-grams that are all looked at where there is no text
SHOWN = 8  # n-grams and tiles that are told besides


@dataclass(frozen=True)
class Designed:
    """signature_D: int8. forecast: what it will claim of the n-grams of a text. page: held-out data, or why there is none."""

    signature_D: "Tensor"
    forecast: "Forecast"
    text: "CountedText"
    page: "Page | str"


def split_ngrams(text: str) -> list[str]:
    r"""The n-grams of "th,Th": between commas; "\," is a comma, "\-" a dash, "\\" a backslash, "\n" a line feed, "\t" a tab.

    Raises:
        UserError: another character after a backslash.
    """
    ngrams = [""]
    characters = iter(text)
    for character in characters:
        if character == ",":
            ngrams.append("")
            continue
        if character == "\\":
            following = next(characters, "")
            if following not in ESCAPED:
                raise UserError(f"--ngrams ({text}): a backslash must be followed by n, t, a comma, a dash or a backslash")
            character = ESCAPED[following]
        ngrams[-1] += character
    return ngrams


def ids_of(ngrams: Sequence[str], names: Sequence[str], num_tokens: int) -> list[list[int]]:
    """Their ids.

    Args:
        names: the character of each id; "" for one that is none.

    Raises:
        UserError: an n-gram of another length, with a character outside the vocabulary, or named twice.
    """
    id_of = {name: token for token, name in enumerate(names) if name}
    for place, ngram in enumerate(ngrams):
        if len(ngram) != num_tokens:
            raise UserError(
                f"n-gram {ngram!r} (length {len(ngram)}) must have length {num_tokens}: the model reads "
                f"{num_tokens} character{'' if num_tokens == 1 else 's'} at a time (context_tokens)"
            )
        unknown = next((character for character in ngram if character not in id_of), None)
        if unknown is not None:
            raise UserError(f"n-gram {ngram!r} holds {unknown!r}, outside the vocabulary of the model")
        if ngram in ngrams[:place]:
            raise UserError(f"n-gram {ngram!r} must not be named twice")
    return [[id_of[character] for character in ngram] for ngram in ngrams]


def design(task: "TrixTask", checkpoint: dict[str, Any], options: Namespace, ckpt: str, trusted: Collection[str]) -> Designed:
    """The signature and what it will claim.

    Raises:
        UserError: as :func:`split_ngrams` and :func:`ids_of`; the model does not route on context, or its tokens are no
            characters. ValueError: the layer has no such tile, or none with a signature.
    """
    import torch

    from trix.introspection.ngram_design import design_signature, forecast
    from trix.introspection.ngrams import NgramReader, routes_on_context
    from trix.nn import PADDING_TOKEN, Classifier

    ngrams = split_ngrams(options.ngrams)
    vocabulary = getattr(task, "vocabulary", None)
    if not isinstance(vocabulary, str):
        raise UserError(f"{ckpt}: --ngrams needs a model whose tokens are characters, and the task has no vocabulary")
    if not routes_on_context(task.network):
        raise UserError(f"{ckpt}: --ngrams needs a model that routes on context (route_on: context), which this one does not")
    names = list(vocabulary)
    if isinstance(task.network, Classifier):
        names[PADDING_TOKEN] = ""
    reader = NgramReader(task.network)
    wanted_MJ = torch.tensor(ids_of(ngrams, names, reader.num_tokens))
    page: Page | str
    try:
        page = task.page(run_data(task, checkpoint, ckpt, trusted), MEASURED_TOKENS)
    except UserError as error:  # the data is not named, or not here
        page = str(error)
    counted = None if isinstance(page, str) else page.counted
    text = _each_once(reader, names) if counted is None else counted
    signature_D = design_signature(reader, options.layer, options.tile, wanted_MJ, text.ngrams)
    seen = forecast(reader, options.layer, options.tile, signature_D, wanted_MJ, text.ngrams)
    return Designed(signature_D, seen, text, page)


def _each_once(reader: "NgramReader", names: Sequence[str]) -> "CountedText":
    """Instead of a text: all n-grams of ids that have names, or a part of them where they are many."""
    import torch

    from trix.introspection.ngrams import CountedText, Ngrams, all_ngrams, joined

    token_V = torch.tensor([token for token, name in enumerate(names) if name])
    if len(token_V) ** reader.num_tokens <= MAX_POSSIBLE:
        ngrams, source = all_ngrams(len(token_V), reader.num_tokens), "each possible one once"
    else:
        place_NJ = torch.randint(len(token_V), (2**14, reader.num_tokens), generator=torch.Generator().manual_seed(0))
        ngrams = joined([Ngrams(place_NJ, torch.ones(len(place_NJ), dtype=torch.int64))])
        source = "possible ones drawn at random"
    return CountedText(ngrams._replace(id_NJ=token_V[ngrams.id_NJ]), names, source)


def print_forecast(designed: Designed) -> None:
    """What the signature will claim, n-gram by n-gram, and from which tiles."""
    seen, text = designed.forecast, designed.text
    is_claimed_M, others = seen.claims_wanted(), seen.others()
    ids, share_M = seen.after.ngrams.id_NJ[seen.wanted_M].tolist(), seen.after.shares()[seen.wanted_M]
    from_M = seen.before.decision.tile_idx[seen.wanted_M, 0].tolist()
    to_M = seen.after.decision.tile_idx[seen.wanted_M, 0].tolist()
    wanted, besides = float(share_M[is_claimed_M].sum()), sum(share for _, share in others)
    print(
        f"claims  {int(is_claimed_M.sum())} of the {len(ids)} n-grams, {_percent(wanted)} of the text, and {_percent(besides)} "
        f"besides: {_percent(wanted + besides)} (n-grams of {seen.after.num_tokens:,} tokens: {text.source})"
    )
    for ngram, is_claimed, share, old, new in zip(ids, is_claimed_M.tolist(), share_M.tolist(), from_M, to_M, strict=True):
        now = "yes" if is_claimed else f"no, it goes to tile {new}"
        print(f"        {_written(ngram, text)}  {now}; {_percent(share)} of the text, until now of tile {old}")
    _print_shares("besides", [(_written(ngram, text), share) for ngram, share in others])
    _print_shares("from", [(f"tile {tile}", share) for tile, share in seen.taken_from()])
    print(f"leaves  {_percent(seen.given_up())} of the text, which tile {seen.tile_idx} had, to other tiles")


def print_measured(task: "TrixTask", designed: Designed, layer: int) -> None:
    """What the tile gets of the held-out data of the task as it is now."""
    import torch

    from trix.introspection import TriXIntrospector
    from trix.introspection.ngrams import NgramReader, count_ngrams, is_among, ngrams_at
    from trix.introspection.tile_card import is_counted

    seen, page = designed.forecast, designed.page
    if isinstance(page, str):
        print(f"not measured: {page}")
        return
    reader = NgramReader(task.network)
    capture = TriXIntrospector(page.network).capture(torch.split(page.inputs, 8))
    decision = capture.decision[layer]
    is_token_T = is_counted(decision)
    mask_BT = is_token_T.reshape(page.inputs.shape)
    rate = float(TriXIntrospector(page.network).routing_distribution(capture, layer)[seen.tile_idx])
    predicted = float(reader.claims(count_ngrams(page.inputs, reader.num_tokens, mask_BT), layer).rates()[seen.tile_idx])
    wanted_MJ = seen.after.ngrams.id_NJ[seen.wanted_M]
    id_TJ = ngrams_at(page.inputs, reader.num_tokens, mask_BT)
    is_wanted_T = is_among(id_TJ, wanted_MJ)
    is_claimed_T = ((decision.tile_idx == seen.tile_idx) & (decision.weight != 0)).any(dim=-1)[is_token_T]
    print(
        f"found   {_percent(rate)} of {len(id_TJ):,} tokens of held-out data go to tile {seen.tile_idx} (their own n-grams "
        f"predict {_percent(predicted)}); of the {int(is_wanted_T.sum())} at which a requested n-gram ends, "
        f"{int((is_wanted_T & is_claimed_T).sum())}"
    )


def _print_shares(name: str, shares: Sequence[tuple[str, float]]) -> None:
    shown = ", ".join(f"{what} {_percent(share)}" for what, share in shares[:SHOWN])
    more = f" and {len(shares) - SHOWN} more" if len(shares) > SHOWN else ""
    print(f"{name:<7} {shown or 'nothing'}{more}")


def _written(ids: Sequence[int], text: "CountedText") -> str:
    return repr("".join(text.names[token] for token in ids if token >= 0))


def _percent(share: float) -> str:
    return f"{share:.2%}"
