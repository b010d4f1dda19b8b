"""Laws of the rotation: Hadamard's matrix in blocks, its own inverse, the same products, and calmer
groups.
"""

import pytest
import torch
from scipy.linalg import hadamard

from tempoquant.formats import FORMATS, NVFP4_M1, ROTATION_SIZE, ScaleRule, quantize_activation, rotate
from tests.random_layers import random


def test_each_block_is_multiplied_by_sylvesters_matrix() -> None:
    x = random(5, 3 * ROTATION_SIZE).double()
    matrix = torch.tensor(hadamard(ROTATION_SIZE)).double() / ROTATION_SIZE**0.5
    wanted = torch.cat([block @ matrix for block in x.split(ROTATION_SIZE, -1)], dim=-1)
    torch.testing.assert_close(rotate(x), wanted, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_twice_is_nothing_and_products_stay(dtype: torch.dtype) -> None:
    x, weight = random(2, 7, 64).to(dtype), random(9, 64, seed=1).to(dtype)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(rotate(rotate(x)), x, rtol=0, atol=32 * unit)
    torch.testing.assert_close(rotate(x) @ rotate(weight).T, x @ weight.T, rtol=0, atol=1000 * unit)


def test_whole_numbers_and_powers_of_two_rotate_without_rounding() -> None:
    x = torch.randint(-1000, 1000, (4, 32), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(rotate(x).double(), rotate(x.double())) and torch.equal(rotate(x * 2.0**40), rotate(x) * 2.0**40)


def test_blocks_keep_apart() -> None:
    x = torch.zeros(1, 3 * ROTATION_SIZE)
    x[0, ROTATION_SIZE + 3] = 4.0
    assert rotate(x).abs().unflatten(-1, (-1, ROTATION_SIZE)).amax(-1).tolist() == [[0.0, 1.0, 0.0]]


def test_groups_with_one_large_number_lose_less_to_rounding() -> None:
    x = random(200, 64)
    x[:, ::16] *= 8
    error = quantize_activation(x, NVFP4_M1, ScaleRule.LEAST_ERROR) - x
    rotated = rotate(x)
    other = quantize_activation(rotated, NVFP4_M1, ScaleRule.LEAST_ERROR) - rotated
    assert other.square().sum() < 0.8 * error.square().sum()


def test_every_format_has_groups_of_whole_blocks() -> None:
    assert all(format.group_size % ROTATION_SIZE == 0 for format in FORMATS.values())
