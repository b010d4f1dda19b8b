"""MagnitudeRatios: how much a denoiser's blocks add to the hidden state, from one step to the next.

A step cache skips the blocks and adds their output of an earlier step. The ratio of the two
magnitudes predicts the error before anything is skipped; it hardly depends on the prompt (MagCache,
arXiv 2506.09045).
"""

import bisect
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tempoquant.checkpoint.checks import check_keys, require

BRANCHES = ("conditional", "unconditional")
MAX_STEPS = 1000
NOT_RECORDED = math.inf
"""The ratio of an unrecorded step: no cache takes it for a small change, so the step is
computed.
"""


@dataclass(frozen=True)
class MagnitudeRatios:
    """The recorded ratios of one denoiser.

    Attributes:
        timesteps: of its first steps in the sampling loop, falling.
        by_branch: guidance branch to a ratio for each timestep: the mean, over tokens and prompts,
            of the norm of the blocks' output there over its norm a step before; 1 for the first.
    """

    timesteps: tuple[float, ...]
    by_branch: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        falls = all(high > low for high, low in itertools.pairwise(self.timesteps))
        require(0 < len(self.timesteps) <= MAX_STEPS and falls, "timesteps", "fall", list(self.timesteps))
        known = bool(self.by_branch) and set(self.by_branch) <= set(BRANCHES)
        require(known, "magnitude_ratios", f"has one or both of {BRANCHES}", list(self.by_branch))
        for branch, ratios in self.by_branch.items():
            fits = len(ratios) == len(self.timesteps) and all(0 < ratio < math.inf for ratio in ratios)
            require(fits, branch, "is a ratio above 0 for each timestep", list(ratios))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the inverse of `from_dict`."""
        return {"timesteps": list(self.timesteps), **{name: list(each) for name, each in self.by_branch.items()}}

    @classmethod
    def from_dict(cls, record: Any) -> "MagnitudeRatios":
        """Check and parse a record. Raises CheckpointError that names the key."""
        check_keys(record, {"timesteps"}, optional=set(BRANCHES))
        for key, values in record.items():
            is_list = isinstance(values, list) and len(values) <= MAX_STEPS
            is_list = is_list and all(type(value) in (int, float) and math.isfinite(value) for value in values)
            require(is_list, key, f"is a list of at most {MAX_STEPS} numbers", values)
        lists = {key: tuple(float(value) for value in values) for key, values in record.items()}
        return cls(lists.pop("timesteps"), lists)

    @classmethod
    def mean_of(
        cls, prompts: Iterable[Mapping[str, Sequence[float]]], timesteps: Sequence[float]
    ) -> "MagnitudeRatios | None":
        """Return the mean over prompts; None if no prompt has a step.

        Args:
            prompts: for each prompt, guidance branch to the ratios of its first steps; some prompts
                end early.
            timesteps: of all the denoiser's steps.
        """
        found = list(prompts)
        means: dict[str, list[float]] = {}
        for branch in BRANCHES:
            lists = [prompt[branch] for prompt in found if prompt.get(branch)]
            for index in range(max(map(len, lists), default=0)):
                there = [ratios[index] for ratios in lists if index < len(ratios)]
                means.setdefault(branch, []).append(math.fsum(there) / len(there))
        if not means:
            return None
        num_steps = min(map(len, means.values()))
        return cls(tuple(timesteps[:num_steps]), {name: tuple(each[:num_steps]) for name, each in means.items()})

    def at(self, branch: str, timesteps: Sequence[float]) -> list[float]:
        """Interpolate the ratios for another schedule, whose magnitudes lie on the recorded curve
        (ours).

        The product of the recorded ratios gives the magnitude along the schedule; its logarithm is
        interpolated linearly between recorded timesteps. MagCache takes the nearest ratio instead,
        which belongs to a step of another length.

        Args:
            branch: of guidance.
            timesteps: of the denoiser, falling.

        Returns:
            A ratio for each timestep, 1 for the first, NOT_RECORDED for a branch or timestep
            outside the record.
        """
        if branch not in self.by_branch:
            return [NOT_RECORDED] * len(timesteps)
        course = list(itertools.accumulate(math.log(ratio) for ratio in self.by_branch[branch]))
        rising = self.timesteps[::-1]
        levels = [_between(rising, course[::-1], timestep) for timestep in timesteps]
        ratios = [1.0]
        for before, now in itertools.pairwise(levels):
            ratios.append(NOT_RECORDED if before is None or now is None else math.exp(now - before))
        return ratios[: len(timesteps)]


def _between(rising: Sequence[float], values: Sequence[float], at: float) -> float | None:
    """Interpolate linearly between neighbours; None outside."""
    if not rising[0] <= at <= rising[-1]:
        return None
    high = bisect.bisect_left(rising, at)
    if rising[high] == at:
        return values[high]
    share = (at - rising[high - 1]) / (rising[high] - rising[high - 1])
    return values[high - 1] + share * (values[high] - values[high - 1])
