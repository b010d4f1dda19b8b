import io
import json
import threading

import pytest
from rich.console import Console

from tempoquant.cli import progress as progress_module
from tempoquant.cli.json_log import JsonLog
from tempoquant.cli.progress import RichProgress
from tempoquant.errors import OutputError
from tempoquant.progress import SILENT


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress_module.time, "monotonic", clock.monotonic)  # the module both of them use
    return clock


def lines_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_every_event_has_its_line_with_the_time_that_is_left(tmp_path, clock):
    with JsonLog(SILENT, tmp_path / "log") as log:
        advance = log.start("blocks", 3, done=1)
        for _ in range(2):
            clock.now += 10
            advance()
        log.note("all is well – so far")
    lines = lines_of(tmp_path / "log")
    assert all(0.01 < line.pop("rss_gib") < 100 for line in lines)
    assert lines == [
        {"time_s": 0.0, "event": "start", "stage": "blocks", "done": 1, "total": 3, "eta_s": None},
        {"time_s": 10.0, "event": "advance", "stage": "blocks", "done": 2, "total": 3, "eta_s": 10.0},
        {"time_s": 20.0, "event": "done", "stage": "blocks", "done": 3, "total": 3, "eta_s": 0.0},
        {"time_s": 20.0, "event": "note", "text": "all is well – so far"},
    ]


def test_advances_come_once_a_second_but_the_end_always(tmp_path, clock):
    with JsonLog(SILENT, tmp_path / "log") as log:
        advance = log.start("layers", 100)
        for _ in range(100):
            clock.now += 0.1
            advance()
    events = [(line["event"], line["done"]) for line in lines_of(tmp_path / "log")]
    assert events[0] == ("start", 0) and events[-1] == ("done", 100)
    assert 9 <= len(events) - 2 <= 11


def test_a_line_is_on_the_disk_when_the_event_is_over(tmp_path):
    with JsonLog(SILENT, tmp_path / "log") as log:
        log.start("layers", 2)
        assert len(lines_of(tmp_path / "log")) == 1


def test_a_task_without_work_left_is_done_at_once(tmp_path):
    with JsonLog(SILENT, tmp_path / "log") as log:
        log.start("blocks", 40, done=40)
    assert [line["event"] for line in lines_of(tmp_path / "log")] == ["start", "done"]


def test_a_second_run_adds_to_the_file(tmp_path):
    for _ in range(2):
        with JsonLog(SILENT, tmp_path / "log") as log:
            log.note("here")
    assert len(lines_of(tmp_path / "log")) == 2


def test_progress_is_passed_on(tmp_path, clock):
    stream = io.StringIO()
    with JsonLog(RichProgress(Console(file=stream)), tmp_path / "log") as log:
        advance = log.start("blocks", 40, done=39)
        clock.now += 5
        advance()
    assert stream.getvalue().splitlines() == ["blocks: 39 of 40 were already done", "blocks: done in 5 s"]


def test_an_error_that_ends_the_run_is_noted(tmp_path):
    with pytest.raises(ValueError, match="odd"), JsonLog(SILENT, tmp_path / "log"):
        raise ValueError("odd")
    assert lines_of(tmp_path / "log")[-1]["text"] == "ended by ValueError: odd"


def test_a_file_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    with pytest.raises(OutputError, match=r"the log .*missing/log cannot be written .*: give --json-log another file"):
        JsonLog(SILENT, tmp_path / "missing" / "log")


def test_a_full_disk_ends_the_log_and_not_the_run(tmp_path, caplog):
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    with JsonLog(SILENT, tmp_path / "log") as log:
        own, log._stream = log._stream, Full()
        log.start("layers", 3)()
        log._stream = own
    assert caplog.text.count("ends here: No space left on device") == 1


def test_tasks_of_several_threads_leave_whole_lines(tmp_path):
    with JsonLog(SILENT, tmp_path / "log") as log:

        def work(name: str) -> None:
            for _ in range(50):
                log.start(name * 100, 1)()

        threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b", "c")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(lines_of(tmp_path / "log")) == 300
