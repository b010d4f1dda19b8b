"""The attribution of failures: laws of the loop that distributes items, with scripted workers."""

from collections.abc import Callable
from typing import Any

import pytest

from tempoquant.engines.stage import Event, Order
from tempoquant.engines.worker_pool import MOST_FAILURES, MOST_LOST, WorkerPool
from tempoquant.errors import CalibrationError, ModelError, TempoQuantError

Fate = Callable[[str, str], Any]
"""Of a place and an item: "done", "die", "die opening", an exception, or ("unopened", an
exception).
"""


class ScriptedPool(WorkerPool):
    """One worker at a time in each place; orders end at once, in the order of the places."""

    def __init__(self, places: str, fate: Fate) -> None:
        super().__init__()
        self.places, self.fate = places, fate
        self.workers: dict[int, str] = {}
        self.heard: list[Event] = []
        self.done: list[tuple[str, str]] = []
        self.num_started = 0

    def start_workers(self, num_items: int) -> None:
        for place in self.places:
            if place not in self.workers.values() and self.is_usable(place) and len(self.workers) < num_items:
                self.workers[self.next_number()] = place
                self.num_started += 1
        if not self.workers:
            raise self.last_failure

    def idle(self) -> list[int]:
        busy = {event.worker for event in self.heard}
        return [number for number in self.workers if number not in busy]

    def place(self, worker: int) -> str:
        return self.workers[worker]

    def send(self, worker: int, order: Order) -> None:
        place = self.workers[worker]
        ending = self.fate(place, order.item)
        if ending == "die opening" or not isinstance(ending, tuple):
            opening = [] if ending == "die opening" else [("opened", None)]
        else:
            opening = []
        if ending in ("die", "die opening"):
            last = ("died", "It died.")
        elif isinstance(ending, tuple):
            last = ending
        elif ending == "done":
            last = ("done", place)
        else:
            last = ("error", ending)
        self.heard += [Event(worker, place, *one) for one in (*opening, last)]

    def events(self, timeout_s: float) -> list[Event]:
        heard, self.heard = self.heard, []
        for event in heard:
            if event.kind == "died":
                del self.workers[event.worker]
        return heard

    def end(self, worker: int) -> None:
        del self.workers[worker]

    def shut_down(self) -> None:
        self.workers = {}


def outcome(places: str, items: str, fate: Fate) -> tuple[ScriptedPool, list[tuple[str, str]], list[str]]:
    """Return the pool, the finished items and their places, and the lost items."""
    pool, done, lost = ScriptedPool(places, fate), [], []
    pool.run(
        Any, items, on_done=lambda item, place: done.append((item, place)), on_lost=lambda item, _: lost.append(item)
    )
    return pool, done, lost


def test_a_place_where_workers_die_opening_gets_no_more_and_no_item_is_to_blame() -> None:
    pool, done, lost = outcome("ab", "123456", lambda place, _: "die opening" if place == "a" else "done")
    assert sorted(done) == [(item, "b") for item in "123456"] and lost == []
    assert pool.num_started == MOST_FAILURES + 1


def test_where_every_worker_dies_opening_the_run_says_why_and_loses_nothing() -> None:
    with pytest.raises(TempoQuantError, match=r"It died\. The same command"):
        outcome("ab", "123456", lambda *_: "die opening")


def test_a_place_that_cannot_open_for_want_of_memory_gets_no_more() -> None:
    pool, done, lost = outcome(
        "ab", "1234", lambda place, _: ("unopened", MemoryError("full")) if place == "a" else "done"
    )
    assert sorted(item for item, _ in done) == list("1234") and lost == [] and list(pool.workers.values()) == ["b"]
    with pytest.raises(MemoryError, match="full"):
        outcome("ab", "1234", lambda *_: ("unopened", MemoryError("full")))


def test_an_error_on_purpose_before_anything_opened_ends_the_run_at_once() -> None:
    calls = []
    with pytest.raises(ModelError, match="damaged"):
        outcome("a", "12", lambda *_: calls.append(1) or ("unopened", ModelError("damaged")))
    assert len(calls) == 1


def test_an_error_on_purpose_in_a_place_that_comes_later_is_that_places() -> None:
    _, done, lost = outcome("ab", "1234", lambda place, _: ("unopened", ModelError("gone")) if place == "b" else "done")
    assert sorted(done) == [(item, "a") for item in "1234"] and lost == []


def test_an_item_that_finds_no_room_is_tried_elsewhere_and_then_is_an_error() -> None:
    full = OSError(28, "No space left on device")
    _, done, _ = outcome("ab", "1234", lambda place, item: full if (place, item) == ("a", "1") else "done")
    assert sorted(item for item, _ in done) == list("1234")
    with pytest.raises(OSError, match="No space left"):
        outcome("ab", "1234", lambda _, item: full if item == "1" else "done")


def test_an_item_that_failed_waits_for_another_place_while_somebody_is_at_work_there() -> None:
    tried = []

    def fate(place: str, item: str) -> str:
        tried.append((place, item))
        return "die" if (place, item) == ("a", "1") else "done"

    _, done, lost = outcome("ab", "12", fate)
    assert lost == [] and sorted(item for item, _ in done) == ["1", "2"]
    assert tried.count(("a", "1")) == 1


def test_an_error_of_an_item_that_would_come_everywhere_ends_the_run() -> None:
    for error in (CalibrationError("NaN"), RuntimeError("a bug")):
        with pytest.raises(type(error), match=str(error)):
            outcome("ab", "1234", lambda _, item, error=error: error if item == "2" else "done")


def test_items_that_workers_die_of_are_lost_and_the_places_forgiven() -> None:
    _, done, lost = outcome("ab", "123456", lambda _, item: "die" if item in "24" else "done")
    assert sorted(item for item, _ in done) == list("1356") and lost == ["2", "4"]


def test_several_items_lost_in_a_row_are_no_fault_of_items() -> None:
    lost = []
    with pytest.raises(TempoQuantError, match=r"It died\."):
        ScriptedPool("ab", lambda *_: "die").run(Any, "123456", on_lost=lambda item, _: lost.append(item))
    assert len(lost) == MOST_LOST - 1


def test_the_only_place_that_there_is_loses_nothing_before_it_is_given_up() -> None:
    with pytest.raises(TempoQuantError, match=r"It died\."):
        ScriptedPool("a", lambda *_: "die").run(Any, "123456", on_lost=lambda item, _: pytest.fail(f"{item} was lost"))


def test_a_new_stage_forgives_every_place() -> None:
    fates = {"first": "die opening"}
    pool = ScriptedPool("ab", lambda place, item: fates.get(item, "done") if place == "a" else "done")
    pool.run(Any, ["first"] * 3)
    done = []
    pool.run(Any, ["second"] * 4, on_done=lambda _, place: done.append(place))
    assert set(done) == {"a", "b"}
