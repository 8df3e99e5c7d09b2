"""A small autoencoder of each architecture, with weights, scales and threshold of its own."""

from typing import Any

import torch

from trix.superposition.sae import ARCHITECTURES, SAE

WIDTH, NUM_LATENTS = 6, 10
SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {"l1": 0.5},
    "topk": {"active": 3},
    "batch_topk": {"active": 3},
    "jumprelu": {"l0": 0.5},
    "matryoshka": {"active": 3, "prefixes": [4, 10]},
    "transcoder": {"active": 3, "d_out": 4},
}


def small_autoencoder(name: str) -> SAE:
    """An autoencoder with weights, scales and threshold of its own."""
    torch.manual_seed(0)
    sae = ARCHITECTURES.make(name, WIDTH, NUM_LATENTS, arguments=SETTINGS[name])
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.1)
    for step_number in range(3):
        x = 3 * torch.randn(20, WIDTH) + 1
        target = torch.randn(20, sae.d_out) if name == "transcoder" else x
        if step_number == 0:
            sae.start_from(x, target)
        step = sae.training_step(x, target)
        step.loss.backward()
        optimizer.step()
        sae.after_optimizer_step()
        sae.note(step, 20)
    return sae
