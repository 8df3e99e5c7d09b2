"""Draw texts and latents on a map, activations as a heat map, and one latent's texts as a page."""

import numpy as np
import pandas as pd
import torch
from shared import arguments, open_backend

from trix.superposition import analysis, dump, sae, viz

folder, checkpoint = arguments(__doc__)
acts = dump.ActivationDump(folder.shards)
model = sae.load_sae(folder.sae)
summary = pd.read_csv(folder.summary)
latents = summary.nsmallest(6, "q_value")["latent"].tolist()
x = torch.cat(list(dump.stream_shards(acts.paths)))
z = sae.latents_from_shard(model, x, "cpu")

_, first, number_of_title = np.unique(acts.column("titleidx").numpy(), return_index=True, return_inverse=True)
label_of_title = acts.column("labels").numpy()[first]
Z_titles = analysis.mean_pool_by_title(z, number_of_title) ** 0.5  # or a few extreme texts would fill the map
reducer = analysis.create_reducer("pca")
names = pd.read_csv(folder.titles)["topic"].sort_values().unique()
texts = [f"latent {latent}" for latent in latents]
figures = {
    "documents": viz.titles_map(Z_titles, [names[label] for label in label_of_title], reducer),
    "latents": viz.latents_labels_map(reducer, Z_titles, latents, texts),
    "tokens": viz.activation_heatmap(z[:40, latents], range(40), texts),
}
for name, figure in figures.items():
    figure.savefig(folder.root / f"{name}.png")
page = viz.top_activations_panel(latents[0], acts.paths, acts.paths, model, open_backend(checkpoint).vocabulary, "cpu")
(folder.root / "latent.html").write_text(page, encoding="utf-8")
print(f"{folder.root}: documents.png, latents.png, tokens.png, and latent.html with the texts of latent {latents[0]}")
