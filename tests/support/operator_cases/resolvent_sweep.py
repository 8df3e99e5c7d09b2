"""Random valid inputs and attributes of ResolventSweep."""

import numpy as np
from packed_models import sweep_inputs


def valid_case(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, int | float]]:
    return sweep_inputs(rng, *map(int, rng.integers(0, (4, 20, 60)))), {}
