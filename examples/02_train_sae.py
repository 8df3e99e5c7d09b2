"""Train a sparse autoencoder on the activations, and say how much of them it explains."""

import torch
from shared import arguments

from trix.superposition import SAEConfig, dump, sae

folder, _ = arguments(__doc__)
acts = dump.ActivationDump(folder.shards)
cfg = SAEConfig(k=512, active=16, lr=2e-3, epochs=12, batch_size=1024, architecture="batch_topk")
torch.manual_seed(0)
model = sae.make_sae(acts.manifest.d_model, cfg)

epochs = sae.train_sae(model, lambda: dump.stream_shards(acts.paths), cfg)
sae.save_sae(model, folder.sae)

for number in (1, len(epochs)):
    print(
        f"epoch {number}: unexplained {epochs[number - 1]['reconstruction']:.3f} of the mean square, "
        f"{epochs[number - 1]['active']:.1f} latents active"
    )
print(f"{folder.sae}: {cfg.k} latents, in the format of SAELens")
