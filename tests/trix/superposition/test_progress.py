"""What a log gets in place of a bar: a line now and then, with the time left."""

import re

import pytest
from rich.progress import Progress

from trix.superposition import progress

SECONDS = 7.0  # of a step


class Clock:
    """A time that stands still."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    given = Progress.__init__
    monkeypatch.setattr(Progress, "__init__", lambda self, **settings: given(self, get_time=clock, **settings))
    return clock


@pytest.mark.parametrize("tracks", [True, False])
def test_a_log_gets_a_line_at_least_every_30_seconds(tracks: bool, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    told = [clock.now]
    with progress.progress_bar() as bar:
        task = None if tracks else bar.add_task("reading", total=50)
        for _ in bar.track(range(50), description="reading") if tracks else range(50):
            clock.now += SECONDS
            if task is not None:
                bar.advance(task)
            told += [clock.now] * len(capsys.readouterr().err.splitlines())
    assert 10 < len(told) < 20
    assert max(later - earlier for earlier, later in zip(told, [*told[1:], clock.now], strict=True)) <= 30


def test_the_line_says_how_much_is_done_and_how_long_the_rest_takes(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar() as bar:
        task = bar.add_task("training [b]main[/b]", total=40)
        for _ in range(30):
            clock.now += SECONDS
            bar.advance(task)
    last = capsys.readouterr().err.splitlines()[-1]
    found = re.fullmatch(r"training \[b\]main\[/b\]: (\d+) %, 0:(\d\d):(\d\d) left", last)
    assert found is not None, last
    percent, minutes, seconds = map(int, found.groups())
    assert 60 * minutes + seconds == pytest.approx(SECONDS * 40 * (1 - percent / 100), abs=SECONDS)


def test_what_ends_soon_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar() as bar:
        for _ in bar.track(range(1000), description="reading"):
            clock.now += 0.01
    assert capsys.readouterr().err == ""
