"""The interface of integral-superposition, used as its users use it: six steps, in which only the import is another one."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from trix.nn import FFNConfig, LanguageModel, LanguageModelConfig
from trix.superposition import DumpConfig, Paths, SAEConfig, analysis, backends, data, dump, merge, sae, steering

VOCABULARY = "abcdefghijklmnopqrstuvwxyz "
WIDTH, LAYER = 640, 13


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies on a hub, here instead: a model of 14 blocks of width 640, and a data set with the separator of its source."""
    torch.manual_seed(0)
    config = LanguageModelConfig(WIDTH, num_layers=LAYER + 1, n_heads=4, context_length=64, ffn=FFNConfig("dense", d_ff=8))
    backend = backends.TriXBackend(LanguageModel(len(VOCABULARY), config), VOCABULARY)
    monkeypatch.setattr(backends.HFCausalLM, "from_pretrained", lambda _: backend)
    draw = np.random.default_rng(0)
    words = {"SPORT": ["ball", "goal", "race"], "SCIENCE": ["atom", "cell", "star"]}
    rows = [(" ".join(draw.choice(words[topic], 6)), topic) for topic in words for _ in range(40)]
    path = tmp_path / "news.csv"
    pd.DataFrame(rows, columns=["title", "topic"]).to_csv(path, sep=";", index=False)

    def load(dataset_id: str, filename: str, text_col: str, label_col: str) -> pd.DataFrame:
        assert (dataset_id, filename) == ("owner/news", "news.csv")
        return data.load_titles_csv(path, text_col, label_col)

    monkeypatch.setattr(data, "load_kaggle_dataset", load)


@pytest.mark.usefixtures("hub")
def test_six_steps_from_a_model_to_a_steered_one(tmp_path: Path) -> None:
    device = "cpu"
    paths = Paths(shards_dir=tmp_path / "acts", sae_path=tmp_path / "model.pt", summary_csv=tmp_path / "results.csv")

    backend = backends.HFCausalLM.from_pretrained("owner/model")
    df = data.load_kaggle_dataset("owner/news", "news.csv", text_col="title", label_col="topic")
    cfg = DumpConfig(layer=13, max_len=32, batch_size=64)
    dump.dump_layer_activations(df, "title", "topic", backend, cfg, paths.shards_dir)

    acts = dump.ActivationDump(paths.shards_dir)
    act_files = acts.paths
    train = SAEConfig(k=2048, lr=3e-4, l1=1e-3, epochs=2)
    model = sae.SparseAutoencoder(d_model=640, k=2048)
    sae.train_sae(model, lambda: dump.stream_shards(act_files), train, device)
    sae.save_sae(model, paths.sae_path)
    assert torch.equal(sae.load_sae(paths.sae_path, d_model=640, k=2048).dec.weight, model.dec.weight)

    top_sets = analysis.top_tokens.topk_sets_per_latent(model, act_files, device)
    labels_global = acts.column("labels")
    summary = analysis.enrichment.fisher_enrichment(top_sets, labels_global)
    summary.to_csv(paths.summary_csv)
    assert {"latent", "topK_count", "sports_frac_topK", "odds_ratio", "fisher_p"} <= set(summary.columns)
    assert len(summary) == 2048

    dist = merge.cluster.cosine_dist_from_decoder(model.dec.weight.data.numpy())
    labels = merge.cluster.agglomerative_labels(dist, n_clusters=256)
    medoids = merge.medoid.medoids_from_labels(dist, labels)
    M = merge.medoid.merge_matrix_from_labels(labels, medoids)
    W_new = merge.refit.merge_and_refit_decoder(lambda: dump.stream_shards(act_files), model, M)
    assert W_new.shape == (640, 256)

    inputs = backend.tokenize(["goal ball "], max_len=32)
    plain = backend.generate(**inputs, max_new_tokens=10)
    modifier = steering.set_or_scale_latent(latent_j=42, set_to=100.0)
    handle = steering.register_prehook_last_row(backend, layer_idx=13, sae=model, latent_map=modifier)
    outputs = backend.generate(**inputs, max_new_tokens=10)
    handle.remove()
    assert outputs.shape == plain.shape
    assert not torch.equal(outputs, plain)
    assert torch.equal(backend.generate(**inputs, max_new_tokens=10), plain)
