"""Runs that are killed end with the bytes of a run nobody disturbed; `make test-kill` tries many
more moments.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def test_three_killed_runs_end_as_the_undisturbed_one() -> None:
    """The test runs in its own process: forking is for processes that have no threads yet."""
    program = [sys.executable, "-m", "tests.kill_and_resume", "--random", "3", "--seed", str(os.getpid())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kills survived, 0 differences" in done.stdout
