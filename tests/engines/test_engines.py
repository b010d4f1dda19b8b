"""Laws of engines that do not depend on the kind: in this process, in several, on a Ray cluster of
two machines.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tempoquant.engines import Crew, Engine, Local, RayCluster
from tempoquant.engines.crew import give_up
from tempoquant.errors import CalibrationError, SettingsError, TempoQuantError, UnsupportedError
from tempoquant.progress import CombinedProgress
from tests.engines.ray_cluster import RAY_IS_MISSING, two_machines
from tests.engines.stages import Acting, Counts, lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Try every law on each kind of engine; on a cluster, where each takes long, one always and the
    rest as slow tests.
    """
    if "engine" in metafunc.fixturenames:
        is_slow = metafunc.function is not test_every_item_is_done_once_and_its_result_arrives
        marks = [RAY_IS_MISSING, *[pytest.mark.slow] * is_slow]
        kinds = ["in process", "processes", pytest.param("ray", marks=marks)]
        metafunc.parametrize("engine", kinds, indirect=True, scope="module")


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    if request.param == "ray":
        with two_machines() as cluster:
            yield RayCluster("cpu", cluster.address)
    else:
        yield Local(("cpu",) if request.param == "in process" else ("cpu", "cpu"))


@pytest.fixture(scope="module")
def crew(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """Yield the same crew for all tests, as for all stages of a run, also after an error."""
    with engine.open(tmp_path_factory.mktemp("shared")) as crew:
        yield crew


@pytest.fixture
def workers(engine: Engine, crew: Crew) -> Crew:
    if engine == Local(("cpu",)):
        pytest.skip("in this process a death is everybody's")
    return crew


def test_every_item_is_done_once_and_its_result_arrives(crew: Crew, tmp_path: Path) -> None:
    results = {}
    items = [("do", str(number)) for number in range(7)]
    crew.run(Acting(tmp_path), items, on_done=lambda item, result: results.update({item: result}))
    assert {item: result.split()[0] for item, result in results.items()} == {item: item[1] for item in items}
    assert sorted(lines(tmp_path, "begin")) == sorted(f"begin do {number}" for number in range(7))


def test_a_stage_is_opened_once_by_each_worker_and_not_without_items(crew: Crew, tmp_path: Path) -> None:
    crew.run(Acting(tmp_path), [])
    assert not (tmp_path / "log.txt").exists()
    pids = set()
    crew.run(
        Acting(tmp_path), [("do", str(n)) for n in range(9)], on_done=lambda _, result: pids.add(result.split()[1])
    )
    assert len(lines(tmp_path, "open")) == len(pids) <= 2


def test_a_second_stage_takes_the_place_of_the_first(crew: Crew, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    crew.run(Acting(tmp_path), [("do", "a"), ("do", "b")])
    crew.run(Acting(tmp_path / "second"), [("do", "c")])
    assert lines(tmp_path / "second", "begin") == ["begin do c"]
    assert len(lines(tmp_path, "close")) >= 1


def test_progress_of_workers_arrives_and_can_be_one_task(crew: Crew, tmp_path: Path) -> None:
    counts = Counts()
    crew.run(Acting(tmp_path), [("do", "a"), ("do", "b")], progress=counts)
    assert (counts.begun, counts.advanced) == ([("steps", 3, 0)] * 2, 6)
    together = Counts()
    crew.run(Acting(tmp_path), [("do", "c"), ("do", "d")], progress=CombinedProgress(together, "steps", 7, 2))
    assert (together.begun, together.advanced) == ([("steps", 7, 2)], 5)


def test_the_error_of_an_item_is_raised_as_what_it_is(crew: Crew, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"blocks\.0 went wrong"):
        crew.run(Acting(tmp_path), [("fail", "a"), ("do", "b")])


def test_after_an_error_nobody_goes_on_and_the_next_stage_can_begin(workers: Crew, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError):
        workers.run(Acting(tmp_path), [("hang", "hanging"), ("fail", "b")])
    for line in (tmp_path / "log.txt").read_text().splitlines():
        wait_for_end_of(int(line.split()[0]))
    results = []
    workers.run(Acting(tmp_path), [("do", "c")], on_done=lambda item, _: results.append(item))
    assert results == [("do", "c")]


def test_an_item_whose_worker_dies_is_done_by_another(workers: Crew, tmp_path: Path) -> None:
    done = []
    items = [("do", "a"), ("die once", "b"), ("do", "c"), ("do", "d")]
    workers.run(Acting(tmp_path), items, on_done=lambda item, _: done.append(item))
    assert sorted(done) == sorted(items)
    begun = lines(tmp_path, "begin")
    assert begun.count("begin die once b") == 2 and len(begun) == 5


def test_an_item_that_was_done_when_its_worker_died_is_not_done_again(workers: Crew, tmp_path: Path) -> None:
    done = []
    items = [("die once", "a"), ("do", "b")]
    workers.run(
        Acting(tmp_path), items, on_done=lambda item, _: done.append(item),
        is_done=lambda item: (tmp_path / item[1]).exists(),
    )  # fmt: skip
    assert done == [("do", "b")]
    assert sorted(lines(tmp_path, "begin")) == ["begin die once a", "begin do b"]


def test_an_item_that_workers_die_of_is_given_up(workers: Crew, tmp_path: Path) -> None:
    done, lost = [], []
    workers.run(
        Acting(tmp_path), [("die", "a"), ("do", "b")], on_done=lambda item, _: done.append(item),
        on_lost=lambda item, why: lost.append((item, why)),
    )  # fmt: skip
    assert done == [("do", "b")]
    [(item, why)] = lost
    assert item == ("die", "a") and "2 workers died" in why


def test_without_another_plan_an_item_that_is_given_up_ends_the_run() -> None:
    with pytest.raises(TempoQuantError, match=r"died\. The same command resumes"):
        give_up("item", "2 workers died.")


def test_devices_of_different_types_are_refused() -> None:
    with pytest.raises(SettingsError, match="one type"):
        Local(("cpu", "cuda:0"))
    with pytest.raises(SettingsError, match="one type"):
        Local(())


def test_ray_chooses_the_gpu_itself() -> None:
    with pytest.raises(SettingsError, match="cuda or cpu"):
        RayCluster("cuda:1")


def test_without_ray_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tempoquant.engines.ray_cluster", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'tempoquant\[ray\]'"), RayCluster("cpu").open(tmp_path):
        pass


def wait_for_end_of(pid: int) -> None:
    for _ in range(500):
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} still runs")
