"""Random valid inputs and attributes of ResolventMix."""

import numpy as np
from packed_models import mix_inputs


def valid_case(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, int | float]]:
    shared = ({axis for axis in range(3) if rng.random() < 0.3} for _ in range(2))
    return mix_inputs(rng, *map(int, rng.integers((0, 0, 0, 1, 0), (4, 5, 60, 18, 40))), *shared), {}
