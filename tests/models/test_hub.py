"""Models by hub id, from a hub on this machine."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tempoquant.checkpoint.manifest import MANIFEST_NAME, write_manifest
from tempoquant.errors import CheckpointError, ModelError
from tempoquant.models.hub import is_hub_id, split_revision
from tempoquant.models.pipeline_folder import WHOLE_MODEL
from tempoquant.models.source import SourceModel
from tests.hub_server import HubServer, point_here, serve
from tests.quantized_wan import write_pipeline

NAME = "someone/model"
WEIGHTS = "transformer_2/diffusion_pytorch_model.safetensors"


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = write_pipeline(tmp_path_factory.mktemp("published") / "model")
    write_manifest(folder, {})
    return files_of(folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes]) -> Iterator[HubServer]:
    with serve() as found:
        found.add(NAME, dict(files))
        point_here(monkeypatch, found, tmp_path / "cache")
        monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's tries
        yield found


@pytest.mark.parametrize(
    ("name", "hub_id", "revision"),
    [("a/b", "a/b", None), ("a/b@main", "a/b", "main"), ("a/b@refs/pr/1", "a/b", "refs/pr/1")],
)
def test_a_name_may_carry_a_revision(name: str, hub_id: str, revision: str | None) -> None:
    assert split_revision(name) == (hub_id, revision) and is_hub_id(name)


@pytest.mark.parametrize("name", ["a", "a/b/c", "./a", "/a", "a/", "a/b@", "..", r"a\b/c"])
def test_other_texts_are_no_hub_id(name: str) -> None:
    assert not is_hub_id(name)


def test_a_revision_is_what_is_fetched(hub: HubServer, files: dict[str, bytes]) -> None:
    first = hub.repositories[NAME].commits[-1][0]
    second = hub.add(NAME, {**files, "sampling.json": json.dumps({"num_steps": 3}).encode()})
    assert SourceModel.open(NAME).revision == second
    old = SourceModel.open(f"{NAME}@{first}")
    assert (old.revision, old.hub_id, (old.folder / "sampling.json").exists()) == (first, NAME, False)
    with pytest.raises(ModelError, match=r"someone/model@nowhere .*has no revision nowhere"):
        SourceModel.open(f"{NAME}@nowhere")


def test_what_was_fetched_opens_without_a_network(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    online = SourceModel.open(NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert SourceModel.open(NAME).folder == online.folder and len(hub.requests) == asked
    with pytest.raises(ModelError, match=r"nobody/nothing .*nor whole in the hub's cache .*HF_HUB_OFFLINE"):
        SourceModel.open("nobody/nothing")


def test_a_connection_that_breaks_is_resumed_where_it_stopped(
    hub: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)  # the client keeps whole chunks
    hub.broken = {WEIGHTS: 1}
    assert (SourceModel.open(NAME).folder / WEIGHTS).read_bytes() == files[WEIGHTS]
    [asked] = hub.ranges
    assert 0 < int(asked.removeprefix("bytes=").removesuffix("-")) <= len(files[WEIGHTS]) // 2


def test_a_download_that_broke_off_is_finished_by_the_same_command(hub: HubServer, files: dict[str, bytes]) -> None:
    hub.broken = {WEIGHTS: 10**6}
    with pytest.raises(ModelError, match="arrived whole are kept: the same command fetches the rest"):
        SourceModel.open(NAME)
    hub.broken, hub.requests = {}, []
    folder = SourceModel.open(NAME).folder
    assert {name: (folder / name).read_bytes() for name in files} == files
    fetched = {each.rpartition("/resolve/")[2].partition("/")[2] for each in hub.requests if each.startswith("GET /s")}
    assert fetched == {WEIGHTS}


def test_a_file_that_arrives_otherwise_than_it_was_published_is_removed(
    hub: HubServer, files: dict[str, bytes]
) -> None:
    damaged = bytearray(files[WEIGHTS])
    damaged[-1] ^= 1
    hub.add(NAME, {**files, WEIGHTS: bytes(damaged)})
    with pytest.raises(CheckpointError, match=r"SHA-256 differs.* the same command fetches it again"):
        SourceModel.open(NAME)
    hub.repositories[NAME].commits[-1][1][WEIGHTS] = files[WEIGHTS]  # the hub was repaired
    assert (SourceModel.open(NAME).folder / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_a_file_that_an_interrupted_call_left_is_compared_by_the_next_and_only_once(
    hub: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: Path) -> str:
        raise KeyboardInterrupt

    damaged = bytearray(files[WEIGHTS])
    damaged[-1] ^= 1
    hub.add(NAME, {**files, WEIGHTS: bytes(damaged)})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("tempoquant.models.hub.sha256_of", interrupt)
        SourceModel.open(NAME)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        SourceModel.open(NAME)
    hub.repositories[NAME].commits[-1][1][WEIGHTS] = files[WEIGHTS]  # the hub was repaired
    SourceModel.open(NAME)
    monkeypatch.setattr("tempoquant.models.hub.sha256_of", interrupt)
    SourceModel.open(NAME)


def test_a_model_that_is_hidden_asks_to_log_in(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[NAME].private = True
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ModelError, match=r"the hub has no such model, or hides it; .*hf auth login"):
        SourceModel.open(NAME)


def test_nothing_is_fetched_that_no_loader_reads(hub: HubServer, files: dict[str, bytes]) -> None:
    hub.add(NAME, {**files, "report.html": b"<html>", "weights.bin": os.urandom(8)})
    folder = SourceModel.open(NAME).folder
    assert not (folder / "report.html").exists() and not (folder / "weights.bin").exists()
    assert (folder / MANIFEST_NAME).is_file() and "*.safetensors" in WHOLE_MODEL
