"""The shared environment of every test: a private cache folder, hypothesis without deadlines
(machines are shared), and Triton's interpreter on a machine without a GPU.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tempoquant_command import wait_patiently

wait_patiently()  # said before torch is imported, as the command does
import torch  # noqa: E402

if not torch.cuda.is_available():  # read when triton is imported, which diffusers does: so it is said here, at once
    os.environ["TRITON_INTERPRET"] = "1"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: programs under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Direct the caches of tests to a temporary folder, so that the user's stays unchanged."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    yield folder
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before
