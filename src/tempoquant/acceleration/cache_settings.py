"""The settings of step caches, and the steps that MagCache skips, known before anything runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tempoquant.errors import SettingsError

CacheName = Literal["magcache", "firstblock", "taylorseer"]
CACHES: tuple[CacheName, ...] = get_args(CacheName)


@dataclass(frozen=True)
class CacheSettings:
    """Settings of one of diffusers' caches. docs/speed.md has the measurements behind the defaults.

    Attributes:
        name: "magcache" (arXiv 2506.09045), "firstblock" (ParaAttention's First Block Cache) or
            "taylorseer" (arXiv 2503.06923).
        threshold: MagCache: the error that may add up before a step is computed. First Block Cache:
            the relative change of the first block's residual from which a step is computed.
        max_skip_steps: MagCache: the most steps in a row that are skipped.
        retention_ratio: MagCache: the share of each denoiser's steps, its first ones, that are
            always computed.
        interval: TaylorSeer: one of this many steps is computed.
    """

    name: CacheName
    threshold: float = 0.06
    max_skip_steps: int = 2
    retention_ratio: float = 0.2
    interval: int = 3

    def __post_init__(self) -> None:
        if self.name not in CACHES:
            raise SettingsError(f"a cache is one of {', '.join(CACHES)}, not {self.name!r}.")
        fits = 0 <= self.threshold < math.inf and self.max_skip_steps >= 0 and 0 <= self.retention_ratio <= 1
        if not fits or self.interval < 1:
            raise SettingsError(f"{self} has a setting out of range: threshold and steps are finite and start at 0.")

    def __str__(self) -> str:
        if self.name == "magcache":
            return (
                f"magcache (threshold {self.threshold:g}, at most {self.max_skip_steps} steps in a row, the first "
                f"{self.retention_ratio:.0%} of each denoiser's steps computed)"
            )
        if self.name == "firstblock":
            return f"firstblock (threshold {self.threshold:g})"
        return f"taylorseer (one step of {self.interval} computed)"


def skipped_steps(ratios: Sequence[float], settings: CacheSettings) -> list[bool]:
    """Return which of a denoiser's steps MagCache skips, by the rule of diffusers' hook.

    MagCache, arXiv 2506.09045: the error of a skipped step is |1 − the ratios' product since the
    last computed one|, and a step is skipped while the errors' sum stays within the threshold.

    Args:
        ratios: of the steps, see `MagnitudeRatios.at`.
    """
    retained = int(settings.retention_ratio * len(ratios) + 0.5)
    product, error, run = 1.0, 0.0, 0
    skipped = []
    for step, ratio in enumerate(ratios):
        skip = False
        if step >= retained:
            product, run = product * ratio, run + 1
            error += abs(1 - product)
            skip = step > 0 and error <= settings.threshold and run <= settings.max_skip_steps
            if not skip:
                product, error, run = 1.0, 0.0, 0
        skipped.append(skip)
    return skipped
