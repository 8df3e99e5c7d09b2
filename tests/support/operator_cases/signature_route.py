"""Random valid inputs and attributes of SignatureRoute."""

import numpy as np
from packed_models import grouped_route_inputs


def valid_case(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, int | float]]:
    num_tiles = int(rng.integers(1, 70) if rng.random() < 0.7 else rng.integers(250, 300))  # from 256 on in two passes
    num_groups = 1 if rng.random() < 0.5 else int(rng.integers(2, 5))
    inputs, _ = grouped_route_inputs(rng, int(rng.integers(0, 9)), num_groups, num_tiles, int(rng.integers(0, 70)))
    inputs["bias"][rng.random(num_groups * num_tiles) < 0.2] = -np.inf
    attributes = {"top_k": int(rng.integers(1, num_tiles + 1)), "gate": int(rng.integers(0, 3)), "num_groups": num_groups}
    return inputs, attributes | {"confidence_threshold": float(rng.random())}
