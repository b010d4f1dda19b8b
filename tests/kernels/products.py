"""Operands of matrix products whose sums have no rounding, and what they give."""

from collections.abc import Iterator

import pytest
import torch

from tempoquant.kernels.quantized_input import QuantizedInput

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill every new tensor with NaN, so that unwritten elements show."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole_numbers(*shape: int, largest: int, seed: int) -> torch.Tensor:
    """Return random whole numbers from −largest to largest, float32."""
    return torch.randint(-largest, largest + 1, shape, generator=generator(seed)).float()


def powers_of_two(*shape: int, seed: int) -> torch.Tensor:
    """Return random numbers from 1/4 … 4, float32."""
    return torch.exp2(whole_numbers(*shape, largest=2, seed=seed))


def between_poison(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix as dtype on the device, a view into memory that is NaN (127, for integers)
    around it.
    """
    rows, columns = matrix.shape
    around = torch.full((rows + 2, columns + 32), 127 if dtype == torch.int8 else torch.nan).to(dtype)
    around[1:-1, 16:-16] = matrix.to(dtype)
    return around.to(DEVICE)[1:-1, 16:-16]


def branch(num_tokens: int, num_outputs: int, rank: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return hidden and up, of whole numbers; None, None at rank 0."""
    if rank == 0:
        return None, None
    hidden = whole_numbers(num_tokens, rank, largest=8, seed=11).bfloat16()
    return hidden.to(DEVICE), whole_numbers(num_outputs, rank, largest=8, seed=12).bfloat16().to(DEVICE)


def expected(
    quantized: QuantizedInput, weight: torch.Tensor, column_scale: torch.Tensor | None, up: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Compute y in float64 on the CPU, from the same operands: scales one a row, or one a row and
    group.
    """
    x, w = quantized.values.cpu().double(), weight.cpu().double()
    if quantized.scale is not None:
        scale = quantized.scale.cpu().double().reshape(len(x), -1)
        x = x * scale.repeat_interleave(x.shape[1] // scale.shape[1], 1)
    if column_scale is not None:
        scale = column_scale.cpu().double().reshape(-1, 1 if column_scale.dim() < 2 else column_scale.shape[1])
        w = w * scale.repeat_interleave(w.shape[1] // scale.shape[1], 1)
    y = x @ w.T
    if quantized.hidden is not None and up is not None:
        y = y + quantized.hidden.cpu().double() @ up.cpu().double().T
    return y if bias is None else y + bias.cpu().double()
