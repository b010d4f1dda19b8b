"""The Python of a linear, with a stubbed launcher: launches are Triton's own, and their lookup
stays cheap.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
MOST_CALLS_US = 250
"""Processor time of one linear, three times what was measured: other work on the machine may double
it.
"""


@pytest.mark.parametrize(("backend", "format", "launches"), [
    ("int8", "int4", 4),  # columns, quantize, expand, multiply
    ("fp8", "mxfp4", 6),  # and for tokens outside of FP8 quantize and multiply again
    ("fp4", "nvfp4", 3),
])  # fmt: skip
def test_launches_are_those_of_triton_and_take_less_than_they_did(
    backend: str, format: str, launches: int, tmp_path: Path
) -> None:
    """The benchmark itself compares the arguments of each launch with those that Triton passed the
    first time.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    command = [sys.executable, "-m", "benchmarks.launch_overhead", "--only", backend, format, "--repeats", "50",
               "--rounds", "5", "--json", str(tmp_path / "line")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    _, *rows = json.loads((tmp_path / "line").read_text())["rows"]
    assert [row["launches"] for row in rows] == [launches, launches]
    assert [row["tapes"] for row in rows] == [2, 2], "both halves are played"
    assert all(row["least_us"] < MOST_CALLS_US for row in rows)
