import io

import pytest
from rich.console import Console

from tempoquant.cli import progress as module
from tempoquant.cli.progress import Labelled, Pace, RichProgress, duration_text


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
        Labelled(progress, "paper").start("quantizing", 2, done=1)()
    assert stream.getvalue().splitlines()[-1] == "paper: quantizing: done in 0 s"
    assert stream.getvalue().splitlines()[0] == "paper: quantizing: 1 of 2 were already done"


def test_units_of_an_earlier_run_are_done_but_say_nothing_about_the_speed(clock):
    stream = io.StringIO()
    with RichProgress(Console(file=stream)) as progress:
        advance = progress.start("blocks", 40, done=38)
        for _ in range(2):
            clock.now += 30
            advance()
        progress.start("blocks", 40, done=40)
        progress.start("nothing", 0)
    assert stream.getvalue().splitlines() == [
        "blocks: 38 of 40 were already done",
        "blocks: 39 of 40, about 30 s left",
        "blocks: done in 1 min 0 s",
        "blocks: was done already",
    ]


def test_the_time_left_is_right_after_each_round_of_uneven_units(clock):
    pace = Pace(12)
    for _ in range(2):
        for seconds in (1.0, 1.0, 100.0, 2.0):
            clock.now += seconds
            pace.advance()
    assert pace.left_s == pytest.approx(104.0)
    clock.now += 4
    assert pace.left_s == pytest.approx(100.0)
    clock.now += 1000
    assert pace.left_s == 0


def test_the_time_left_is_unknown_before_the_first_unit_of_this_run(clock):
    pace = Pace(10, done=5)
    clock.now += 50
    assert pace.left_s is None
    pace.advance()
    assert pace.left_s == pytest.approx(200.0)


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (3600, "1 h 0 min"), (18720, "5 h 12 min")],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration_text(seconds) == text


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


def test_a_terminal_shows_what_an_earlier_run_finished_and_the_time_left_of_each_task(clock):
    stream = io.StringIO()
    with RichProgress(Console(file=stream, force_terminal=True, width=120)) as progress:
        blocks = progress.start("all blocks", 40, done=10)
        inside = progress.start("inside a block", 4)
        clock.now += 30
        inside()
        clock.now += 30
        blocks()
        progress._bars.refresh()
    shown = stream.getvalue()
    assert "11/40" in shown and "about 29 min 0 s left" in shown
    assert "1/4" in shown and "about 1 min 0 s left" in shown


def test_a_terminal_is_clean_again_after_an_interruption():
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), RichProgress(Console(file=stream, force_terminal=True)) as progress:
        progress.start("quantizing", 4)()
        raise KeyboardInterrupt
    assert stream.getvalue().rstrip().endswith("\x1b[2K") or "\x1b[?25h" in stream.getvalue()  # cursor shown again
    assert not progress._bars.live.is_started
