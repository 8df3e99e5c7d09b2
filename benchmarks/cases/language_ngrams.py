"""Signatures designed for a language's n-grams, inserted into a trained classifier that routes on context.

Data, network and training as in language_id (98 languages, 2 layers of 32 tiles), but signatures read codes of 2 characters
(`route_on: context`). Characteristic of a language are the pairs of characters with the largest p log(p / q), p being the
pair's share of the language's training texts, q that of all others. They are dealt, in the order of their last characters, to
some tiles, those with the fewest tokens; `design_signature` makes a signature for each part, from the counts of pairs in the
training texts alone; the last layer gets them, frozen, and training goes on for `further_steps` at a learning rate of 5e-4.

Of the test texts, as the model routes them, before, right after and after further training: the share of the characteristic
pairs that goes to the chosen tiles; of all of the language's characters; and the tiles' share of all characters, which is also
predicted from the counts of pairs in the training texts.

Arms: one, two and four tiles; four tiles with random signatures of as many active dimensions; none.
"""

import argparse
import copy
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from case_options import whole
from cases import language_id
from rich.progress import track
from torch import Tensor

from lightning_modules.data.language_id import LanguageIdDataModule
from trix.introspection import NgramReader, count_ngrams, design_signature
from trix.introspection.ngrams import NO_TOKEN, Ngrams, is_among, ngrams_at
from trix.nn import PADDING_TOKEN, Classifier, FFNConfig

ARMS = {"1 tile": 1, "2 tiles": 2, "4 tiles": 4, "4 tiles, random": 4, "no surgery": 4}
TIMES = ("before", "right after", "after further training")
MEASURES = ("characteristic", "language", "all")
FURTHER_LR = 5e-4
LAYER = 1


@dataclass(frozen=True)
class Texts:
    """token_NT: the texts of one split. label: the language. characteristic_MJ: its pairs, by their last characters."""

    token_NT: Tensor
    label_N: Tensor
    label: int
    characteristic_MJ: Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--language", default="hu", help="whose n-grams are claimed (default: %(default)s)")
    parser.add_argument(
        "--ngrams", type=whole(max(ARMS.values())), default=40, help="characteristic n-grams (default: %(default)s)"
    )
    parser.add_argument("--steps", type=whole(1), default=600, help="training steps before surgery (default: %(default)s)")
    parser.add_argument("--further-steps", type=whole(1), default=150, help="training steps after it (default: %(default)s)")
    parser.add_argument("--seeds", type=whole(1), default=3, help="seeds 0 to N - 1 (default: %(default)s)")


def run(language: str, ngrams: int, steps: int, further_steps: int, seeds: int) -> dict[str, Any]:
    languages = LanguageIdDataModule().class_names
    if language not in languages:
        raise SystemExit(f"--language: {language} must be one of {', '.join(languages)}")
    runs = [operate(language, ngrams, steps, further_steps, seed) for seed in range(seeds)]
    return {"language": language, "ngrams": ngrams, "runs": runs}


def operate(language: str, num_ngrams: int, steps: int, further_steps: int, seed: int) -> dict[str, Any]:
    data = LanguageIdDataModule(seed=seed)
    model = language_id.make_model(data, FFNConfig(num_tiles=language_id.NUM_TILES, route_on="context"), seed)
    optimizer = language_id.train(model, data, steps, f"seed {seed}: before")
    for group in optimizer.param_groups:
        group["lr"] = FURTHER_LR
    label = data.class_names.index(language)
    token_NT, label_N = gathered(data.train_dataloader())
    text, own = counted(token_NT), counted(token_NT[label_N == label])
    wanted_MJ = characteristic(own, text, num_ngrams)
    test = Texts(*gathered(data.test_dataloader()), label, wanted_MJ)
    least_used = NgramReader(model).claims(text, LAYER).rates().argsort(stable=True)
    arms = {}
    for name, num_tiles in ARMS.items():
        arm, arm_optimizer = copy.deepcopy((model, optimizer))  # together, so that the optimizer has the copy's parameters
        tiles = least_used[:num_tiles].tolist()
        before = measure(arm, tiles, test)
        if name != "no surgery":
            insert(arm, tiles, wanted_MJ, text, is_random="random" in name)
        predicted = float(NgramReader(arm).claims(text, LAYER).rates()[tiles].sum())
        right_after = measure(arm, tiles, test)
        for token_BT, label_B in track(language_id.batches(data, further_steps), f"seed {seed}: {name}", further_steps):
            language_id.train_step(arm, arm_optimizer, token_BT, label_B)
        measured = dict(zip(TIMES, (before, right_after, measure(arm, tiles, test)), strict=True))
        test_accuracy = language_id.accuracy(language_id.predictions(arm, data), test.label_N)
        arms[name] = {"tiles": tiles, "predicted": predicted, **measured, **test_accuracy}
    of_language = count_ngrams(test.token_NT[test.label_N == label], 2, test.token_NT[test.label_N == label] != PADDING_TOKEN)
    is_wanted_N = is_among(of_language.id_NJ, wanted_MJ)
    share = float(of_language.count_N[is_wanted_N].sum() / of_language.count_N.sum())
    pairs = ["".join(data.vocabulary[token] for token in ids) for ids in wanted_MJ.tolist()]
    return {"seed": seed, "pairs": pairs, "share_of_language": share, "arms": arms}


def gathered(loader: Any) -> tuple[Tensor, Tensor]:
    tokens, labels = zip(*loader, strict=True)
    return torch.cat(tokens), torch.cat(labels)


def counted(token_NT: Tensor) -> Ngrams:
    return count_ngrams(token_NT, 2, token_NT != PADDING_TOKEN)


def characteristic(own: Ngrams, text: Ngrams, num_ngrams: int) -> Tensor:
    """The n-grams with the largest p log(p / q), in the order of their last tokens: [M, J]."""
    place = {tuple(ids): index for index, ids in enumerate(text.id_NJ.tolist())}
    count_N = text.count_N[[place[tuple(ids)] for ids in own.id_NJ.tolist()]]
    p_N = own.count_N.double() / own.count_N.sum()
    q_N = (count_N - own.count_N + 0.5) / (text.count_N.sum() - own.count_N.sum())
    worth_N = (p_N * (p_N / q_N).log()).masked_fill((own.id_NJ == NO_TOKEN).any(dim=-1), -torch.inf)
    chosen = own.id_NJ[worth_N.topk(num_ngrams).indices].tolist()
    return torch.tensor(sorted(chosen, key=lambda ids: ids[::-1]))


def insert(model: Classifier, tiles: list[int], wanted_MJ: Tensor, text: Ngrams, is_random: bool) -> None:
    """A signature for a part of the n-grams into each tile; or one with as many active dimensions, drawn at random."""
    reader = NgramReader(model)
    for tile, part_MJ in zip(tiles, wanted_MJ.tensor_split(len(tiles)), strict=True):
        signature_D = design_signature(reader, LAYER, tile, part_MJ, text)
        if is_random:
            signature_D = signature_D[torch.randperm(len(signature_D))] * (torch.randint(0, 2, signature_D.shape) * 2 - 1)
        reader.layers[LAYER].insert_signature(tile, signature_D)


@torch.no_grad()
def measure(model: Classifier, tiles: list[int], texts: Texts) -> dict[str, float]:
    """What goes to the tiles when the model runs: of the characteristic n-grams in the language, of the language, of all."""
    model.eval()
    is_claimed, is_language, is_characteristic = [], [], []
    for token_BT, label_B in zip(texts.token_NT.split(256), texts.label_N.split(256), strict=True):
        mask_BT = token_BT != PADDING_TOKEN
        info = model(token_BT, return_routing=True)[1][LAYER]
        is_claimed.append(torch.isin(info["tile_idx"], torch.tensor(tiles)).any(dim=-1)[mask_BT])
        is_language.append((label_B == texts.label).unsqueeze(1).expand_as(mask_BT)[mask_BT])
        is_characteristic.append(is_among(ngrams_at(token_BT, 2, mask_BT), texts.characteristic_MJ))
    claimed, of_language = torch.cat(is_claimed), torch.cat(is_language)
    groups = (of_language & torch.cat(is_characteristic), of_language, torch.ones_like(of_language))
    purity = float((claimed & of_language).sum() / claimed.sum().clamp_min(1))
    return {name: float(claimed[group].float().mean()) for name, group in zip(MEASURES, groups, strict=True)} | {
        "purity": purity
    }


def table(results: dict[str, Any]) -> str:
    runs, language = results["runs"], results["language"]
    times = ", ".join(TIMES)
    rows = [
        f"| arm | characteristic pairs claimed: {times} (least) | of all {language} | of all texts: predicted, measured "
        "| purity | test accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        of_arm = [run["arms"][arm] for run in runs]

        def means(key: str, of_arm: list[dict[str, Any]] = of_arm) -> list[str]:
            return [f"{statistics.mean(values[when][key] for values in of_arm):.1%}" for when in TIMES]

        pairs, of_language, purity = (", ".join(means(key)) for key in ("characteristic", "language", "purity"))
        least = min(values[TIMES[-1]]["characteristic"] for values in of_arm)
        predicted = statistics.mean(values["predicted"] for values in of_arm)
        accuracy = statistics.mean(values["accuracy"] for values in of_arm)
        shares = f"{predicted:.1%}, {means('all')[1]}"
        rows.append(f"| {arm} | {pairs} ({least:.1%}) | {of_language} | {shares} | {purity} | {accuracy:.1%} |")
    furthest = max(abs(values["predicted"] - values[TIMES[1]]["all"]) for run in runs for values in run["arms"].values())
    share = statistics.mean(run["share_of_language"] for run in runs)
    rows.append(
        f"\n{results['ngrams']} pairs, {share:.1%} of the characters of {language}. Predicted and measured shares of all texts "
        f"differ by at most {100 * furthest:.2f} points."
    )
    return "\n".join(rows)
