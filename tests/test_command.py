"""The command says how threads wait before torch is there to ask, unless the user has said so."""

import os
import subprocess
import sys

import pytest

import tempoquant.cli
from tempoquant_command import PATIENCE, USERS, main, wait_patiently

SAID_BEFORE_TORCH = """
import sys
import tempoquant_command
assert not {"torch", "tempoquant"} & set(sys.modules)
tempoquant_command.wait_patiently()
import torch
"""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Return an environment without variables about waiting threads; a test's changes are
    undone.
    """
    for name in USERS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.skipif(sys.platform != "linux", reason="torch's wheels bring GNU's runtime on Linux only")
def test_the_runtime_that_torch_loads_lets_threads_sleep_while_they_wait(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("OMP_DISPLAY_ENV", "verbose")
    done = subprocess.run([sys.executable, "-c", SAID_BEFORE_TORCH], capture_output=True, text=True, check=True)
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr and "GOMP_SPINCOUNT = '0'" in done.stderr


def test_the_command_says_it_before_it_imports_anything(environment: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []
    environment.setattr(tempoquant.cli, "app", lambda: seen.append(dict(os.environ)))
    main()
    assert PATIENCE.items() <= seen[0].items()


@pytest.mark.parametrize("name", USERS)
def test_a_users_own_word_stands_alone(name: str, environment: pytest.MonkeyPatch) -> None:
    environment.setenv(name, "1")
    before = dict(os.environ)
    wait_patiently()
    assert dict(os.environ) == before
