"""Merging latents that say the same: clusters, medoids, and a decoder refitted to the sums of each cluster's latents."""

from trix.superposition.merge import cluster, medoid, merged_sae, refit
from trix.superposition.merge.cluster import (
    NeighbourDistance,
    agglomerative_labels,
    auto_n_clusters,
    cosine_dist_from_decoder,
)
from trix.superposition.merge.medoid import (
    cluster_stats,
    labels_from_merge_matrix,
    medoids_from_labels,
    merge_matrix_from_labels,
)
from trix.superposition.merge.merged_sae import MergedSAE, load_merged_sae, merge_sae, save_merged_sae
from trix.superposition.merge.refit import Refit, merge_and_refit_decoder, ridge_refit, streaming_refit

__all__ = [
    "MergedSAE",
    "NeighbourDistance",
    "Refit",
    "agglomerative_labels",
    "auto_n_clusters",
    "cluster",
    "cluster_stats",
    "cosine_dist_from_decoder",
    "labels_from_merge_matrix",
    "load_merged_sae",
    "medoid",
    "medoids_from_labels",
    "merge_and_refit_decoder",
    "merge_matrix_from_labels",
    "merge_sae",
    "merged_sae",
    "refit",
    "ridge_refit",
    "save_merged_sae",
    "streaming_refit",
]
