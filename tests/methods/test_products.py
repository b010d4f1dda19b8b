"""Laws of large products: full precision, the same bytes each time, and no setting that others can
see.
"""

import pytest
import torch

from tempoquant.methods.products import add_product_, linear, product

# Small ones go one way and large ones may go another, by the processor; the last has one side too
# short for the other.
SHAPES = [(3, 5, 7), (400, 600, 500), (700, 1100, 384), (700, 1100, 20)]


def operands(left_rows: int, terms: int, right_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(left_rows, terms, generator=generator), torch.randn(right_rows, terms, generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_has_the_precision_of_float32_whatever_the_number_format_of_its_operands(shape) -> None:
    left, right = operands(*shape)
    exact = left.double() @ right.double().T
    # Standard deviation of a sum of `terms` rounded additions; eight of them, and bfloat16 would be
    # 2^15 times that.
    tolerance = 8 * shape[1] ** 0.5 * 2**-24 * shape[1] ** 0.5
    assert (product(left, right).double() - exact).abs().max() < tolerance


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_adding_a_product_in_place_is_adding_the_product(shape, sign: int) -> None:
    left, right = operands(*shape)
    whole = torch.ones(shape[0] + 2, shape[2] + 3)
    add_product_(whole[1:-1, 2:-1], left, right, sign)  # a slice, as GPTQ's columns are
    torch.testing.assert_close(whole[1:-1, 2:-1], 1 + sign * product(left, right), rtol=1e-5, atol=1e-3)
    border = torch.ones_like(whole)
    border[1:-1, 2:-1] = whole[1:-1, 2:-1]
    assert torch.equal(whole, border)


def test_operands_that_are_slices_and_transposes_give_the_same_product() -> None:
    left, right = operands(400, 600, 500)
    wide = torch.cat((left, left), dim=1)
    assert torch.equal(product(wide[:, :600], right.T.contiguous().T), product(left, right))


def test_a_product_is_the_same_bytes_each_time_and_changes_no_setting() -> None:
    left, right = operands(600, 900, 500)
    before = torch.get_float32_matmul_precision()
    assert torch.equal(product(left, right), product(left, right))
    assert torch.get_float32_matmul_precision() == before


def test_float64_stays_float64() -> None:
    left, right = (x.double() for x in operands(400, 600, 500))
    assert torch.equal(product(left, right), left @ right.T)


@pytest.mark.parametrize("tokens", [1, 300, 9000])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_linear_is_the_ordinary_one_whatever_its_rows_are_cut_into(tokens: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, tokens, 256, generator=generator), torch.randn(300, 256, generator=generator)
    bias = torch.randn(300, generator=generator) if with_bias else None
    wanted = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    found = linear(x, weight, bias)
    assert found.shape == (2, tokens, 300)
    tolerance = 256 * torch.finfo(torch.float32).eps * float(x.abs().max() * weight.abs().max())
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance)
