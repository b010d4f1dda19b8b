"""The layout of an operator's arguments in memory changes nothing: with gaps, or one row or number
for all.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tempoquant.formats import INT4, MXFP4, NVFP4_M1, Format, ScaleRule
from tempoquant.kernels import operators
from tempoquant.kernels.dispatch import Backend, forced
from tests.kernels.products import DEVICE
from tests.kernels.test_backends import linear
from tests.random_layers import random

POISON = 0x7F  # NaN in FP8, 127 in bytes, 3.4e38 in wider floats


def with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    wide = torch.empty(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
    wide.view(torch.uint8).fill_(POISON)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def turned(tensor: torch.Tensor) -> torch.Tensor:
    """Return features a row apart, as in a transposed tensor; a vector has only one order."""
    return tensor if tensor.dim() < 2 else tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def cut_out(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view into a wider tensor that starts at no aligned address."""
    wide = torch.empty(*tensor.shape[:-1], tensor.shape[-1] + 3, dtype=tensor.dtype, device=tensor.device)
    wide.view(torch.uint8).fill_(POISON)
    wide[..., 1:-2] = tensor
    return wide[..., 1:-2]


def one_for_all_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:1].expand(tensor.shape)


def one_for_all_columns(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[..., :1].expand(tensor.shape)


each_layout = pytest.mark.parametrize("lay_out", [with_gaps, turned, cut_out, one_for_all_rows, one_for_all_columns])
each_backend = pytest.mark.parametrize(
    ("backend", "format"),
    [(Backend.FP8, NVFP4_M1), (Backend.FP8, MXFP4), (Backend.BF16, NVFP4_M1), (Backend.INT8, INT4)],
)


def relaid(argument: Any, lay_out: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return lay_out(argument) if isinstance(argument, torch.Tensor) and argument.numel() > 1 else argument


def assert_the_same(
    operator: Any, tensors: tuple[Any, ...], lay_out: Callable[[torch.Tensor], torch.Tensor], **settings: Any
) -> None:
    """Assert the same result for tensors in this layout, and for the same numbers in order."""
    moved = [relaid(tensor, lay_out) for tensor in tensors]
    plain = [each.contiguous() if isinstance(each, torch.Tensor) else each for each in moved]
    assert any(isinstance(each, torch.Tensor) and not each.is_contiguous() for each in moved)
    found, wanted = operator(*moved, **settings), operator(*plain, **settings)
    for one, other in zip(*(each if isinstance(each, tuple) else (each,) for each in (found, wanted)), strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=0, equal_nan=True)


@each_backend
@each_layout
def test_quantizing_reads_its_arguments_wherever_they_lie(
    backend: Backend, format: Format, lay_out: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    transform = linear(format).input_transform()
    x = random(6, 3 * format.group_size).bfloat16().to(DEVICE)
    hidden = random(6, transform.deflation.shape[1], seed=1).bfloat16().to(DEVICE)
    ratios, flags = torch.tensor([0.7, 1.0], device=DEVICE), torch.tensor([True, False], device=DEVICE)
    tensors = (x, hidden, transform.smoothing_factor, transform.deflation, transform.input_offset, ratios, flags)
    settings = {"rotated": transform.rotated, "format": format.name, "rule": "least_error", "backend": backend.value}
    assert_the_same(operators._quantize_input, tensors, lay_out, **settings)


@each_backend
def test_rows_of_a_batch_entry_do_not_depend_on_the_bits_and_clip_ratios_of_others(
    backend: Backend, format: Format
) -> None:
    transform = linear(format).input_transform()
    x = random(6, 3 * format.group_size).bfloat16().to(DEVICE)
    hidden = random(6, transform.deflation.shape[1], seed=1).bfloat16().to(DEVICE)
    ratios, flags = torch.tensor([0.7, 1.0], device=DEVICE), torch.tensor([True, False], device=DEVICE)

    def quantized(rows: slice, entries: slice) -> tuple[torch.Tensor, ...]:
        return operators._quantize_input(
            x[rows], hidden[rows], transform.smoothing_factor, transform.deflation, transform.input_offset,
            ratios[entries], flags[entries], rotated=transform.rotated, format=format.name, rule="least_error",
            backend=backend.value,
        )  # fmt: skip

    together = quantized(slice(6), slice(2))
    for entry in (0, 1):
        rows = slice(3 * entry, 3 * entry + 3)
        for whole, alone in zip(together[:2], quantized(rows, slice(entry, entry + 1))[:2], strict=True):
            assert torch.equal(whole[rows].float(), alone.float())


@each_backend
@each_layout
def test_multiplying_reads_its_arguments_wherever_they_lie(
    backend: Backend, format: Format, lay_out: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    module = linear(format)
    x = random(6, 3 * format.group_size).bfloat16().to(DEVICE)
    x[::2, : format.group_size] *= 2.0**-20  # in MXFP4 outside of FP8
    source = operators.Source(x, ScaleRule.CEIL, torch.ones(1, device=DEVICE), None)
    quantized = operators.quantize_input(source, module.input_transform(), format, backend.value)
    settings = {"format": format.name, "dtype": torch.bfloat16, "backend": backend.value}
    assert_the_same(operators._multiply, (*quantized, *module.weight_tensors()), lay_out, **settings)


@each_backend
def test_a_linear_takes_one_batch_entry_however_it_lies(backend: Backend, format: Format) -> None:
    """A batch of one can be flattened without a copy, whatever its strides, so that kernels see
    them.
    """
    module, in_features = linear(format), 3 * format.group_size
    x = random(1, in_features, 5).bfloat16().to(DEVICE)
    wide = random(1, 10, 2 * in_features).bfloat16().to(DEVICE)
    inputs = (
        x.transpose(1, 2),
        x[:, :, :1].transpose(1, 2),  # one token
        x[:, :1].transpose(1, 2).expand(1, 5, in_features),  # one number for all features
        x[:, :, :1].transpose(1, 2).expand(1, 5, in_features),  # one row for all tokens
        wide[:, ::2, ::2],
        wide[:, ::2, 1 : 1 + in_features],
    )
    with forced(backend):
        for each in inputs:
            assert each.reshape(-1, in_features).data_ptr() == each.data_ptr()
            assert torch.equal(module(each), module(each.contiguous()))
