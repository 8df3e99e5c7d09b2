from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def without_graphs_of_other_tests() -> Iterator[None]:
    """torch.compile keeps at most 8 graphs of one function in a process and then fails under fullgraph."""
    yield
    torch.compiler.reset()
