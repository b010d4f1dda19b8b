"""The first code that the command `tempoquant` runs.

It lies outside the package because importing the package imports torch, and with it the runtime of
OpenMP, which reads the environment once, while it is loaded.
"""

import os

PATIENCE = {
    "OMP_WAIT_POLICY": "passive",  # the OpenMP standard's; GNU's runtime reads it, which torch brings on Linux
    "KMP_BLOCKTIME": "0",  # milliseconds; LLVM's and Intel's runtimes read it, which other builds of torch bring
}
"""Threads that wait for each other sleep. By default they spin, for microseconds between two small
products: alone on a machine that is a little faster, and beside other work they take the time from
the very thread that they wait for.
"""

USERS = (*PATIENCE, "GOMP_SPINCOUNT", "KMP_LIBRARY")
"""Variables by which a user chooses otherwise; then nothing is set."""


def wait_patiently() -> None:
    """Set OpenMP's threads of this process and of its children to sleep while they wait.

    It changes nothing that the user has set, and has no effect once torch is imported.
    """
    if not any(name in os.environ for name in USERS):
        os.environ.update(PATIENCE)


def main() -> None:
    """Run the command line."""
    wait_patiently()
    from tempoquant.cli import app

    app()
