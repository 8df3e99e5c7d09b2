"""Merge latents whose directions are alike, refit the decoder, and compare with latents that were merged at random."""

from collections.abc import Iterator

import numpy as np
from shared import arguments
from torch import Tensor

from trix.superposition import dump, merge, sae

folder, _ = arguments(__doc__)
acts = dump.ActivationDump(folder.shards)
model = sae.load_sae(folder.sae)


def shards() -> Iterator[Tensor]:
    return dump.stream_shards(acts.paths)


def explained(merge_map: np.ndarray) -> float:
    pairs = merge.refit.encoded_pairs(shards, model, "cpu")
    return merge.refit.ridge_refit(pairs, merge_map).explained_variance


n_clusters = merge.cluster.auto_n_clusters(model.k, 0.5)
dist = merge.cluster.cosine_dist_from_decoder(model.dec.weight)
labels = merge.cluster.agglomerative_labels(dist, n_clusters)
by_chance = np.random.default_rng(0).permutation(labels)
print(f"{model.k} latents, decoder refitted: explained variance {explained(np.arange(model.k)):.3f}")
print(
    f"{n_clusters} clusters of like directions: {explained(labels):.3f}; clusters drawn at random: {explained(by_chance):.3f}"
)

merged = merge.merge_sae(model, labels, shards)
merge.save_merged_sae(merged, folder.merged)
largest = merge.medoid.cluster_stats(labels)["max_size"]
print(f"{folder.merged}: {merged.k} latents, each the sum of 1 to {largest:.0f} of the {model.k}")
