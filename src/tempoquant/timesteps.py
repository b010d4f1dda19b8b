"""Denoisers and timestep bins: when a layer runs on the denoising trajectory.

Timesteps are the scheduler's: 0 clean … 1000 noise. Bins are intervals of timesteps, not step
positions, so that one checkpoint serves any number of steps and any scheduler.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tempoquant.errors import RecipeError

NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class Denoiser:
    """One of a pipeline's transformers, and the timesteps at which it runs.

    Attributes:
        name: Wan2.2's two experts are "high_noise" and "low_noise"; a single one is "transformer".
        component: its name in the pipeline.
        timesteps: the lowest and the highest timestep of its range.
    """

    name: str
    component: str
    timesteps: tuple[float, float] = (0.0, float(NUM_TRAIN_TIMESTEPS))


def denoiser_at(denoisers: Sequence[Denoiser], timestep: float) -> Denoiser:
    """Return the denoiser that runs at a timestep: a boundary belongs to the noisier one.

    Args:
        denoisers: of a pipeline, the noisiest first.
    """
    return next((each for each in denoisers if timestep >= each.timesteps[0]), denoisers[-1])


@functools.lru_cache(maxsize=64)
def _on_device(edges: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return the edges as a tensor, copied once: a CUDA graph that is being captured allows no copy
    from the host.
    """
    return torch.tensor(edges, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class TimestepBins:
    """Half-open intervals of timesteps; the outermost two are unbounded.

    Bin i holds edges[i − 1] ≤ timestep < edges[i]: bin 0 is the cleanest, bin num_bins − 1 the
    noisiest.

    Attributes:
        edges: ascending timesteps, one fewer than there are bins; () means a single bin.
    """

    edges: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if any(not 0 <= edge <= NUM_TRAIN_TIMESTEPS for edge in self.edges):
            raise RecipeError(f"timestep bin edges must lie in [0, {NUM_TRAIN_TIMESTEPS}], not {list(self.edges)}.")
        if list(self.edges) != sorted(set(self.edges)):
            raise RecipeError(f"timestep bin edges must ascend strictly, not {list(self.edges)}.")

    @property
    def num_bins(self) -> int:
        return len(self.edges) + 1

    def of(self, timestep: float) -> int:
        """Return the bin of one timestep."""
        return int(self.of_tensor(torch.tensor(float(timestep))))

    def of_tensor(self, timestep: torch.Tensor) -> torch.Tensor:
        """Return the bins of a tensor of timesteps; same shape, int64."""
        return torch.bucketize(timestep.float().contiguous(), _on_device(self.edges, timestep.device), right=True)

    def joined(self, timesteps: Sequence[float]) -> "TimestepBins":
        """Join every bin that holds none of `timesteps` with its noisier neighbour, or the noisiest
        bin with its cleaner one.

        So a schedule that calibration samples only in part has as many bins as its samples can tell
        apart.
        """
        edges: list[float] = []
        for edge in self.edges:
            lowest = edges[-1] if edges else float("-inf")
            if any(lowest <= t < edge for t in timesteps) and any(t >= edge for t in timesteps):
                edges.append(edge)
        return TimestepBins(tuple(edges))

    @classmethod
    def from_step_fractions(cls, timesteps: Sequence[float], fractions: Sequence[float]) -> "TimestepBins":
        """Convert bins given by step position to edges for the schedule that was used.

        Step i of n (in sampling order, noisiest first) has position i / n, and a fraction f puts
        all steps of position below f into the noisier bin. The edge lies halfway between the two
        steps it separates. A fraction that separates no step from another (short schedules) makes
        no edge. Source: arXiv 2605.27003's bins, as edges.

        Args:
            timesteps: one denoiser's timesteps, falling.
            fractions: ascending, each in (0, 1).
        """
        falling = [float(t) for t in timesteps]
        if falling != sorted(falling, reverse=True):
            raise RecipeError(f"timesteps must fall along the sampling loop, not {falling}.")
        edges = set()
        for fraction in fractions:
            noisier = [t for i, t in enumerate(falling) if i / len(falling) < fraction]
            cleaner = falling[len(noisier) :]
            if noisier and cleaner and noisier[-1] > cleaner[0]:
                edges.add((noisier[-1] + cleaner[0]) / 2)
        return cls(tuple(sorted(edges)))
