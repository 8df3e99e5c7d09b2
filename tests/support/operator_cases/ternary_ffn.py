"""Random valid inputs and attributes of TernaryFFN."""

import numpy as np
from packed_models import ffn_inputs, random_activations


def valid_case(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, int | float]]:
    sizes = (rng.integers(0, 9), rng.integers(1, 4), rng.integers(1, 5), rng.integers(0, 70), rng.integers(0, 150))
    attributes = random_activations(rng)
    return ffn_inputs(rng, *map(int, sizes))[0], attributes
