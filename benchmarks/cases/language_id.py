"""Which of 98 languages a short text is in: tiles against controls, and against character n-grams.

Texts: the translations inside the Django wheel (extra [data]); a message with all its translations is in one split only.
Network: the Classifier of configs/language_id.yaml (d_model 64, 2 layers, window 5), in which only the feed-forward layer
differs; batch 64, AdamW with cosine decay. Beside it scikit-learn's naive Bayes and logistic regression on character 1- to
3-grams of the same heads of the texts. Accuracy is that of the test texts; its macro form is the mean over the languages in
the test. Four layers, 600 steps and 3 seeds take about ten minutes on 2 cores.
"""

import argparse
import statistics
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from lightning_modules.data.language_id import LanguageIdDataModule
from trix.nn import Classifier, ClassifierConfig, FFNConfig, TriXFFN
from trix.routing import ClaimMatrix

D_MODEL, NUM_TILES, WINDOW = 64, 32, 5
LAYERS = {
    "none": FFNConfig(kind="none"),
    "dense, equal active compute": FFNConfig(kind="dense", d_ff=D_MODEL),
    "dense 4d": FFNConfig(kind="dense", d_ff=4 * D_MODEL),
    "trix explicit": FFNConfig(num_tiles=NUM_TILES, route_on="hidden"),
}
NGRAMS = ("naive Bayes", "logistic regression")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=600, help="training steps (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1, of split and network (default: %(default)s)")


def run(steps: int, seeds: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (*LAYERS, *NGRAMS)}
    for seed in range(seeds):  # seeds outside: a change of the machine's speed meets all layers alike
        data = LanguageIdDataModule(seed=seed)
        for name, ffn in LAYERS.items():
            start = time.perf_counter()
            model = make_model(data, ffn, seed)
            train(model, data, steps, f"{name}, seed {seed}")
            seconds = time.perf_counter() - start
            parameters = sum(parameter.numel() for parameter in model.parameters())
            measured = {"seed": seed, "seconds": seconds, "parameters": parameters}
            runs[name].append(measured | accuracy(predictions(model, data), test_labels(data)) | claims(model, data))
        for name in NGRAMS:
            runs[name].append({"seed": seed} | ngram_accuracy(name, data))
    return {
        "django_version": data.hparams["django_version"],
        "texts": {"train": len(data.train_texts), "validation": len(data.validation_texts), "test": len(data.test_texts)},
        "config": asdict(LAYERS["trix explicit"]),
        "runs": runs,
    }


def make_model(data: LanguageIdDataModule, ffn: FFNConfig, seed: int) -> Classifier:
    torch.manual_seed(seed)
    config = ClassifierConfig(D_MODEL, window=WINDOW, ffn=ffn)
    return Classifier(None, data.num_classes, config, len(data.vocabulary))


def train(model: Classifier, data: LanguageIdDataModule, steps: int, what: str, lr: float = 2e-3) -> torch.optim.Optimizer:
    """AdamW with cosine decay to 0; returns the optimizer with its state."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for token_BT, label_B in track(batches(data, steps), what, total=steps):
        train_step(model, optimizer, token_BT, label_B)
        schedule.step()
    return optimizer


def train_step(model: Classifier, optimizer: torch.optim.Optimizer, token_BT: Tensor, label_B: Tensor) -> None:
    model.train()
    logits, _, aux = model(token_BT, return_routing=True)
    loss = F.cross_entropy(logits, label_B)
    optimizer.zero_grad()
    (loss if aux is None else loss + aux["total_aux"]).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def batches(data: LanguageIdDataModule, steps: int) -> Any:
    """The first `steps` training batches, over as many epochs as it takes."""
    loader = data.train_dataloader()
    done = 0
    while done < steps:
        for batch in loader:
            if done == steps:
                break
            yield batch
            done += 1


def test_labels(data: LanguageIdDataModule) -> Tensor:
    return torch.cat([label_B for _, label_B in data.test_dataloader()])


@torch.no_grad()
def predictions(model: Classifier, data: LanguageIdDataModule) -> Tensor:
    model.eval()
    return torch.cat([model(token_BT).argmax(dim=-1) for token_BT, _ in data.test_dataloader()])


def accuracy(predicted_N: Tensor, label_N: Tensor) -> dict[str, float]:
    is_right_N = (predicted_N == label_N).float()
    by_language = [float(is_right_N[label_N == label].mean()) for label in label_N.unique()]
    return {"accuracy": float(is_right_N.mean()), "macro_accuracy": statistics.mean(by_language)}


@torch.no_grad()
def claims(model: Classifier, data: LanguageIdDataModule) -> dict[str, Any]:
    """By layer, over the test tokens: claim rate of a language's favourite tile, and purity of a tile, as means."""
    model.eval()
    layers = [module for module in model.modules() if isinstance(module, TriXFFN)]
    matrices = [ClaimMatrix(layer.num_tiles, data.num_classes) for layer in layers]
    for token_BT, label_B in data.test_dataloader():
        infos = model(token_BT, return_routing=True)[1]
        for matrix, info in zip(matrices, infos, strict=True):
            matrix.update(info["tile_idx"], label_B, model.padding_mask(token_BT))
    is_seen_C = [matrix.count_EC.sum(dim=0) > 0 for matrix in matrices]
    return {
        "mean_claim_rate": [
            float(matrix.compute().amax(dim=0)[is_seen].mean()) for matrix, is_seen in zip(matrices, is_seen_C, strict=True)
        ],
        "mean_purity": [float(matrix.purity().mean()) for matrix in matrices],
    }


def ngram_accuracy(name: str, data: LanguageIdDataModule) -> dict[str, float]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import MultinomialNB

    start = time.perf_counter()
    heads = [[text.text[: data.context_length] for text in split] for split in (data.train_texts, data.test_texts)]
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=2, lowercase=False, sublinear_tf=True)
    features = vectorizer.fit_transform(heads[0])
    if name == "naive Bayes":
        classifier = MultinomialNB(alpha=0.01)
    else:
        classifier = LogisticRegression(C=100, solver="saga", max_iter=30, tol=1e-2)
    classifier.fit(features, [data.class_names.index(text.language) for text in data.train_texts])
    predicted_N = torch.from_numpy(classifier.predict(vectorizer.transform(heads[1])))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "parameters": features.shape[1] * data.num_classes, **accuracy(predicted_N, test_labels(data))}


def table(results: dict[str, Any]) -> str:
    rows = [
        "| classifier | parameters | test accuracy (max - min) | macro accuracy | favourite tile's share, by layer | purity |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in results["runs"].items():
        accuracies = [run["accuracy"] for run in runs]
        macro = statistics.mean(run["macro_accuracy"] for run in runs)
        rows.append(
            f"| {name} | {runs[0]['parameters']:,} | {statistics.mean(accuracies):.1%} "
            f"({max(accuracies) - min(accuracies):.1%}) | {macro:.1%} "
            f"| {_by_layer(runs, 'mean_claim_rate')} | {_by_layer(runs, 'mean_purity')} |"
        )
    return "\n".join(rows)


def _by_layer(runs: list[dict[str, Any]], key: str) -> str:
    layers = zip(*(run.get(key, []) for run in runs), strict=True)
    return ", ".join(f"{statistics.mean(values):.1%}" for values in layers) or "-"
