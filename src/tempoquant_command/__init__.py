"""What the command `tempoquant` runs first. It is apart from the package because importing that imports torch, and with
it the runtime of OpenMP, which reads the environment once, while it is loaded.
"""

import os

PATIENCE = {
    "OMP_WAIT_POLICY": "passive",  # the OpenMP standard's; what GNU's runtime reads, which torch brings on Linux
    "KMP_BLOCKTIME": "0",  # milliseconds; LLVM's and Intel's runtimes, which other builds of torch have
}
"""Threads that wait for each other sleep. By default they spin, for microseconds between two small products: alone on a
machine that is a little faster, and beside other work they take the time from the very thread that they wait for."""

USERS = (*PATIENCE, "GOMP_SPINCOUNT", "KMP_LIBRARY")
"""Whoever sets one of these has thought about it."""


def wait_patiently() -> None:
    """Have OpenMP's threads of this process and of those that it starts sleep while they wait.

    It does nothing where the user chose otherwise, and comes too late once torch is imported.
    """
    if not any(name in os.environ for name in USERS):
        os.environ.update(PATIENCE)


def main() -> None:
    """The command line."""
    wait_patiently()
    from tempoquant.cli import app

    app()
