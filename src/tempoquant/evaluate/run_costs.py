"""The cost of one generation: seconds a step, and the largest memory of each of its phases."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tempoquant.hosts.diffusers.modular import is_modular
from tempoquant.models.families import facts_of

_Watched = tuple[Any, str, str, str | None]
"""A call, by its owner and name, with the phase that it is, and the one that begins after it."""

PHASES = ("text encoding", "image encoding", "denoising", "decoding")
GIB = 2**30


@dataclass
class RunCosts:
    """The costs of one generation, filled in during it.

    Attributes:
        seconds_per_step: of denoising; None before the last step.
        peak_gpu_gib: by phase, what PyTorch had allocated; None without a GPU.
        peak_rss_gib: of the process during the generation; None if the system does not tell.
    """

    seconds_per_step: float | None = None
    peak_gpu_gib: dict[str, float] | None = None
    peak_rss_gib: float | None = None
    _device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _phase: str | None = None
    _begin: float = 0.0
    _num_steps: int = 0

    def step(self) -> None:
        """Count a step; call it after each."""
        self._synchronize()
        self._num_steps += 1
        self.seconds_per_step = (time.perf_counter() - self._begin) / self._num_steps

    def enter(self, phase: str | None) -> None:
        """Begin a phase, and end the one before. A phase that has begun continues."""
        if phase is not None and phase == self._phase:
            return
        self._synchronize()
        if self.peak_gpu_gib is not None:
            if self._phase is not None:
                peak = torch.cuda.max_memory_allocated(self._device) / GIB
                self.peak_gpu_gib[self._phase] = max(peak, self.peak_gpu_gib.get(self._phase, 0.0))
            torch.cuda.reset_peak_memory_stats(self._device)
        if phase == "denoising":
            self._begin = time.perf_counter()
        self._phase = phase

    def record(self) -> dict[str, Any]:
        """Return plain values."""
        names = ("seconds_per_step", "peak_gpu_gib", "peak_rss_gib")
        return {name: getattr(self, name) for name in names}

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@contextlib.contextmanager
def measuring_costs(pipeline: Any) -> Iterator[RunCosts]:
    """Measure one generation of a pipeline within this context. The pipeline is unchanged
    afterwards.
    """
    device = torch.device(pipeline._execution_device)  # `device` is the CPU if a memory mode keeps all weights there
    costs = RunCosts(peak_gpu_gib={} if device.type == "cuda" else None, _device=device)
    rss_is_fresh = _reset_peak_rss()
    with contextlib.ExitStack() as stack:
        for owner, name, phase, then in _of_blocks(pipeline) if is_modular(pipeline) else _of_methods(pipeline):
            stack.enter_context(_watched(owner, name, phase, then, costs))
        yield costs
    costs.enter(None)
    costs.peak_rss_gib = _peak_rss_gib() if rss_is_fresh else None


def _of_methods(pipeline: Any) -> tuple[_Watched, ...]:
    """Return the watched calls of an ordinary pipeline. Work between two of them belongs to the
    former, so denoising begins when latents are prepared.
    """
    return (
        (pipeline, "encode_prompt", "text encoding", None),
        (pipeline, "prepare_latents", "image encoding", "denoising"),
        (pipeline.vae, "decode", "decoding", None),
    )


def _of_blocks(pipeline: Any) -> tuple[_Watched, ...]:
    """Return the watched calls of a modular pipeline, which are its models': it has no such
    methods. Denoising begins with a denoiser's first call.
    """
    facts = facts_of(pipeline)
    encoder = getattr(pipeline, facts.family.text_encoder).get_submodule(facts.family.text_encoder_called)
    denoisers = [getattr(pipeline, denoiser.component) for denoiser in facts.denoisers]
    return (
        (encoder, "forward", "text encoding", None),
        (pipeline.vae, "encode", "image encoding", None),
        *((denoiser, "forward", "denoising", "denoising") for denoiser in denoisers),
        (pipeline.vae, "decode", "decoding", None),
    )


@contextlib.contextmanager
def _watched(owner: Any, name: str, phase: str, then: str | None, costs: RunCosts) -> Iterator[None]:
    original: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        costs.enter(phase)
        result = original(*args, **kwargs)
        costs.enter(then)
        return result

    before = dict(owner.__dict__)
    owner.__dict__[name] = watched
    try:
        yield
    finally:
        del owner.__dict__[name]
        if name in before:
            owner.__dict__[name] = before[name]


def _reset_peak_rss() -> bool:
    """Reset Linux's record of the largest memory; return whether it did."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        peak, now = _status_gib("VmHWM"), _status_gib("VmRSS")
    except (OSError, ValueError):
        return False
    return peak <= now * 1.02


def _peak_rss_gib() -> float | None:
    try:
        return _status_gib("VmHWM")
    except (OSError, ValueError):
        return None


def _status_gib(key: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 2**20
    raise ValueError(f"the system does not tell {key}")
