"""Measurements and comparisons, each a program: `python -m benchmarks.NAME`."""

import contextlib

with contextlib.suppress(ModuleNotFoundError):  # in the environments of peers, which inherit it from who starts them
    from tempoquant_command import wait_patiently

    wait_patiently()  # before any of them imports torch
