"""Laws of unfinished work: one live owner, one run."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tempoquant.errors import OutputError
from tempoquant.output.work_folder import WorkFolder

HOLD = """
import sys, time
from pathlib import Path
from tempoquant.output.work_folder import WorkFolder
with WorkFolder(Path(sys.argv[1]), {"seed": 0}).owned():
    print("owned", flush=True)
    time.sleep(600)
"""


def test_the_same_run_finds_what_it_left(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "out", {"seed": 0, "recipe": {"rank": 2}})
    with work.owned() as path:
        (path / "block").write_text("finished")
    assert path == tmp_path / "out.unfinished"
    with WorkFolder(tmp_path / "out", {"recipe": {"rank": 2}, "seed": 0}).owned() as again:
        assert (again / "block").read_text() == "finished"


def test_another_run_is_refused_and_every_difference_named(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "out", {"seed": 0, "store": None, "recipe": 1}).owned() as path:
        (path / "block").write_text("finished")
    other = WorkFolder(tmp_path / "out", {"seed": 1, "store": "x", "recipe": 1})
    with pytest.raises(OutputError, match=r"different seed and store.*--overwrite"), other.owned():
        raise AssertionError("entered")
    with other.owned(overwrite=True) as path:
        assert not (path / "block").exists()


def test_a_folder_whose_run_was_never_named_is_started_anew(tmp_path: Path) -> None:
    """The process was killed before it could say which run it was."""
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "run.json.partial").write_text("{")
    with WorkFolder(tmp_path / "out", {"seed": 0}).owned() as path:
        assert not (path / "run.json.partial").exists() and (path / "run.json").is_file()


def test_what_no_run_wrote_is_never_removed_without_being_asked(tmp_path: Path) -> None:
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "thesis.txt").write_text("precious")
    with (
        pytest.raises(OutputError, match=r"holds thesis\.txt, which no run wrote"),
        WorkFolder(tmp_path / "out", {}).owned(),
    ):
        raise AssertionError("entered")
    assert (tmp_path / "out.unfinished" / "thesis.txt").read_text() == "precious"


def test_an_unreadable_identity_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "run.json").write_text("{")
    with pytest.raises(OutputError, match=r"run\.json cannot be read"), WorkFolder(tmp_path / "out", {}).owned():
        raise AssertionError("entered")
    with WorkFolder(tmp_path / "out", {}).owned(overwrite=True):
        pass


def test_a_live_owner_keeps_others_out_and_a_killed_one_does_not(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "owned\n"
    work = WorkFolder(tmp_path / "out", {"seed": 0})
    try:
        with pytest.raises(OutputError, match=rf"another process \(number {holder.pid}\) is working in"), work.owned():
            raise AssertionError("entered")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with work.owned():
        pass


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"), WorkFolder(tmp_path / "file" / "out", {}).owned():
        raise AssertionError("entered")


def test_what_a_finished_run_left_is_tidied_and_what_another_left_is_not(tmp_path: Path) -> None:
    work, other = WorkFolder(tmp_path / "out", {"seed": 0}), WorkFolder(tmp_path / "out", {"seed": 1})
    with work.owned():
        other.tidy()
        work.tidy()  # owned: it is not over
        assert work.path.is_dir()
    other.tidy()
    assert work.path.is_dir()
    work.tidy()
    assert not work.path.exists()
    work.tidy()


def test_a_run_killed_while_it_removes_its_work_leaves_what_the_next_one_tidies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each deletion in turn, until a removal comes to its end."""
    for num_deletions in range(100):
        work, left = WorkFolder(tmp_path / "out", {"seed": 0}), [num_deletions]
        with work.owned():
            for name in ("a/b/c", "z/d"):
                (work.path / name).mkdir(parents=True)
                (work.path / name / "shard").touch()

        def delete(real: Callable[..., None], *args: object, left: list[int] = left, **kwargs: object) -> None:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            real(*args, **kwargs)

        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            for name in ("unlink", "rmdir"):
                patched.setattr(os, name, functools.partial(delete, getattr(os, name)))
            work.remove()
        is_removed = not work.path.exists()
        WorkFolder(tmp_path / "out", {"seed": 0}).tidy()
        assert not work.path.exists(), num_deletions
        if is_removed:
            break
    assert num_deletions > 8
