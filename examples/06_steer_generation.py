"""Let a model write with one latent held high, and see what changes; a latent that is left as it is changes nothing."""

import pandas as pd
import torch
from shared import LAYER, arguments, open_backend

from trix.superposition import sae, steering

folder, checkpoint = arguments(__doc__)
backend = open_backend(checkpoint)
model = sae.load_sae(folder.sae)
best = pd.read_csv(folder.summary).nsmallest(1, "q_value").iloc[0]
latent, strength = int(best["latent"]), float(best["top_activation"])
inputs = backend.tokenize(["The function returns "], max_len=64)


def written() -> str:
    ids = backend.generate(**inputs, max_new_tokens=40)
    return "".join(backend.vocabulary[index] for index in ids[0].tolist())


def steered(modifier: steering.LatentModifier) -> str:
    with steering.steering(backend, LAYER, model, modifier):
        return written()


def next_character() -> torch.Tensor:
    with torch.no_grad():
        return backend.run(inputs["input_ids"], None)[0, -1].softmax(-1)


plain, before = written(), next_character()
assert steered(steering.set_or_scale_latent(latent, scale_by=1.0)) == plain
print(f"as it is:           {plain!r}")
for value in (strength, 3 * strength):
    print(f"latent {latent} at {value:5.1f}: {steered(steering.set_or_scale_latent(latent_j=latent, set_to=value))!r}")

handle = steering.register_prehook_last_row(backend, LAYER, model, steering.set_or_scale_latent(latent, set_to=strength))
after = next_character()
handle.remove()
assert torch.equal(next_character(), before)
moved = (after - before).abs().topk(3).indices.tolist()
print("next character:", ", ".join(f"{backend.vocabulary[i]!r} {before[i]:.3f} -> {after[i]:.3f}" for i in moved))
