"""VBench's own environment, which `make vbench-env` makes."""

import os
from pathlib import Path

import pytest

NEEDED = "TEMPOQUANT_NEEDS_VBENCH"
"""Environment variable that .ci/run sets: there, a missing environment is a failure."""
_PYTHON = Path(__file__).parents[2] / ".venv-vbench" / "bin" / "python"


def vbench_python() -> Path:
    """Return its interpreter. Without it the test is skipped, or fails if NEEDED is set."""
    if not _PYTHON.is_file():
        reason = "there is no VBench here: run make vbench-env"
        if os.environ.get(NEEDED):
            pytest.fail(reason)
        pytest.skip(reason)
    return _PYTHON
