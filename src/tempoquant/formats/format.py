"""What four bits mean. A `Format` is a value: levels, group size, and the grid its scales live on.

A group of `group_size` consecutive input features shares one scale; each element is stored as a 4-bit code, the signed
index of a level. Adding a format is adding a value to `FORMATS`.
"""

from dataclasses import dataclass
from enum import Enum

from tempoquant.errors import RecipeError


class ScaleGrid(str, Enum):
    """The numbers a scale may be, and how it is stored."""

    E8M0 = "e8m0"  # 2^e, one byte (OCP MX v1.0)
    E4M3 = "e4m3"  # FP8 e4m3, one byte, times one float32 scale per weight tensor
    BF16 = "bf16"  # any bfloat16, two bytes

    @property
    def num_bytes(self) -> int:
        return 2 if self is ScaleGrid.BF16 else 1


class ScaleRule(str, Enum):
    """How an E8M0 exponent follows from a group's largest magnitude; the other grids just round amax / top level."""

    FLOOR = "floor"  # floor(log2(amax)) − 2: OCP MX v1.0, section 6.3; the group's top may saturate
    CEIL = "ceil"  # ceil(log2(amax / top level)): nothing saturates


@dataclass(frozen=True)
class Format:
    """One 4-bit number format.

    Attributes:
        name: what recipes and checkpoints call it.
        levels: the magnitudes of codes 0 … 7, ascending from 0.
        group_size: input features that share one scale.
        scale_grid: the numbers a scale may be.
    """

    name: str
    levels: tuple[float, ...]
    group_size: int
    scale_grid: ScaleGrid

    def __post_init__(self) -> None:
        if len(self.levels) != 8 or self.levels[0] != 0 or list(self.levels) != sorted(set(self.levels)):
            raise RecipeError(f"format {self.name!r} needs 8 ascending levels that start at 0, not {self.levels}.")
        if self.group_size < 2 or self.group_size % 2:
            raise RecipeError(f"format {self.name!r} needs an even group size, not {self.group_size}.")

    @property
    def top_level(self) -> float:
        """The largest magnitude a code can mean, in units of the scale."""
        return self.levels[-1]

    @property
    def has_tensor_scale(self) -> bool:
        """Whether weights carry one float32 scale per tensor above the group scales (NVFP4)."""
        return self.scale_grid is ScaleGrid.E4M3

    def num_groups(self, in_features: int, where: str = "the layer") -> int:
        """How many groups `in_features` make. Raises RecipeError when the group size does not divide them."""
        if in_features % self.group_size:
            raise RecipeError(
                f"{where} has in_features = {in_features}, which groups of {self.group_size} ({self.name}) do not "
                "divide: keep this layer in 16 bits with a `layers` pattern, or choose another format for it."
            )
        return in_features // self.group_size


E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

MXFP4 = Format("mxfp4", E2M1_LEVELS, 32, ScaleGrid.E8M0)
NVFP4 = Format("nvfp4", E2M1_LEVELS, 16, ScaleGrid.E4M3)
INT4 = Format("int4", tuple(float(level) for level in range(8)), 64, ScaleGrid.BF16)

FORMATS = {format.name: format for format in (MXFP4, NVFP4, INT4)}


def get_format(name: str) -> Format:
    """The format of that name. Raises RecipeError, listing the known ones."""
    if name not in FORMATS:
        raise RecipeError(f"unknown format {name!r}; known formats are {', '.join(sorted(FORMATS))}.")
    return FORMATS[name]
