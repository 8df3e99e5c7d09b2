"""Random valid inputs and attributes of TernaryMatMul."""

import numpy as np
from packed_models import matmul_inputs, random_activations


def valid_case(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, int | float]]:
    sizes = (rng.integers(0, 4), rng.integers(0, 9), rng.integers(0, 70), rng.integers(0, 300))
    attributes = random_activations(rng)
    return matmul_inputs(rng, *map(int, sizes))[0], attributes
