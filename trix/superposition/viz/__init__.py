"""Latents to look at: pages of the documents that activate one, maps of documents and latents, heat maps."""

from trix.superposition.viz import maps, panels
from trix.superposition.viz.maps import activation_heatmap, latents_labels_map, titles_map
from trix.superposition.viz.panels import top_activations_panel
from trix.superposition.viz.token_texts import Tokenizer

__all__ = [
    "Tokenizer",
    "activation_heatmap",
    "latents_labels_map",
    "maps",
    "panels",
    "titles_map",
    "top_activations_panel",
]
