"""SmolLM2-135M, a real model, dumped, explained and steered: `make test-smollm` runs these, in about 5 minutes of CPU time.

The texts ship with Python and Django: its help topics, and translations into 24 languages that are written in Latin letters.
"""

import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers must be installed: make test-smollm")
pytest.importorskip("pandas")

import pandas as pd
from shown import SHOWN

from lightning_modules.cli import main
from lightning_modules.data.corpora import load_corpus
from lightning_modules.data.translations import load_translations
from lightning_modules.tasks import load_autoencoder
from trix.superposition.backends import HFCausalLM, convert_gguf
from trix.superposition.data import split_df
from trix.superposition.dump import ActivationDump, stream_shards
from trix.superposition.evaluation import model_fit
from trix.superposition.sae import SAE
from trix.superposition.steering import set_or_scale_latent, steering

GGUF = os.environ.get("TRIX_SMOLLM")
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LANGUAGES = tuple("ca cs da de es et fi fr hr hu id it lt lv nb nl pl pt pt_BR ro sk sl sv tr".split())  # noqa: SIM905 (one line)
CHARACTERS = 300  # of a text, about 110 tokens
MAX_LEN = 256
LAYER, LATENTS, ACTIVE, STEPS = 15, 2048, 32, 400
NUM_JUDGED = 64  # held-out texts on which the model's loss is measured
PROMPT = "The capital of France is"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.smollm,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(GGUF is None, reason="TRIX_SMOLLM must name the GGUF file of SmolLM2: make test-smollm"),
]


def texts() -> pd.DataFrame:
    """Pieces of the help topics, labelled en, and of the translations into each language."""
    lines = defaultdict(list)
    for translation in load_translations(20):
        lines[translation.language].append(translation.text)
    sources = {language: "\n".join(lines[language]) for language in LANGUAGES} | {"en": load_corpus("pydoc").train_text}
    rows: list[tuple[str, str]] = []
    for language, source in sources.items():
        piece = ""
        for line in source.split("\n"):
            piece += line + "\n"
            if len(piece) >= CHARACTERS:
                rows.append((piece.strip(), language))
                piece = ""
    return pd.DataFrame(rows, columns=["text", "label"])


@pytest.fixture(scope="module")
def folder() -> Path:
    assert GGUF is not None
    return convert_gguf(GGUF, Path(GGUF).parent / "plain", sha256=GGUF_SHA256)


@pytest.fixture(scope="module")
def backend(folder: Path) -> HFCausalLM:
    return HFCausalLM.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def dumps(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Activations of nine tenths of the texts, and of the other tenth; each folder lies next to its CSV file."""
    root = tmp_path_factory.mktemp("dumps")
    found = {}
    for name, frame in zip(("training", "held_out"), split_df(texts(), 0.9, seed=0), strict=True):
        frame.to_csv(root / f"{name}.csv", index=False)
        arguments = ["--text", str(root / f"{name}.csv"), "--max-len", str(MAX_LEN), "--batch-size", "32"]
        assert main(["dump", str(folder), "--site", f"resid_pre.{LAYER}", "--output", str(root / name), *arguments]) == 0
        found[name] = root / name / f"resid_pre.{LAYER}"
    return found


@pytest.fixture(scope="module")
def saes(dumps: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, SAE]:
    """The autoencoder, and a control with a random decoder, trained on the same batches."""
    runs = tmp_path_factory.mktemp("runs")
    settings = f'{{"architecture": "batch_topk", "k": {LATENTS}, "settings": {{"active": {ACTIVE}}}'
    options = {
        "data.path": dumps["training"],
        "model.autoencoder": settings + "}",
        "model.others": f'{{"control": {settings}, "restraint": "frozen_decoder"}}}}',
        "model.optimizer.init_args.lr": "1e-3",
        "trainer.max_steps": STEPS,
        "trainer.val_check_interval": STEPS // 2,
        "trainer.logger.init_args.save_dir": runs,
    }
    assert main(["fit", "--config", "configs/sae.yaml", *(f"--{name}={value}" for name, value in options.items())]) == 0
    return {name: load_autoencoder(runs / "sae", name) for name in ("sae", "control")}


def held_out_scores(sae: SAE, dump: Path) -> tuple[float, float]:
    """Explained variance, and active latents of a token."""
    x_ND = torch.cat(list(stream_shards(ActivationDump(dump).paths)))
    with torch.no_grad():
        x_hat_ND, z_NK = sae(x_ND)
    x_ND, x_hat_ND = x_ND.double(), x_hat_ND.double()
    explained = 1 - (x_ND - x_hat_ND).square().sum() / (x_ND - x_ND.mean(dim=0)).square().sum()
    return float(explained), float((z_NK > 0).sum(dim=-1).double().mean())


def test_the_converted_model_is_kept_and_writes_sense(folder: Path, backend: HFCausalLM) -> None:
    assert GGUF is not None
    written = folder.stat().st_mtime_ns
    assert convert_gguf(GGUF, folder.parent, sha256=GGUF_SHA256) == folder
    assert folder.stat().st_mtime_ns == written
    assert backend.num_layers == 30
    text = backend.generate(**backend.tokenize([PROMPT], 16), max_new_tokens=4, do_sample=False)
    assert "Paris" in backend.tokenizer.decode(text[0])


def test_latents_explain_held_out_texts_far_better_than_their_control(
    saes: dict[str, SAE], dumps: dict[str, Path], record_property: Callable[[str, object], None]
) -> None:
    assert len(ActivationDump(dumps["training"])) > 230_000
    explained, active = held_out_scores(saes["sae"], dumps["held_out"])
    of_control, _ = held_out_scores(saes["control"], dumps["held_out"])
    record_property(SHOWN, f"explained variance {explained:.3f}, control {of_control:.3f}, active latents {active:.1f}")
    assert explained >= 0.65
    assert explained >= of_control + 0.1
    assert abs(active - ACTIVE) <= 0.05 * ACTIVE


def test_the_model_keeps_its_loss_with_the_reconstruction(
    backend: HFCausalLM, saes: dict[str, SAE], dumps: dict[str, Path], record_property: Callable[[str, object], None]
) -> None:
    judged = pd.read_csv(dumps["held_out"].parent.with_suffix(".csv"))["text"].tolist()[:NUM_JUDGED]
    batches = [backend.tokenize(judged[first : first + 16], MAX_LEN) for first in range(0, NUM_JUDGED, 16)]
    fit = model_fit(backend, LAYER, saes["sae"], lambda: batches)
    record_property(SHOWN, str(fit))
    assert fit.recovered_zero >= 0.94
    assert fit.recovered_mean >= 0.94


def test_a_latent_steers_what_the_model_writes(backend: HFCausalLM, saes: dict[str, SAE]) -> None:
    sae, tokens = saes["sae"], backend.tokenize([PROMPT, "One, two, three, four, five, six"], 16)
    ids, mask = tokens["input_ids"], tokens["attention_mask"].bool()
    assert not bool(mask.all())
    with torch.no_grad():
        plain = backend.run(ids, mask)
        with steering(backend, LAYER, sae, lambda z: z):
            assert torch.equal(backend.run(ids, mask), plain)
        with steering(backend, LAYER, sae, set_or_scale_latent(0, set_to=100.0)):
            assert not torch.equal(backend.run(ids, mask), plain)
        assert torch.equal(backend.run(ids, mask), plain)
    prompt = backend.tokenize([PROMPT], 16)
    written = backend.generate(**prompt, max_new_tokens=8, do_sample=False)
    with steering(backend, LAYER, sae, set_or_scale_latent(0, set_to=100.0)):
        steered = backend.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert not torch.equal(written, steered)
