"""Random valid inputs and attributes of SignatureRoute."""

import numpy as np
from packed_models import route_inputs


def valid_case(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, int | float]]:
    num_tiles = int(rng.integers(1, 70) if rng.random() < 0.7 else rng.integers(250, 300))  # from 256 on in two passes
    inputs, _ = route_inputs(rng, int(rng.integers(0, 9)), num_tiles, int(rng.integers(0, 70)))
    inputs["bias"][rng.random(num_tiles) < 0.2] = -np.inf
    top_k, gate = int(rng.integers(1, num_tiles + 1)), int(rng.integers(0, 3))
    return inputs, {"top_k": top_k, "gate": gate, "confidence_threshold": float(rng.random())}
