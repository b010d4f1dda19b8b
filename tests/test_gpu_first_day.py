"""Laws of the first day's script: what is over is written at once, a cut costs itself, the rest is
gone on with.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_bundle
from benchmarks.gpu_first_day import CUT, DONE, FAILED, LEFT_OUT, Step, planned_steps, records_of, run_steps
from benchmarks.gpu_first_day_steps import STEPS, device_or_why

ROOT = Path(__file__).parent.parent
HELLO = "print('noise'); print('{\"answer\": 42}'); print('more noise')"


def step(name: str, code: str = HELLO, seconds: float = 60.0, missing: str = "") -> Step:
    return Step(name, seconds, (sys.executable, "-c", code), missing)


def statuses(file: Path) -> dict[str, str]:
    return {record["step"]: record["status"] for record in records_of(file)}


def test_a_step_that_is_cut_or_fails_costs_itself_only(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    sleeps = "import time; print('began', flush=True); time.sleep(600)"
    steps = [
        step("right"), step("too long", sleeps, seconds=6.0), step("wrong", "raise ValueError('why')"),
        step("silent", "pass"), step("elsewhere", missing="it needs a thing, and there is none here"), step("last"),
    ]  # fmt: skip
    begun = time.monotonic()
    records = {record["step"]: record for record in run_steps(steps, file, 600.0)}
    assert time.monotonic() - begun < 120
    assert records["right"]["result"] == records["last"]["result"] == {"answer": 42}
    assert records["too long"]["status"] == CUT and records["too long"]["output"] == "began\n"
    assert records["wrong"]["status"] == FAILED and "ValueError: why" in records["wrong"]["output"]
    assert records["silent"] == {"step": "silent", "status": FAILED, "why": "no JSON was printed", "output": "",
                                 "seconds": records["silent"]["seconds"]}  # fmt: skip
    assert records["elsewhere"]["why"] == "it needs a thing, and there is none here"
    assert list(statuses(file)) == [each.name for each in steps]


def test_what_a_cut_step_started_ends_with_it(tmp_path: Path) -> None:
    file = tmp_path / "alive"
    child = f"import time\nwhile True:\n    open({str(file)!r}, 'a').write('x'); time.sleep(0.1)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    [record] = run_steps([step("parent", code, seconds=8.0)], tmp_path / "lines", 600.0)
    assert record["status"] == CUT and file.exists()
    size = file.stat().st_size
    time.sleep(1.0)
    assert file.stat().st_size == size


def test_each_line_is_there_before_the_next_step_begins(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    seen = [len(records_of(file)) for _ in run_steps([step("a"), step("b")], file, 600.0)]
    assert seen == [1, 2]


def test_the_same_command_goes_on_with_what_is_not_done(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    file.write_text(
        json.dumps({"step": "a", "status": DONE})
        + "\n"
        + json.dumps({"step": "b", "status": CUT})
        + '\n{"step": "c", "sta'
    )
    assert [record["step"] for record in run_steps([step("a"), step("b"), step("c")], file, 600.0)] == ["b", "c"]
    assert list(run_steps([step("a"), step("b")], file, 600.0)) == []


def test_no_step_begins_when_the_time_is_over(tmp_path: Path) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 40.0
        return now[0]

    records = list(run_steps([step("a"), step("b"), step("c")], tmp_path / "lines", 100.0, clock))
    assert records[0]["status"] == DONE and records[-1]["status"] == LEFT_OUT
    assert "it needs 100 seconds, and 0 were left" in records[-1]["why"]


def test_without_a_gpu_every_step_that_needs_one_says_so() -> None:
    if not device_or_why()[1]:
        pytest.skip("there is a GPU here")
    planned = {each.name: each.missing for each in planned_steps(dry_run=False)}
    needing = {name for name, described in STEPS.items() if described.needs_gpu}
    assert {name for name, missing in planned.items() if "needs an NVIDIA GPU" in missing} == needing
    in_small = {each.name for each in planned_steps(dry_run=True) if not each.missing}
    assert in_small == {name for name, described in STEPS.items() if described.on_a_cpu} and len(in_small) >= 4
    assert sum(described.seconds for described in STEPS.values()) < 2 * 590


@pytest.mark.parametrize("name", ["versions", "layer", "swap"])
def test_a_step_runs_in_small_on_a_cpu(name: str) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_first_day", "--step", name, "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if name == "layer":
        assert all(each["is_right"] for each in found.values()) and len(found) == 8
    elif name == "swap":
        assert found["is_same"] and found["bytes_of_one"] > 0
    else:
        assert found["torch"] and "gpu" not in found


def test_the_bundle_holds_what_the_script_needs_and_is_small(tmp_path: Path) -> None:
    gpu_bundle.copy_files(tmp_path)
    assert (tmp_path / "benchmarks" / "gpu_first_day.py").exists() and (tmp_path / "tests" / "kernels").is_dir()
    assert "benchmarks.gpu_first_day" in (tmp_path / "run.sh").read_text()
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < gpu_bundle.MOST_BYTES / 4
