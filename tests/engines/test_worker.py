"""The message of a worker when an item fails."""

import pickle
from pathlib import Path

import pytest

from tempoquant.engines.stage import Message, Order
from tempoquant.engines.worker import Worker
from tempoquant.errors import CalibrationError
from tests.engines.stages import Acting, lines


def ending_of(folder: Path, action: str) -> Message:
    """Return the last message of an item, as it arrives elsewhere."""
    said: list[Message] = []
    Worker("cpu", said.append).do(Order(1, Acting(folder), (action, "name")))
    assert said[0] == Message("opened")
    assert [message.ends_order for message in said] == [False] * (len(said) - 1) + [True]
    return Message(*pickle.loads(pickle.dumps(said[-1])))


def test_a_result_arrives(tmp_path: Path) -> None:
    kind, content = ending_of(tmp_path, "do")
    assert kind == "done" and content.startswith("name ")


def test_our_errors_arrive_as_what_they_are(tmp_path: Path) -> None:
    kind, error = ending_of(tmp_path, "fail")
    assert kind == "error" and isinstance(error, CalibrationError) and str(error) == "blocks.0 went wrong."


def test_errors_of_the_machine_arrive_with_their_number(tmp_path: Path) -> None:
    kind, error = ending_of(tmp_path, "fill the disk")
    assert kind == "error" and isinstance(error, OSError) and error.errno == 28


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    kind, error = ending_of(tmp_path, "be a bug")
    assert kind == "error" and isinstance(error, RuntimeError)
    assert "by nothing" in str(error) and "in act" in str(error)


def test_an_error_that_cannot_travel_is_told_in_words(tmp_path: Path) -> None:
    kind, error = ending_of(tmp_path, "unpicklable")
    assert kind == "error" and "OSError: <unlocked" in str(error)


def test_a_stage_that_does_not_open_is_an_error_of_its_item(tmp_path: Path) -> None:
    said: list[Message] = []
    Worker("cpu", said.append).do(Order(1, Acting(tmp_path / "missing"), ("do", "name")))
    assert [message.kind for message in said] == ["unopened"]


def test_a_stage_stays_open_until_the_next_one(tmp_path: Path) -> None:
    worker = Worker("cpu", lambda message: None)
    for number in (1, 1, 2):
        worker.do(Order(number, Acting(tmp_path), ("do", "name")))
    worker.close()
    assert (len(lines(tmp_path, "open")), len(lines(tmp_path, "close"))) == (2, 2)


@pytest.mark.parametrize("action", ["do", "fail"])
def test_progress_comes_before_the_end(tmp_path: Path, action: str) -> None:
    said: list[Message] = []
    Worker("cpu", said.append).do(Order(1, Acting(tmp_path), (action, "name")))
    assert [message.kind for message in said[1:5]] == ["start", "advance", "advance", "advance"]
