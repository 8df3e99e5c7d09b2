"""A signature designed for one language, inserted into a trained classifier: does the tile get the language's characters?

Data and network: as in language_id (98 languages, 2 layers of 32 tiles). After `steps` of training, the activations that
reach the last layer say which dimensions tell the language's characters from all others: d = (mean of the language's - mean of
the others') / standard deviation. The signature has the signs of the largest |d|; how many of them is chosen on training
texts, for the largest F1 of "goes to this tile" as a test for "is of this language". It is inserted into the tile with the
fewest tokens, and training goes on for `further_steps` at a learning rate of 5e-4.

Measured over the characters of the test texts, before, right after and after further training: claim rate (share of the
language's characters that the tile gets) and purity (share of the tile's characters that are the language's).

Arms: the designed signature frozen; the same one free to learn; a random one with as many active dimensions, frozen; none.
"""

import argparse
import copy
import statistics
from typing import Any

import torch
from cases import language_id
from rich.progress import track
from torch import Tensor

from lightning_modules.data.language_id import LanguageIdDataModule
from trix.nn import Classifier, TriXFFN
from trix.routing import ClaimMatrix

ARMS = ("designed, frozen", "designed, free", "random, frozen", "no surgery")
TIMES = ("before", "right after", "after further training")
NUM_DIMS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
FURTHER_LR = 5e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--language", default="hu", help="whose signature is designed (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="training steps before surgery (default: %(default)s)")
    parser.add_argument("--further-steps", type=int, default=150, help="training steps after it (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1 (default: %(default)s)")


def run(language: str, steps: int, further_steps: int, seeds: int) -> dict[str, Any]:
    return {"language": language, "runs": [operate(language, steps, further_steps, seed) for seed in range(seeds)]}


def operate(language: str, steps: int, further_steps: int, seed: int) -> dict[str, Any]:
    data = LanguageIdDataModule(seed=seed)
    label = data.class_names.index(language)
    model = language_id.make_model(data, language_id.LAYERS["trix explicit"], seed)
    optimizer = language_id.train(model, data, steps, f"seed {seed}: before")
    for group in optimizer.param_groups:
        group["lr"] = FURTHER_LR
    matrix = claim_matrix(model, data)
    tile_idx = int(matrix.count_EC.sum(dim=1).argmin())
    before = measure(model, data, matrix, tile_idx, label)
    designed_D = design(model, data, label, tile_idx)
    random_D = designed_D[torch.randperm(len(designed_D))] * (torch.randint(0, 2, designed_D.shape) * 2 - 1)
    arms = {}
    for name in ARMS:
        arm, arm_optimizer = copy.deepcopy((model, optimizer))  # together, so that the optimizer has the copy's parameters
        if name != "no surgery":
            signature_D = random_D if name.startswith("random") else designed_D
            last_layer(arm).insert_signature(tile_idx, signature_D, freeze=name.endswith("frozen"), tag=language)
        right_after = measure(arm, data, claim_matrix(arm, data), tile_idx, label)
        further = track(language_id.batches(data, further_steps), f"seed {seed}: {name}", total=further_steps)
        for token_BT, label_B in further:
            language_id.train_step(arm, arm_optimizer, token_BT, label_B)
        after = measure(arm, data, claim_matrix(arm, data), tile_idx, label)
        change = float((last_layer(arm).get_tile_signatures()[tile_idx] != designed_D).float().mean())
        arms[name] = dict(zip(TIMES, (before, right_after, after), strict=True)) | {"differs_from_designed": change}
    share = float(matrix.count_EC[:, label].sum() / matrix.count_EC.sum())
    favourite = float(matrix.compute()[:, label].max())
    num_active = int(designed_D.abs().sum())
    return {
        "seed": seed,
        "tile_idx": tile_idx,
        "active_dims": num_active,
        "language_share": share,
        "favourite_tile_share": favourite,
        "arms": arms,
    }


def last_layer(model: Classifier) -> TriXFFN:
    return [module for module in model.modules() if isinstance(module, TriXFFN)][-1]


@torch.no_grad()
def design(model: Classifier, data: LanguageIdDataModule, label: int, tile_idx: int) -> Tensor:
    """The ternary signature for a language, from training texts."""
    x_ND, is_language_N = activations(model, data, label)
    difference_D = (x_ND[is_language_N].mean(dim=0) - x_ND[~is_language_N].mean(dim=0)) / x_ND.std(dim=0)
    best_f1, best_D = -1.0, difference_D.sign()
    for num_dims in NUM_DIMS:
        kept = difference_D.abs().topk(num_dims).indices
        signature_D = torch.zeros_like(difference_D)
        signature_D[kept] = difference_D[kept].sign()
        router = copy.deepcopy(last_layer(model).router)
        router.insert(tile_idx, signature_D)
        is_claimed_N = router(x_ND).tile_idx[:, 0] == tile_idx
        hits = float((is_claimed_N & is_language_N).sum())
        f1 = 2 * hits / float(is_claimed_N.sum() + is_language_N.sum())
        if f1 > best_f1:
            best_f1, best_D = f1, signature_D
    return best_D


def activations(model: Classifier, data: LanguageIdDataModule, label: int, num_batches: int = 100) -> tuple[Tensor, Tensor]:
    """What reaches the last layer, [N, D], for the characters of training texts, and which of them are the language's."""
    model.eval()
    seen: list[Tensor] = []
    hook = last_layer(model).register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0]))
    x_ND, is_language_N = [], []
    for token_BT, label_B in language_id.batches(data, num_batches):
        model(token_BT)
        mask_BT = model.padding_mask(token_BT)
        assert mask_BT is not None
        x_ND.append(seen.pop()[mask_BT])
        is_language_N.append((label_B == label).unsqueeze(1).expand_as(mask_BT)[mask_BT])
    hook.remove()
    return torch.cat(x_ND), torch.cat(is_language_N)


@torch.no_grad()
def claim_matrix(model: Classifier, data: LanguageIdDataModule) -> ClaimMatrix:
    """Of the last layer, over the test texts."""
    model.eval()
    matrix = ClaimMatrix(last_layer(model).num_tiles, data.num_classes)
    for token_BT, label_B in data.test_dataloader():
        info = model(token_BT, return_routing=True)[1][-1]
        matrix.update(info["tile_idx"], label_B, model.padding_mask(token_BT))
    return matrix


def measure(model: Classifier, data: LanguageIdDataModule, matrix: ClaimMatrix, tile_idx: int, label: int) -> dict[str, float]:
    count_C = matrix.count_EC[tile_idx]
    predicted_N, label_N = language_id.predictions(model, data), language_id.test_labels(data)
    return {
        "claim_rate": float(matrix.compute()[tile_idx, label]),
        "purity": float(count_C[label] / count_C.sum().clamp_min(1)),
        "tile_share": float(count_C.sum() / matrix.count_EC.sum()),
        "accuracy": float((predicted_N == label_N).float().mean()),
        "language_accuracy": float((predicted_N == label_N)[label_N == label].float().mean()),
    }


def table(results: dict[str, Any]) -> str:
    runs = results["runs"]
    rows = ["| arm | claim rate: before, right after, after further training | purity | test accuracy |", "|---|---|---|---|"]
    for arm in ARMS:
        cells = [
            ", ".join(f"{statistics.mean(run['arms'][arm][when][key] for run in runs):.1%}" for when in TIMES)
            for key in ("claim_rate", "purity", "accuracy")
        ]
        rows.append(f"| {arm} | {' | '.join(cells)} |")
    share, favourite = (statistics.mean(run[key] for run in runs) for key in ("language_share", "favourite_tile_share"))
    dims = ", ".join(str(run["active_dims"]) for run in runs)
    rows.append(
        f"\n{results['language']}: {share:.1%} of the characters; before, its favourite tile had {favourite:.1%} of them. "
        f"Active dimensions of the designed signatures: {dims}."
    )
    return "\n".join(rows)
