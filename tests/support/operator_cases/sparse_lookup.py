"""Random valid inputs and attributes of SparseLookup."""

import numpy as np
from packed_models import lookup_inputs


def valid_case(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, int | float]]:
    flags = {name: int(rng.integers(0, 2)) for name in ("has_hinges", "route_on_norm")}
    num_tiles, grid_size = int(rng.integers(1, 70)), int(rng.integers(1, 40))
    top_k, width, num_hidden = int(rng.integers(1, min(num_tiles, 4) + 1)), int(rng.integers(0, 70)), int(rng.integers(0, 70))
    sizes = (int(rng.integers(0, 40)), top_k, num_tiles, width, num_hidden)
    inputs, _, _ = lookup_inputs(rng, *sizes, grid_size, **flags)
    return inputs, {"top_k": top_k, "grid_size": grid_size, **flags}
