"""The choice of the backend that runs a linear: per device and format, with a stated reason.

fp4        compute capability 10.x and 12.x; all but int4   stored codes and scales, multiplied
fp8        compute capability 8.9 and up; mxfp4, nvfp4_m1   both operands exact in FP8
int8       compute capability 8.0 and up; int4              integer products, rescaled by group
bf16       compute capability 8.0 and up; any format        the same numbers in bfloat16
reference  anything                                         plain PyTorch, the definition
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

import torch

from tempoquant.errors import UnsupportedError
from tempoquant.formats import Format

FP4_CAPABILITIES = (10, 12)
"""GPUs whose tensor cores multiply E2M1 codes with a scale for each group: Blackwell's, in data
centres and in RTX.
"""
LEAST_TRITON = (3, 5)
FP4_TRITON = (3, 6)
TRITON_PACKAGES = ("triton", "triton-windows", "pytorch-triton")
"""Distributions of the module `triton`: its own, and the one for Windows, which another project
builds.
"""


class Backend(str, Enum):
    """The kernels that run a 4-bit linear; users write the values."""

    FP4 = "fp4"
    FP8 = "fp8"
    INT8 = "int8"
    BF16 = "bf16"
    REFERENCE = "reference"


class Choice(NamedTuple):
    """A backend, and the reason for it as a sentence."""

    backend: Backend
    reason: str


_forced: list[Backend] = []
_promoting: list[bool] = []


@contextlib.contextmanager
def forced(backend: Backend | str | None) -> Iterator[None]:
    """Make every linear take this backend within this context; None leaves the choice free.

    Raises UnsupportedError for an unknown backend; a linear that cannot take it raises when it
    runs.
    """
    if backend is None:
        yield
        return
    _forced.append(backend_named(backend))
    try:
        yield
    finally:
        _forced.pop()


def is_forced() -> bool:
    """Return whether a backend is forced now."""
    return bool(_forced)


@contextlib.contextmanager
def promoted_sums() -> Iterator[None]:
    """Promote FP8 sums to float32 every 128 products within this context, on GPUs whose own sums
    are short.

    The error is a sixth of that without promotion; the time on Hopper is half as much again
    (docs/kernels.md).
    """
    _promoting.append(True)
    try:
        yield
    finally:
        _promoting.pop()


def are_sums_promoted() -> bool:
    """Return whether a context promotes sums."""
    return bool(_promoting)


def backend_named(name: Backend | str) -> Backend:
    """Return the backend of that name. Raises UnsupportedError that lists the known ones."""
    try:
        return Backend(name)
    except ValueError:
        known = ", ".join(backend.value for backend in Backend)
        raise UnsupportedError(f"there is no backend called {name!r}; known ones are {known}.") from None


def choose(device: torch.device, format: Format) -> Choice:
    """Choose the fastest backend of this device for a format, or the forced one.

    Raises UnsupportedError if the forced one cannot run here; Triton's interpreter
    (TRITON_INTERPRET=1) lets it.
    """
    if _forced:
        backend = _forced[-1]
        if (reason := why_not(backend, device, format)) and not _is_interpreted(backend, device, format):
            raise UnsupportedError(f"the backend {backend.value!r} was asked for, but {reason}.")
        return Choice(backend, "the user asked for it")
    return _choose(device, format)


@functools.lru_cache(maxsize=256)
def _choose(device: torch.device, format: Format) -> Choice:
    passed_over: dict[str, list[str]] = {}
    for backend in Backend:
        reason = why_not(backend, device, format)
        if reason is None:
            because = "; ".join(f"not {', '.join(backends)}: {reason}" for reason, backends in passed_over.items())
            return Choice(backend, because or "the fastest there is")
        passed_over.setdefault(reason, []).append(backend.value)
    raise AssertionError("the reference runs anywhere")


def why_not(backend: Backend, device: torch.device, format: Format) -> str | None:
    """Return the reason why a backend cannot run a format on a device; None if it can."""
    if backend is Backend.REFERENCE:
        return None
    if (reason := _why_no_numbers(backend, format)) is not None:
        return reason
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU, and {device.type} is none"
    if torch.version.hip is not None:
        return "it has not been tried on an AMD GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not _is_triton_at_least(LEAST_TRITON):
        return f"it needs Triton 3.5 (torch 2.9 brings it), and {triton_version()} is installed"
    if (reason := _why_not_there(backend, torch.cuda.get_device_capability(device))) is not None:
        return reason
    if backend is Backend.FP4 and not _is_triton_at_least(FP4_TRITON):
        return "it needs Triton 3.6"
    return None


def backend_at(capability: tuple[int, int], format: Format) -> Backend:
    """Return the fastest backend of an NVIDIA GPU's compute capability for a format, if all its
    requirements are met.
    """
    fitting = (backend for backend in Backend if _why_no_numbers(backend, format) is None)
    return next(
        backend for backend in fitting if backend is Backend.REFERENCE or _why_not_there(backend, capability) is None
    )


def _why_no_numbers(backend: Backend, format: Format) -> str | None:
    if backend is Backend.FP4 and format.has_integer_levels:
        return f"codes of {format.name} are no E2M1 numbers"
    if backend is Backend.FP8 and not format.is_fp8_exact:
        return f"numbers of {format.name} are no FP8 numbers"
    if backend is Backend.INT8 and not format.has_integer_levels:
        return f"codes of {format.name} are no integers"
    return None


def _why_not_there(backend: Backend, capability: tuple[int, int]) -> str | None:
    found = ".".join(map(str, capability))
    if backend is Backend.FP4:
        known = capability[0] in FP4_CAPABILITIES
        return None if known else f"it needs compute capability 10 or 12, and this GPU has {found}"
    needed = (8, 9) if backend is Backend.FP8 else (8, 0)
    if capability < needed:
        return f"it needs compute capability {needed[0]}.{needed[1]}, and this GPU has {found}"
    return None


def triton_version() -> str | None:
    """Return the version of Triton; None where it is not installed."""
    for name in TRITON_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _is_triton_at_least(least: tuple[int, int]) -> bool:
    found = re.match(r"(\d+)\.(\d+)", triton_version() or "")
    return found is not None and (int(found[1]), int(found[2])) >= least


def _is_interpreted(backend: Backend, device: torch.device, format: Format) -> bool:
    """Return whether Triton's interpreter replaces the GPU, as in tests, and the format suits the
    backend.
    """
    suits = _why_no_numbers(backend, format) is None
    return suits and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
