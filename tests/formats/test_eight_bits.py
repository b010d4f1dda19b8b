"""Laws of 8-bit activations: a power of two for a token, E4M3 numbers, nothing saturates, zeros and
NaN stay theirs.
"""

import pytest
import torch

from tempoquant.formats import FORMATS, INT4, MXFP4, Format, eight_bit_scale, quantize_activation_to_8_bits

each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def tokens(num_tokens: int = 50, in_features: int = 192) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(num_tokens, 1, generator=generator).mul(5).exp()
    return torch.randn(num_tokens, in_features, generator=generator) * spread


@each_format
def test_half_a_step_of_the_grid_bounds_every_error(format: Format) -> None:
    x = tokens()
    scale = eight_bit_scale(x.abs().amax(-1, keepdim=True), format)
    error = (quantize_activation_to_8_bits(x, format) - x).abs()
    # E4M3 has 3 bits of mantissa and subnormals of 2^-9; INT8 steps of 1.
    half_step = 0.5 * scale if format is INT4 else torch.maximum(x.abs() * 2.0**-4, scale * 2.0**-10)
    assert bool((error <= half_step * (1 + 2.0**-20)).all())


@each_format
def test_the_largest_number_of_a_token_uses_the_top_of_the_grid(format: Format) -> None:
    amax = tokens().abs().amax(-1)
    reached = amax / eight_bit_scale(amax, format)
    top = 127.0 if format is INT4 else 448.0
    assert bool((reached <= top * (1 + 2.0**-20)).all()) and bool((reached > top / 2).all())


def test_floating_point_formats_have_a_power_of_two_for_a_token() -> None:
    amax = torch.cat([tokens().abs().amax(-1), torch.tensor([448.0, 448.1, 1e-38, 3e38])])
    mantissa, _ = torch.frexp(eight_bit_scale(amax, MXFP4))
    assert bool((mantissa == 0.5).all())
    assert eight_bit_scale(torch.tensor([448.0, 449.0]), MXFP4).tolist() == [1.0, 2.0]


@each_format
def test_rounding_twice_is_rounding_once(format: Format) -> None:
    once = quantize_activation_to_8_bits(tokens().double(), format)
    torch.testing.assert_close(quantize_activation_to_8_bits(once, format), once, rtol=1e-6, atol=0)


@each_format
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_zeros_stay_zeros_and_a_bad_number_makes_its_token_nan(format: Format, bad: float) -> None:
    x = tokens(3)
    x[0] = 0
    x[1, 7] = bad
    rounded = quantize_activation_to_8_bits(x, format)
    assert rounded[0].eq(0).all() and rounded[1].isnan().all() and rounded[2].isfinite().all()
