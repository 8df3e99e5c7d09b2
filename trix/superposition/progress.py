"""What whoever waits sees of something that takes long."""

from datetime import timedelta

from rich.console import Console
from rich.progress import Progress, TaskID

SECONDS_BETWEEN_LINES = 20.0


def progress_bar() -> Progress:
    """A bar on stderr with the time left, which is removed at the end; where stderr is no terminal, a line every 20 seconds."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True) if console.is_terminal else _ProgressLines(console)


class _ProgressLines(Progress):
    """Prints a line in place of the bar, at the first advance that comes late enough after the last line."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True, auto_refresh=False)
        self._last_line = self.get_time()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        now = self.get_time()
        if now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        task = next(task for task in self.tasks if task.id == task_id)
        left = "" if task.time_remaining is None else f", {timedelta(seconds=round(task.time_remaining))} left"
        self.console.print(f"{task.description}: {task.percentage:.0f} %{left}", highlight=False, markup=False, soft_wrap=True)
