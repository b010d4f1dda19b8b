"""An evaluation that is killed anywhere loses no finished video and generates none again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.timeout(900)
def test_an_evaluation_killed_at_every_moment_ends_complete() -> None:
    """The test runs in its own process: forking is for processes that have no threads yet."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_evaluation"], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=880, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing lost and nothing generated twice" in done.stdout
