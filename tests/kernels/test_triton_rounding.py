"""Device functions, each alone: what a whole kernel would show only in rare numbers."""

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

import triton
import triton.language as tl

from tempoquant.formats import INT4, ScaleRule
from tempoquant.kernels.triton_division import divide, divided, over_scale, remainder_of_reciprocal
from tempoquant.kernels.triton_rounding import nearest_integer, reciprocal_of_bfloat16, sum_by_halves
from tempoquant.kernels.triton_scales import rounding_of
from tests.kernels.rounded_inputs import DEVICE
from tests.random_layers import random

FORMAT = rounding_of(INT4, ScaleRule.CEIL)


@triton.jit
def _divide_kernel(
    x: tl.tensor, divisor: tl.tensor, reciprocal: tl.tensor, quotient: tl.tensor, over: tl.tensor, short: tl.tensor,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    numbers, divisors = tl.load(x + places), tl.load(divisor + places)
    tl.store(quotient + places, divide(numbers, divisors, tl.load(reciprocal + places), FORMAT))
    tl.store(over + places, over_scale(numbers, divisors, FORMAT))
    high = tl.load(reciprocal + places)
    tl.store(short + places, divided(numbers, high, remainder_of_reciprocal(divisors, high, FORMAT), FORMAT))


@triton.jit
def _sum_kernel(x: tl.tensor, total: tl.tensor, ROWS: tl.constexpr, GROUP: tl.constexpr, LOG2: tl.constexpr) -> None:
    rows, groups, places = tl.arange(0, ROWS), tl.arange(0, 4), tl.arange(0, GROUP)
    group = rows[:, None] * 4 + groups[None, :]
    tile = tl.load(x + group[:, :, None] * GROUP + places[None, None, :])
    tl.store(total + group, sum_by_halves(tile, LOG2))


@triton.jit
def _integer_kernel(
    x: tl.tensor, scale: tl.tensor, nearest: tl.tensor, FORMAT: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr
) -> None:
    groups = tl.arange(0, GROUPS)[None, :]
    places = groups[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    scales = tl.load(scale + groups)
    high, _ = reciprocal_of_bfloat16(scales, scales, FORMAT, True)
    tl.store(nearest + places, nearest_integer(tl.load(x + places), high, FORMAT))


def quotients(x: torch.Tensor, divisor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return quotients by `divide`, by `over_scale`, and, for divisors of eight significant bits,
    by `divided`.
    """
    x, divisor = x.float().to(DEVICE).contiguous(), divisor.float().to(DEVICE).contiguous()
    found = [torch.empty_like(x) for _ in range(3)]
    _divide_kernel[(x.numel() // 256,)](x, divisor, divisor.reciprocal(), *found, FORMAT, 256, enable_fp_fusion=False)
    first, second, third = (each.cpu() for each in found)
    return first, second, third


def test_every_two_mantissas_of_bfloat16_divide_as_in_ieee() -> None:
    mantissas = torch.arange(128, 256).float()
    x, divisor = (each.flatten() for each in torch.meshgrid(mantissas, mantissas, indexing="ij"))
    for found in quotients(x, divisor):
        assert torch.equal(found, x / divisor)


@pytest.mark.parametrize("exponents", [2, 90])
def test_floats_of_any_mantissa_divide_as_in_ieee(exponents: int) -> None:
    """While quotient and remainder are normal numbers; a plain product with the reciprocal does
    not.
    """
    x = random(2**14, seed=1) * 2.0 ** (random(2**14, seed=2) * 0.2 * exponents).round()
    divisor = random(2**14, seed=3).abs() * 2.0 ** (random(2**14, seed=4) * 0.1 * exponents).round()
    assert not torch.equal(x * divisor.reciprocal(), x / divisor)
    for found in quotients(x, divisor)[:2]:
        assert torch.equal(found, x / divisor)
    short = divisor.bfloat16().float()
    assert torch.equal(quotients(x, short)[2], x / short)


def test_numbers_beside_the_middle_of_two_floats_divide_as_in_ieee_by_every_short_divisor() -> None:
    """These quotients are the hardest to round: of the nearest floats to a midpoint times the
    divisor.
    """
    divisor = torch.arange(128, 256).repeat_interleave(128).float()
    generator = torch.Generator().manual_seed(5)
    middles = torch.randint(2**23, 2**24, divisor.shape, generator=generator).double() + 0.5
    x = (middles * divisor.double()).float()
    assert torch.equal(quotients(x, divisor)[2], x / divisor)


@pytest.mark.parametrize("divisor", [2.0**-126, 1.5 * 2.0**-126, 2.0**127, 1.984375 * 2.0**127])
def test_over_the_smallest_and_largest_scales_too(divisor: float) -> None:
    x = (random(256).abs() * divisor).clamp(max=torch.finfo(torch.float32).max)
    _, found, _ = quotients(x, torch.full_like(x, divisor))
    assert torch.equal(found, x / divisor)


def test_a_product_with_a_rounded_reciprocal_is_nearest_to_the_integer_that_the_quotient_is_nearest_to() -> None:
    """Every mantissa of a bfloat16 scale, every middle of two levels, and the four floats on either
    side of it.
    """
    scale = torch.arange(128, 256).float() * 2.0 ** (torch.arange(128) % 9 - 11)
    middles = torch.arange(7) + 0.5
    points = [(scale[:, None] * middles).float()] * 2
    exact = points[0]
    for _ in range(4):
        points += [torch.nextafter(points[-2], exact * 2), torch.nextafter(points[-1], exact * 0)]
    x = torch.cat([nn.functional.pad(torch.stack(points[1:], -1).flatten(1), (0, 1))] * 2, -1)
    x[:, 64:] *= -1
    found = torch.empty(x.shape, device=DEVICE)
    _integer_kernel[(1,)](x.to(DEVICE), scale.to(DEVICE), found, FORMAT, 128, 128, enable_fp_fusion=False)
    quotient = x.double() / scale.double()[:, None]
    is_middle = (quotient * 2 == (quotient * 2).round()) & (quotient != quotient.round())
    assert int(is_middle.sum()) >= 128 * 14
    assert torch.equal(found.cpu().double()[~is_middle], quotient.round()[~is_middle])
    assert bool(((found.cpu().double() - quotient).abs()[is_middle] == 0.5).all())


@pytest.mark.parametrize("log2_group", [4, 5, 6])
def test_sums_are_of_first_and_second_half_again_and_again(log2_group: int) -> None:
    x = random(8, 4, 2**log2_group).to(DEVICE)
    found = torch.empty(8, 4, device=DEVICE)
    _sum_kernel[(1,)](x, found, 8, 2**log2_group, log2_group, enable_fp_fusion=False)
    wanted, pairs = x, x
    while wanted.shape[-1] > 1:
        half = wanted.shape[-1] // 2
        wanted, pairs = wanted[..., :half] + wanted[..., half:], pairs[..., ::2] + pairs[..., 1::2]
    assert torch.equal(found, wanted.squeeze(-1)) and not torch.equal(found, pairs.squeeze(-1))
