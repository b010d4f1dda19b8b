"""Formats: a `Format` is a value that holds levels, group size, and the grid of its scales.

A group of `group_size` consecutive input features shares one scale; each element is stored as a
4-bit code, the signed index of a level. Adding a format is adding a value to `FORMATS`.
"""

from dataclasses import dataclass
from enum import Enum

from tempoquant.errors import RecipeError


class ScaleGrid(str, Enum):
    """The grids of numbers that a scale may take, and their storage."""

    E8M0 = "e8m0"  # 2^e, one byte (OCP MX v1.0)
    E4M3 = "e4m3"  # FP8 e4m3, one byte, times one float32 scale per weight tensor
    E4M1 = "e4m1"  # the e4m3 numbers 2^e and 1.5·2^e, stored and used as those are
    BF16 = "bf16"  # any bfloat16, two bytes

    @property
    def num_bytes(self) -> int:
        return 2 if self is ScaleGrid.BF16 else 1

    @property
    def is_e4m3(self) -> bool:
        """Return whether the scales are stored as FP8 e4m3."""
        return self in (ScaleGrid.E4M3, ScaleGrid.E4M1)


class ScaleRule(str, Enum):
    """The rules that compute a group's scale from its numbers.

    Floor and ceil compute an E8M0 exponent from the largest magnitude; on the other grids both
    round amax / top level. Least error tries a few scales.
    """

    FLOOR = "floor"  # floor(log2(amax)) − 2: OCP MX v1.0, section 6.3; the group's top may saturate
    CEIL = "ceil"  # ceil(log2(amax / top level)): nothing saturates
    LEAST_ERROR = "least_error"  # the format's candidate with the least squared error; E8M0 by ceil


@dataclass(frozen=True)
class Format:
    """One 4-bit number format.

    Attributes:
        name: its name in recipes and checkpoints.
        levels: the magnitudes of codes 0 … 7, ascending from 0.
        group_size: input features that share one scale.
        scale_grid: the numbers a scale may be.
        scale_candidates: multiples of a group's amax from which the rule "least_error" makes
            scales; the first is 1.
        scale_octaves: how many octaves a scale may lie below the scale of its row's largest
            magnitude; None for any. A row is one token, or one output of a weight.
    """

    name: str
    levels: tuple[float, ...]
    group_size: int
    scale_grid: ScaleGrid
    scale_candidates: tuple[float, ...] = (1.0,)
    scale_octaves: int | None = None

    def __post_init__(self) -> None:
        if len(self.levels) != 8 or self.levels[0] != 0 or list(self.levels) != sorted(set(self.levels)):
            raise RecipeError(f"format {self.name!r} needs 8 ascending levels that start at 0, not {self.levels}.")
        if self.group_size < 2 or self.group_size & (self.group_size - 1):
            raise RecipeError(f"format {self.name!r} needs a power of two as its group size, not {self.group_size}.")
        if self.scale_candidates[:1] != (1.0,) or min(self.scale_candidates) <= 0:
            raise RecipeError(f"format {self.name!r} needs positive candidates, 1 the first: {self.scale_candidates}.")

    @property
    def top_level(self) -> float:
        """Return the largest magnitude of a code, in units of the scale."""
        return self.levels[-1]

    @property
    def has_integer_levels(self) -> bool:
        """Return whether codes equal their levels, so that integer hardware can multiply them
        (INT4).
        """
        return self.levels == tuple(range(len(self.levels)))

    @property
    def is_fp8_exact(self) -> bool:
        """Return whether levels times scales of a row are E4M3 numbers times a power of two.

        They are, if the scales of a row span 15 octaves at most; formats with `scale_octaves`
        ensure that. Decision 0005.
        """
        return self.levels == E2M1_LEVELS and self.scale_grid in (ScaleGrid.E8M0, ScaleGrid.E4M1)

    @property
    def has_tensor_scale(self) -> bool:
        """Return whether weights carry one float32 scale per tensor above the group scales
        (NVFP4).
        """
        return self.scale_grid.is_e4m3

    def num_groups(self, in_features: int, where: str = "the layer") -> int:
        """Return the number of groups in `in_features`. Raises RecipeError if the group size does
        not divide them.
        """
        if in_features % self.group_size:
            raise RecipeError(
                f"{where} has in_features = {in_features}, which groups of {self.group_size} ({self.name}) do not "
                "divide: keep this layer in 16 bits with a `layers` pattern, or choose another format for it."
            )
        return in_features // self.group_size


E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# The candidates were found by experiment (docs/log.md): more of them gain nothing visible. 1.5 puts
# the largest number of a group on the level 4, whose neighbours are nearer. The others clip it, in
# INT4 only slightly: the most clipped features are large in input and weight alike, where the same
# error costs more.
MXFP4 = Format("mxfp4", E2M1_LEVELS, 32, ScaleGrid.E8M0, (1.0, 0.5))
NVFP4 = Format("nvfp4", E2M1_LEVELS, 16, ScaleGrid.E4M3, (1.0, 0.875, 1.5))
# NVFP4 for FP8 tensor cores: a level times such a scale, divided by a power of two of its row, is
# an FP8 e4m3 number over thirteen octaves (docs/decisions/0005-nvfp4-that-fp8-can-run.md).
NVFP4_M1 = Format("nvfp4_m1", E2M1_LEVELS, 16, ScaleGrid.E4M1, (1.0, 1.5), scale_octaves=12)
INT4 = Format("int4", tuple(float(level) for level in range(8)), 64, ScaleGrid.BF16, (1.0, 0.9375, 0.875))

FORMATS = {format.name: format for format in (MXFP4, NVFP4, NVFP4_M1, INT4)}


def get_format(name: str) -> Format:
    """Return the format of that name. Raises RecipeError that lists the known formats."""
    if name not in FORMATS:
        raise RecipeError(f"unknown format {name!r}; known formats are {', '.join(sorted(FORMATS))}.")
    return FORMATS[name]
