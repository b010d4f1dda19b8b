"""Rounding groups to packed E2M1 codes with Blackwell's own conversions: two numbers at a time,
signs included.

The codes are those of `triton_rounding.round_groups`, which Triton's interpreter runs instead: the
conversion rounds to the nearest level, ties to even, saturates, and makes NaN the top level.
"""

import triton
import triton.language as tl

from tempoquant.kernels.triton_bits import largest_of, with_sign_of
from tempoquant.kernels.triton_decode import packed_levels
from tempoquant.kernels.triton_division import reciprocal_of_scale, remainder_of_reciprocal
from tempoquant.kernels.triton_rounding import round_groups, sum_by_halves
from tempoquant.kernels.triton_scales import group_scale

# Two numbers x, the scale's negative, and its reciprocal in one part or in two; out come both
# squared errors and both codes in a byte. One rounding for each operation, as in
# `triton_division.divided` and `triton_rounding.squared_error`. Packed float32 (x2) where it saves
# more than the moves that bring pairs together.
_BEGIN = (
    "{ .reg .b64 x, s, r, t; .reg .f32 a, b; .reg .b8 c; .reg .b32 h; .reg .b16 l, u;"
    "mov.b64 x, {$3, $4}; mov.b64 s, {$5, $5}; mov.b64 r, {$6, $6};"
)
_END = (
    "mov.b64 {a, b}, t; cvt.rn.satfinite.e2m1x2.f32 c, b, a; cvt.rn.f16x2.e2m1x2 h, c; mov.b32 {l, u}, h;"
    "cvt.f32.f16 a, l; cvt.f32.f16 b, u; mov.b64 t, {a, b}; fma.rn.f32x2 t, t, s, x; mov.b64 {a, b}, t;"
    "mul.rn.f32 $0, a, a; mul.rn.f32 $1, b, b; cvt.u32.u8 $2, c; }"
)
_BY_PRODUCT = tl.constexpr(_BEGIN + "mul.rn.f32x2 t, x, r;" + _END)
_BY_DIVISION = tl.constexpr(_BEGIN + "mov.b64 t, {$7, $7}; mul.rn.f32x2 t, x, t; fma.rn.f32x2 t, x, r, t;" + _END)


@triton.jit
def round_groups_to_codes(
    grouped: tl.tensor, row_amax: tl.tensor, clip_ratio: tl.tensor, FORMAT: tl.constexpr, IS_TRIED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Scale and amax of each group (rows, groups), and packed codes (rows, columns / 2) uint8, the
    even column low.

    The parameters are those of `triton_rounding.round_groups`.
    """
    BYTES: tl.constexpr = grouped.shape[1] * FORMAT.group // 2
    if FORMAT.is_interpreted:
        scale, amax, level = round_groups(grouped, row_amax, clip_ratio, FORMAT, IS_TRIED)
        packed = packed_levels(tl.reshape(with_sign_of(level, grouped), (grouped.shape[0], 2 * BYTES)))
    else:
        amax = largest_of(grouped, FORMAT.is_interpreted)
        pairs = tl.reshape(grouped, (grouped.shape[0], grouped.shape[1], FORMAT.group // 2, 2))
        even, odd = tl.split(pairs)
        scale = group_scale(amax, row_amax, clip_ratio * FORMAT.candidates[0], FORMAT, IS_TRIED)
        error, codes = _errors_and_codes(even, odd, scale, FORMAT)
        for index in tl.static_range(1, len(FORMAT.candidates)):
            other_scale = group_scale(amax, row_amax, clip_ratio * FORMAT.candidates[index], FORMAT, IS_TRIED)
            other_error, other_codes = _errors_and_codes(even, odd, other_scale, FORMAT)
            is_better = other_error < error
            error = tl.where(is_better, other_error, error)
            scale = tl.where(is_better, other_scale, scale)
            codes = tl.where(is_better[:, :, None], other_codes, codes)
        packed = tl.reshape(codes, (grouped.shape[0], BYTES)).to(tl.uint8)
    return scale, amax, packed


@triton.jit
def _errors_and_codes(
    even: tl.tensor, odd: tl.tensor, scale: tl.tensor, FORMAT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the squared error of each group (rows, groups), by halves, and the codes of its pairs,
    a byte in an int32.
    """
    if FORMAT.grid == "e4m3":
        high = 1.0 / scale
        low = remainder_of_reciprocal(scale, high, FORMAT)
        of_even, of_odd, codes = tl.inline_asm_elementwise(
            _BY_DIVISION, "=f,=f,=r,f,f,f,f,f", [even, odd, -scale[:, :, None], high[:, :, None], low[:, :, None]],
            dtype=(tl.float32, tl.float32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        of_even, of_odd, codes = tl.inline_asm_elementwise(
            _BY_PRODUCT, "=f,=f,=r,f,f,f,f", [even, odd, -scale[:, :, None], reciprocal_of_scale(scale)[:, :, None]],
            dtype=(tl.float32, tl.float32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    LOG2: tl.constexpr = FORMAT.log2_group - 1
    return sum_by_halves(of_even, LOG2) + sum_by_halves(of_odd, LOG2), codes
