"""Find which topics latents stand for; shuffled topics are the control."""

import numpy as np
from shared import arguments, open_backend

from trix.superposition import analysis, dump, sae

folder, checkpoint = arguments(__doc__)
vocabulary = open_backend(checkpoint).vocabulary
acts = dump.ActivationDump(folder.shards)
model = sae.load_sae(folder.sae)

top_sets = analysis.top_tokens.topk_sets_per_latent(model, acts.paths, "cpu", k=200)
labels, titles = acts.column("labels").numpy(), acts.column("titleidx").numpy()
summary = analysis.enrichment.fisher_enrichment(top_sets, labels, titles)
ids, values = analysis.top1_tokens_for_latents(model, range(model.k), acts.paths, acts.paths, "cpu")
summary["top_token"] = [vocabulary[index] if index >= 0 else "" for index in ids]
summary["top_activation"] = values
summary.to_csv(folder.summary, index=False)

label_of_title = np.zeros(titles.max() + 1, dtype=np.int64)
label_of_title[titles] = labels
shuffled = np.random.default_rng(0).permutation(label_of_title)[titles]
control = analysis.enrichment.fisher_enrichment(top_sets, shuffled, titles)
found, by_chance = (int((table["q_value"] <= 0.05).sum()) for table in (summary, control))
print(f"{found} of {model.k} latents stand for a topic at a false discovery rate of 5 %, {by_chance} where topics are shuffled")
print(summary.nsmallest(8, "q_value")[["latent", "class_frac_topK", "q_value", "top_token"]].to_string(index=False))
print(f"{folder.summary}: all latents")
