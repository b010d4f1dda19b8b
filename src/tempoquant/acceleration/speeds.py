"""The three speeds and their settings. docs/speed.md has a command behind every default."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from tempoquant.acceleration.cache_settings import CacheSettings

Speed = Literal["exact", "fast", "fastest"]
SPEEDS: tuple[Speed, ...] = get_args(Speed)


@dataclass(frozen=True)
class SpeedDefaults:
    """The default choices of a speed.

    Attributes:
        meaning: for people, in one line.
        cache: of steps, or None.
        skipped_on_tiny: share of denoiser calls that the cache left out on the bundled model
            (docs/speed.md).
    """

    meaning: str
    cache: CacheSettings | None
    skipped_on_tiny: float = 0.0


DEFAULTS: Mapping[Speed, SpeedDefaults] = {
    "exact": SpeedDefaults("every step, attention in 16 bits: the same computation, rounded elsewhere at most", None),
    "fast": SpeedDefaults(
        "MagCache, two steps in a row at most, attention in 8 bits where a kernel for it is installed",
        CacheSettings("magcache", threshold=0.06, max_skip_steps=2, retention_ratio=0.2),
        skipped_on_tiny=0.35,
    ),
    "fastest": SpeedDefaults(
        "MagCache, more steps in a row, attention in 4 or 8 bits where a kernel for it is installed",
        CacheSettings("magcache", threshold=0.12, max_skip_steps=4, retention_ratio=0.1),
        skipped_on_tiny=0.55,
    ),
}
