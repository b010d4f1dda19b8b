import io

import pytest
from rich.console import Console

from tempoquant.cli import progress as module
from tempoquant.cli.progress import Labelled, RichProgress


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock.monotonic)
    return clock


def test_a_log_gets_a_line_now_and_then_with_the_time_that_is_left(clock):
    stream = io.StringIO()
    with RichProgress(Console(file=stream)) as progress:
        advance = progress.start("quantizing", 10)
        for _ in range(10):
            clock.now += 15
            advance()
    assert stream.getvalue().splitlines() == [
        "quantizing: 2 of 10, about 2 min 0 s left",
        "quantizing: 4 of 10, about 1 min 30 s left",
        "quantizing: 6 of 10, about 1 min 0 s left",
        "quantizing: 8 of 10, about 30 s left",
        "quantizing: done in 2 min 30 s",
    ]


def test_a_label_stands_before_each_description(clock):
    stream = io.StringIO()
    with RichProgress(Console(file=stream)) as progress:
        Labelled(progress, "paper").start("quantizing", 1)()
    assert stream.getvalue() == "paper: quantizing: done in 0 s\n"


def test_quick_work_leaves_one_line(clock):
    stream = io.StringIO()
    with RichProgress(Console(file=stream)) as progress:
        progress.start("loading", 1)()
    assert stream.getvalue() == "loading: done in 0 s\n"


def test_a_terminal_shows_every_task_under_way_and_how_far_it_is():
    stream = io.StringIO()
    with RichProgress(Console(file=stream, force_terminal=True, width=120)) as progress:
        for name in ("high [noise]", "low noise"):
            advance = progress.start(name, 4)
            advance()
        advance()
        progress._bars.refresh()
    shown = stream.getvalue()
    assert "high [noise]" in shown
    assert "1/4" in shown
    assert "2/4" in shown


def test_a_terminal_is_clean_again_after_an_interruption():
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), RichProgress(Console(file=stream, force_terminal=True)) as progress:
        progress.start("quantizing", 4)()
        raise KeyboardInterrupt
    assert stream.getvalue().rstrip().endswith("\x1b[2K") or "\x1b[?25h" in stream.getvalue()  # cursor shown again
    assert not progress._bars.live.is_started
