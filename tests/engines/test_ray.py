"""What goes wrong on a Ray cluster, and what is said about it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tempoquant.engines import RayCluster
from tempoquant.errors import OutputError, SettingsError, TempoQuantError, UnsupportedError
from tests.engines.ray_cluster import two_machines
from tests.engines.stages import Acting, lines

ray_actors = pytest.importorskip("tempoquant.engines.ray_actors")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_machines() as cluster:
        yield cluster


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", r"no Ray cluster at 127\.0\.0\.1:1 .*ray start"),
        (None, r"no Ray cluster that this machine belongs to .*ray start"),
        ("127.0.0.1", "is not HOST:PORT"),
    ],
)
def test_where_there_is_no_cluster_the_message_says_how_to_start_one(
    address: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # or a cluster of somebody else's would be found
    with pytest.raises(SettingsError, match=words), RayCluster("cpu", address).open(tmp_path):
        pass


def test_a_cluster_without_a_gpu_is_refused_for_cuda(cluster: Any, tmp_path: Path) -> None:
    with (
        pytest.raises(SettingsError, match="has a GPU: give --device cpu"),
        RayCluster("cuda", cluster.address).open(tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_machine_with_another_version_is_refused(cluster: Any, tmp_path: Path, monkeypatch: Any) -> None:
    with RayCluster("cpu", cluster.address).open(tmp_path) as crew:
        monkeypatch.setattr(ray_actors, "version", lambda name: "99.0")
        with pytest.raises(UnsupportedError, match=r"has tempoquant 0.*, this machine 99\.0: install the same"):
            crew.run(Acting(tmp_path), [("do", "a")])


def test_a_machine_that_does_not_see_the_folder_is_refused(cluster: Any, tmp_path: Path) -> None:
    with RayCluster("cpu", cluster.address).open(tmp_path) as crew:
        (tmp_path / ".seen-by-every-worker").unlink()
        with pytest.raises(OutputError, match=f"does not see {tmp_path}: choose a folder that all machines"):
            crew.run(Acting(tmp_path), [("do", "a")])
    assert not (tmp_path / "log.txt").exists()


def test_machines_that_join_later_get_work_and_workers_are_not_made_without_need(cluster: Any, tmp_path: Path) -> None:
    joined = []
    with RayCluster("cpu", cluster.address).open(tmp_path) as crew:
        crew.run(Acting(tmp_path), [("do", "one")])
        assert len(lines(tmp_path, "open")) == 1

        def join(*_: Any) -> None:
            if not joined:
                joined.append(cluster.add_node(num_cpus=1))
                time.sleep(ray_actors._LOOK_S)

        (tmp_path / "more").mkdir()
        stage = Acting(tmp_path / "more")
        crew.run(stage, [("do", "first")] + [("slow", str(number)) for number in range(12)], on_done=join)
    assert len({line for line in (tmp_path / "more" / "log.txt").read_text().splitlines() if "open" in line}) == 3
    cluster.remove_node(joined[0])


def test_when_every_machine_is_gone_the_run_says_so(cluster: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(ray_actors, "_PATIENCE_S", 0.5)
    monkeypatch.setattr(ray_actors, "_LOOK_S", 0.1)
    with RayCluster("cpu", cluster.address).open(tmp_path) as crew:
        monkeypatch.setattr(ray_actors.RayActors, "_num_places", lambda self, node: 0)
        with pytest.raises(TempoQuantError, match=r"no machine of the Ray cluster is left .*goes on"):
            crew.run(Acting(tmp_path), [("do", "a")])
