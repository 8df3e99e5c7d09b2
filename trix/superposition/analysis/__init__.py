"""What latents stand for: their top tokens, the classes they are enriched in, how alike they are, maps of them."""

from trix.superposition.analysis import enrichment, jaccard_sparse, reducer, stats, top_tokens
from trix.superposition.analysis.enrichment import Enrichment, class_enrichment, fisher_enrichment
from trix.superposition.analysis.fisher import fisher_exact_many
from trix.superposition.analysis.jaccard_sparse import combine_similarity, jaccard_from_sets
from trix.superposition.analysis.reducer import PCAReducer, UMAPReducer, create_reducer
from trix.superposition.analysis.stats import compute_activation_stats, mean_pool_by_title, trim_outliers
from trix.superposition.analysis.top_tokens import TopTokens, top1_tokens_for_latents, topk_sets_per_latent

__all__ = [
    "Enrichment",
    "PCAReducer",
    "TopTokens",
    "UMAPReducer",
    "class_enrichment",
    "combine_similarity",
    "compute_activation_stats",
    "create_reducer",
    "enrichment",
    "fisher_enrichment",
    "fisher_exact_many",
    "jaccard_from_sets",
    "jaccard_sparse",
    "mean_pool_by_title",
    "reducer",
    "stats",
    "top1_tokens_for_latents",
    "top_tokens",
    "topk_sets_per_latent",
    "trim_outliers",
]
