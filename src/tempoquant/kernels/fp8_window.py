"""The formats that FP8 and INT8 hold without rounding, and the position of a row's scales in FP8.

FP8 E4M3 holds multiples of 2^-9 with four significant bits, up to 448. An E2M1 level has two of
them and starts at a half, so that a scale with no mantissa bit may be 2^-8 … 2^6 and one with a
single one 2^-7 … 1.5 · 2^5.
"""

import torch

from tempoquant.errors import UnsupportedError
from tempoquant.formats import Format, ScaleGrid, scale_from_bytes, unpack
from tempoquant.kernels.reference import WeightTensors

# The exponent of two at which the largest scale of a row is put, and how many octaves below it
# others may lie.
FP8_TOP_EXPONENT = {ScaleGrid.E8M0: 6, ScaleGrid.E4M1: 5}
FP8_OCTAVES = {ScaleGrid.E8M0: 14, ScaleGrid.E4M1: 12}


def check_fp8(format: Format) -> None:
    """Raise UnsupportedError unless a level times a scale is an FP8 number, relative to a power of
    two.
    """
    if not format.is_fp8_exact:
        raise UnsupportedError(
            f"{format.name} is not exact in FP8: its scales have more than one mantissa bit. Run it in BF16."
        )


def fp8_exact_rows(weight: WeightTensors, format: Format) -> torch.Tensor:
    """Return the rows of a weight whose numbers FP8 holds without rounding: (out,) bool.

    These are always all rows of NVFP4 with one mantissa bit, by its definition, and rows of MXFP4
    whose scales span 15 octaves or fewer. Raises UnsupportedError for formats that FP8 does not
    hold at all.
    """
    check_fp8(format)
    if format.scale_octaves is not None:
        return torch.ones(len(weight.packed), dtype=torch.bool, device=weight.packed.device)
    _, exponent = torch.frexp(scale_from_bytes(weight.scale, format))
    is_low = exponent < exponent.amax(-1, keepdim=True) - FP8_OCTAVES[format.scale_grid]
    if not bool(is_low.any()):
        return ~is_low.any(-1)
    holds_numbers = unpack(weight.packed, format).unflatten(-1, (-1, format.group_size)).any(-1)
    return ~(is_low & holds_numbers).any(-1)


def check_int8(format: Format) -> None:
    """Raise UnsupportedError unless levels are codes."""
    if not format.has_integer_levels:
        raise UnsupportedError(f"{format.name} has levels that are no integers, so INT8 does not hold them.")


def check_fp4(format: Format) -> None:
    """Raise UnsupportedError unless codes are E2M1."""
    if format.has_integer_levels:
        raise UnsupportedError(f"{format.name} has levels that are no E2M1 numbers, so FP4 does not hold them.")


def dtypes_of(format: Format) -> list[torch.dtype]:
    """Return the dtypes that a product's operands in this format may be expanded to: bfloat16, and
    those that hold them unrounded.
    """
    fp8 = [torch.float8_e4m3fn] if format.is_fp8_exact else []
    return [torch.bfloat16, *fp8, *([torch.int8] if format.has_integer_levels else [])]
