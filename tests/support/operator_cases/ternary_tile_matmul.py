"""Random valid inputs and attributes of TernaryTileMatMul."""

import numpy as np
from packed_models import random_activations, tile_matmul_inputs


def valid_case(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, int | float]]:
    sizes = (rng.integers(0, 9), rng.integers(1, 5), rng.integers(0, 70), rng.integers(0, 300))
    attributes = random_activations(rng)
    return tile_matmul_inputs(rng, *map(int, sizes))[0], attributes
