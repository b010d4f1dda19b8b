"""The chain as processes: a command that fails, Ctrl-C, and the whole of it on the bundled
model.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.opens2v_tree import write_tree

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent

STUB = """
import os, sys, time
with open(os.environ["LOG"], "a") as log:
    log.write(sys.argv[1] + "\\n")
if sys.argv[1] == os.environ.get("FAILS"):
    sys.exit(7)
if sys.argv[1] == os.environ.get("WAITS"):
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        open(os.environ["LOG"], "a").write("put away\\n")
        sys.exit(130)
"""


@pytest.fixture
def stub(tmp_path: Path) -> dict[str, str]:
    """Make an environment in which `tempoquant` is a program that records its calls."""
    (tmp_path / "stub.py").write_text(STUB, encoding="utf-8")
    return {
        **os.environ,
        "LOG": str(tmp_path / "log"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "src"))),
    }


def start(stub: dict[str, str], **changes: str) -> "subprocess.Popen[str]":
    """Start run_all on three commands, in its own process."""
    program = [sys.executable, str(Path(stub["LOG"]).with_name("stub.py"))]
    code = (
        "import benchmarks.reproduce_run as r, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))\n"
        f"r.run_all([['one'], ['two'], ['three']], {program!r})"
    )
    return subprocess.Popen([sys.executable, "-c", code], env={**stub, **changes}, stderr=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip


def log_of(stub: dict[str, str]) -> list[str]:
    log = Path(stub["LOG"])
    return log.read_text(encoding="utf-8").splitlines() if log.is_file() else []


def await_log(stub: dict[str, str], line: str) -> None:
    end = time.monotonic() + 120
    while line not in log_of(stub):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_every_command_is_printed_before_it_runs(stub):
    out, _ = (process := start(stub)).communicate(timeout=200)
    assert process.returncode == 0 and log_of(stub) == ["one", "two", "three"]
    assert [line for line in out.splitlines() if line] == [f"[{n}/3] tempoquant {name}" for n, name in
                                                           enumerate(("one", "two", "three"), start=1)]  # fmt: skip


def test_a_failed_command_ends_the_chain_with_its_status_and_a_sentence(stub):
    _, error = (process := start(stub, FAILS="two")).communicate(timeout=200)
    assert process.returncode == 7 and log_of(stub) == ["one", "two"]
    assert error.strip().splitlines()[-1].startswith("error: `tempoquant two` ended with status 7")


@pytest.mark.parametrize("everybody", [True, False])
def test_ctrl_c_lets_the_command_put_its_work_away(stub, everybody):
    """A terminal sends it to both processes; sent to the script alone, the script passes it on."""
    process = start(stub, WAITS="two")
    await_log(stub, "two")
    time.sleep(0.3)  # into its sleep
    if everybody:
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=200)
    assert process.returncode == 130 and log_of(stub) == ["one", "two", "put away"]
    assert error.strip().splitlines()[-1] == (
        "error: interrupted: finished work is kept, and the same command resumes it."
    )


def test_a_terminated_script_leaves_no_command_running(stub):
    process = start(stub, WAITS="two")
    await_log(stub, "two")
    process.terminate()
    process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.timeout(600)  # nine programs that import everything: a minute on an idle machine
def test_the_whole_chain_runs_on_the_bundled_model_and_a_tree_of_opens2v(tmp_path: Path):
    """The same script as for the published model, on the CPU: everything but memory and VBench
    comes out.
    """
    write_tree(tmp_path / "tree")
    program = [sys.executable, "-m", "benchmarks.reproduce", "--model", "tiny", "--opens2v", str(tmp_path / "tree"),
               "--work", str(tmp_path / "work"), "--limit", "1", "--device", "cpu"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=580)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(done.stdout.splitlines()[-1])
    calibrated = [json.loads(line)["id"] for line in (tmp_path / "work/calibration.jsonl").read_text().splitlines()]
    assert record["excluded"] == sorted(calibrated, key=record["excluded"].index) and len(calibrated) == 2
    assert {(row["label"], row["change"]) for row in record["rows"]} == {("paper", None), ("ours", None)}
    found = json.loads((tmp_path / "work/evaluation/evaluation.json").read_text(encoding="utf-8"))
    assert found["benchmark"]["name"] == "opens2v" and found["benchmark"]["num_items"] == record["num_items"] == 1
    assert not {item["id"] for item in found["items"]} & set(calibrated)
    assert all(len(item["videos"]) == 3 for item in found["items"])
    assert (tmp_path / "work/report.html").is_file()
    assert [line.partition("] ")[2] for line in done.stdout.splitlines() if line.startswith("[")] == record["commands"]
