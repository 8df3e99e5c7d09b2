"""What a command prints with rich: as wide as the terminal, unbroken where a program reads it."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 10_000  # lines are not broken where a program reads them


def print_rich(draw: Callable[["Console"], None]) -> None:
    """Write to stdout what ``draw`` prints on the console that it is given."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    with console.capture() as printed:
        draw(console)
    # Not by rich: where the reader has gone, as in `trix why ... | head`, it would end the program as failed.
    sys.stdout.write(printed.get())
