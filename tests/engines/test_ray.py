"""The failures of a Ray cluster, and their messages."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tempoquant.engines import RayCluster
from tempoquant.errors import SettingsError, TempoQuantError, UnsupportedError
from tests.engines.ray_cluster import two_machines
from tests.engines.stages import Acting, lines, openers

ray_actors = pytest.importorskip("tempoquant.engines.ray_actors")
ray_membership = pytest.importorskip("tempoquant.engines.ray_membership")


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
    with RayCluster("cpu", address).open(tmp_path) as crew:
        crew.run(Acting(tmp_path), [])  # nothing to do needs no cluster
        with pytest.raises(SettingsError, match=words):
            crew.run(Acting(tmp_path), [("do", "a")])


@pytest.mark.slow
def test_a_cluster_without_a_gpu_is_refused_for_cuda(cluster: Any, tmp_path: Path) -> None:
    words = "has a GPU: give --device cpu"
    with RayCluster("cuda", cluster.address).open(tmp_path) as crew, pytest.raises(SettingsError, match=words):
        crew.run(Acting(tmp_path), [("do", "a")])
    assert list(tmp_path.iterdir()) == []


class Stranger:
    """A membership that some machine does not fulfil."""

    def __init__(self, shared: Path, why: str, nodes: str | None = None) -> None:
        self.token_file, self.token = shared / "token", ""
        self.why, self.nodes = why, nodes

    def objection(self) -> str | None:
        import ray

        return self.why if self.nodes in (None, ray.get_runtime_context().get_node_id()) else None


def test_what_is_asked_of_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member = ray_membership.Membership.of_here(tmp_path)
    monkeypatch.setattr(ray_membership, "_VISIBLE_TIMEOUT_S", 0.3)
    assert f"does not see {tmp_path}: write the results (-o)" in str(member.objection())
    member.token_file.write_text(member.token)
    assert member.objection() is None
    older = dataclasses.replace(member, versions={**member.versions, "torch": "1.0"})
    assert re.fullmatch(r"has torch 2.*, and the machine that started this 1\.0: install the same\.", older.objection())
    assert "other source files" in str(dataclasses.replace(member, source="0" * 64).objection())


@pytest.mark.slow
def test_a_machine_that_is_not_as_it_has_to_be_is_an_error_at_the_start(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = Stranger(tmp_path, "has torch 1.0.")
    monkeypatch.setattr(ray_membership.Membership, "of_here", lambda shared: stranger)
    words = r"^\d.* has torch 1\.0\."
    with RayCluster("cpu", cluster.address).open(tmp_path) as crew, pytest.raises(UnsupportedError, match=words):
        crew.run(Acting(tmp_path), [("do", "a")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_one_that_joins_later_and_is_not_gets_no_work(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool_kind, joined = ray_actors.RayActorPool, cluster.add_node(num_cpus=1)
    stranger = Stranger(tmp_path, "has torch 1.0.", joined.node_id)
    monkeypatch.setattr(ray_membership.Membership, "of_here", lambda shared: stranger)
    monkeypatch.setattr(ray_actors, "_SCAN_INTERVAL_S", 1.0)
    reject = pool_kind._reject

    def num_places(pool: Any, node: dict[str, Any]) -> int:
        return int(node["NodeID"] != joined.node_id or pool._has_been_ready)

    def note_rejection(pool: Any, *arguments: Any) -> None:
        reject(pool, *arguments)
        (tmp_path / "rejected").touch()

    monkeypatch.setattr(pool_kind, "_num_places", num_places)
    monkeypatch.setattr(pool_kind, "_reject", note_rejection)
    done = []
    with RayCluster("cpu", cluster.address).open(tmp_path) as crew:
        items = [("await", "rejected")] * 3
        crew.run(Acting(tmp_path), items, on_done=lambda item, _: done.append(item))
        assert crew._pool.failures[joined.node_id] == ray_actors.MOST_FAILURES
    assert done == items
    cluster.remove_node(joined)


@pytest.mark.slow
def test_a_machine_that_others_use_is_not_waited_for(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray_actors, "_START_TIMEOUT_S", 4.0)
    monkeypatch.setattr(ray_actors, "_SCAN_INTERVAL_S", 1.0)
    with RayCluster("cpu", cluster.address).open(tmp_path) as crew:
        crew._pool = crew._join()
        first = next(node["NodeID"] for node in ray.nodes() if node["Alive"])
        somebody = ray_actors.NodeAffinitySchedulingStrategy(first, soft=False)
        holder = ray.remote(Holder).options(num_cpus=1, scheduling_strategy=somebody).remote()
        ray.get(holder.hold.remote())
        crew.run(Acting(tmp_path), [("do", "a")])
        ray.kill(holder)
    assert lines(tmp_path, "begin") == ["begin do a"]


class Holder:
    """Somebody else's work."""

    def hold(self) -> None:
        """Answer that the actor is alive."""


@pytest.mark.slow
def test_machines_that_join_later_get_work_and_workers_are_not_made_without_need(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_actors, "_SCAN_INTERVAL_S", 1.0)
    joined = []
    with RayCluster("cpu", cluster.address).open(tmp_path) as crew:
        crew.run(Acting(tmp_path), [("do", "one")])
        assert len(openers(tmp_path)) == 1

        def join(*_: Any) -> None:
            if not joined:
                joined.append(cluster.add_node(num_cpus=1))

        (tmp_path / "more").mkdir()
        crew.run(Acting(tmp_path / "more"), [("do", "first"), *[("meet", "3")] * 3], on_done=join)
    assert len(openers(tmp_path / "more")) == 3
    cluster.remove_node(joined[0])


@pytest.mark.slow
def test_when_every_machine_is_gone_the_run_says_so(cluster: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(ray_actors, "_NO_WORKER_TIMEOUT_S", 0.5)
    monkeypatch.setattr(ray_actors, "_SCAN_INTERVAL_S", 0.1)
    with RayCluster("cpu", cluster.address).open(tmp_path) as crew:
        monkeypatch.setattr(ray_actors.RayActorPool, "_num_places", lambda self, node: 0)
        with pytest.raises(TempoQuantError, match=r"no machine of the Ray cluster is left .*goes on"):
            crew.run(Acting(tmp_path), [("do", "a")])
