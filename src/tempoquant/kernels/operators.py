"""The two halves of a 4-bit linear as torch operators, so that a compiled graph sees two nodes, not
their content.

`quantize_input` rounds the shared input, `multiply` does the rest; the backend selects the kernels.
Both are pure: same tensors, same result, no state. Operators take tensors one by one, in order, and
settings by name. Without compilation, kernels are called directly, since PyTorch's dispatcher takes
longer than everything else here.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from tempoquant.exact_products import exact_linear
from tempoquant.formats import Format, ScaleRule, get_format
from tempoquant.input_transform import InputTransform
from tempoquant.kernels.dispatch import Backend, Choice, choose, is_forced
from tempoquant.kernels.quantized_input import QuantizedInput
from tempoquant.kernels.reference import WeightTensors


@torch.compiler.assume_constant_result
def backend_of(device_type: str, device_index: int | None, format: str) -> str:
    """Return the backend that `dispatch.choose` chooses, by names: a constant in a compiled graph.

    Raises UnsupportedError as `choose` does.
    """
    choose_now = _choose_now if is_forced() else _choose_once
    return choose_now(choose, device_type, device_index, format)


def _choose_now(choose: Callable[..., Choice], device_type: str, device_index: int | None, format: str) -> str:
    device = torch.device(device_type) if device_index is None else torch.device(device_type, device_index)
    return choose(device, get_format(format)).backend.value


_choose_once = functools.lru_cache(maxsize=256)(_choose_now)


class Source(NamedTuple):
    """A linear's input, and the settings of its quantization.

    Attributes:
        x: (tokens, in) bfloat16, float16 or float32.
        rule: from a group's numbers to its scale.
        clip_ratio: (1 or batch,) float32; tokens are `batch` equal runs.
        eight_bits: (1 or batch,) bool, which of these have 8-bit activations; None for none.
    """

    x: torch.Tensor
    rule: ScaleRule
    clip_ratio: torch.Tensor
    eight_bits: torch.Tensor | None


def branch_hidden(x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Compute hidden = x · downᵀ, rounded once.

    Args:
        x: (tokens, in), any float dtype. down: (rank, in) bfloat16.

    Returns:
        (tokens, rank) bfloat16. Inputs of other dtypes are multiplied in float32.
    """
    if x.dtype == torch.bfloat16:
        return functional.linear(x, down)
    return exact_linear(x.float(), down.float()).bfloat16()


def quantize_input(source: Source, transform: InputTransform, format: Format, backend: str) -> QuantizedInput:
    """Project the input onto the branch, and round the rest.

    The kernels round h = x · downᵀ to bfloat16. The same numbers are subtracted from the input and
    added to the output, so that the error, 2^-9 of the branch's part, reaches only the weight's
    share in `up`. FP4 cannot hold 8-bit activations: if `source` has some, another backend rounds
    them, and `multiply` recognizes it by their dtype.
    """
    hidden = None if transform.down is None else branch_hidden(source.x, transform.down)
    if not torch.compiler.is_compiling():
        return round_input(source, hidden, transform, format, backend)
    backend = rounding_backend(backend, format, source.eight_bits)
    values, scale, outside = _quantize_input(
        source.x, hidden, transform.smoothing_factor, transform.deflation, transform.input_offset, source.clip_ratio,
        source.eight_bits, rotated=transform.rotated, format=format.name, rule=source.rule.value, backend=backend,
    )  # fmt: skip
    has_rows = backend == Backend.FP8 and format.scale_octaves is None
    return QuantizedInput(values, None if backend == Backend.BF16 else scale, hidden, outside if has_rows else None)


def round_input(
    source: Source, hidden: torch.Tensor | None, transform: InputTransform, format: Format, backend: str
) -> QuantizedInput:
    """Round the input by the kernels, the second half of `quantize_input`; hidden is x · downᵀ."""
    kernels = _kernels_of(rounding_backend(backend, format, source.eight_bits))
    made: QuantizedInput = kernels.quantize_input(
        source.x, hidden, transform, format, source.rule, source.clip_ratio, source.eight_bits
    )
    return made._replace(hidden=hidden)


def rounding_backend(backend: str, format: Format, eight_bits: torch.Tensor | None) -> str:
    """Return the backend that rounds inputs for `backend`; `eight_bits` marks rows of eight
    bits.
    """
    return eight_bit_backend(format) if backend == Backend.FP4 and eight_bits is not None else backend


def multiply(
    quantized: QuantizedInput, weight: WeightTensors, format: Format, dtype: torch.dtype, backend: str
) -> torch.Tensor:
    """Compute the product with the 4-bit weight, plus branch and bias: (tokens, out) in `dtype`."""
    if backend == Backend.FP4 and quantized.values.dtype != torch.uint8:
        backend = eight_bit_backend(format)
    if not torch.compiler.is_compiling():
        y: torch.Tensor = _kernels_of(backend).multiply(quantized, weight, format, dtype)
        return y
    return _multiply(
        quantized.values, quantized.scale, quantized.hidden, quantized.outside, weight.packed, weight.scale,
        weight.tensor_scale, weight.up, weight.bias, format=format.name, dtype=dtype, backend=backend,
    )  # fmt: skip


def eight_bit_backend(format: Format) -> str:
    """Return the backend for 8-bit activations in place of FP4.

    For MXFP4 it is bf16, since a weight may have rows that FP8 does not hold.
    """
    fits_fp8 = format.is_fp8_exact and format.scale_octaves is not None
    return (Backend.FP8 if fits_fp8 else Backend.BF16).value


@torch.library.custom_op("tempoquant::quantize_input", mutates_args=())
def _quantize_input(  # noqa: PLR0913 (operators take tensors, not tuples of them)
    x: torch.Tensor,
    hidden: torch.Tensor | None,
    smoothing_factor: torch.Tensor | None,
    deflation: torch.Tensor | None,
    input_offset: torch.Tensor | None,
    clip_ratio: torch.Tensor,
    eight_bits: torch.Tensor | None,
    *,
    rotated: bool,
    format: str,
    rule: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return values, scale and outside of a QuantizedInput; empty for None."""
    transform = InputTransform(
        smoothing_factor=smoothing_factor, rotated=rotated, deflation=deflation, input_offset=input_offset
    )
    done = _kernels_of(backend).quantize_input(
        x, hidden, transform, get_format(format), ScaleRule(rule), clip_ratio, eight_bits
    )
    nothing = x.new_empty(0)
    return done.values, *(nothing.clone() if each is None else each for each in (done.scale, done.outside))


@_quantize_input.register_fake
def _(
    x: torch.Tensor, *_others: Any, format: str, backend: str, **_settings: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kind, taken = get_format(format), Backend(backend)
    num_tokens, in_features = x.shape
    values = {Backend.FP4: torch.uint8, Backend.FP8: torch.float8_e4m3fn, Backend.INT8: torch.int8}
    groups = (num_tokens, in_features // kind.group_size)
    scale = {Backend.FP4: groups, Backend.FP8: (num_tokens,), Backend.INT8: groups, Backend.BF16: (0,)}
    fp4_scale = torch.float8_e4m3fn if kind.scale_grid.is_e4m3 else torch.uint8
    dtypes = {Backend.FP4: fp4_scale, Backend.BF16: x.dtype}
    has_rows = taken is Backend.FP8 and kind.scale_octaves is None
    return (
        x.new_empty(
            num_tokens, in_features // (2 if taken is Backend.FP4 else 1), dtype=values.get(taken, torch.bfloat16)
        ),
        x.new_empty(scale[taken], dtype=dtypes.get(taken, torch.float32)),
        x.new_empty(num_tokens, dtype=torch.bool) if has_rows else x.new_empty(0),
    )


@torch.library.custom_op("tempoquant::multiply", mutates_args=())
def _multiply(  # noqa: PLR0913
    values: torch.Tensor,
    row_scale: torch.Tensor | None,
    hidden: torch.Tensor | None,
    outside: torch.Tensor | None,
    packed: torch.Tensor,
    scale: torch.Tensor,
    tensor_scale: torch.Tensor | None,
    up: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    format: str,
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    weight = WeightTensors(packed, scale, tensor_scale, up, bias)
    quantized = QuantizedInput(values, row_scale, hidden, outside)
    return _kernels_of(backend).multiply(quantized, weight, get_format(format), dtype)


@_multiply.register_fake
def _(
    values: torch.Tensor,
    row_scale: torch.Tensor | None,
    hidden: torch.Tensor | None,
    outside: torch.Tensor | None,
    packed: torch.Tensor,
    *_others: Any,
    dtype: torch.dtype,
    **_settings: Any,
) -> torch.Tensor:
    return values.new_empty(values.shape[0], packed.shape[0], dtype=dtype)


@functools.cache
def tapes() -> Any:
    """Return the module `tape`, which imports Triton."""
    return importlib.import_module("tempoquant.kernels.tape")


@functools.cache
def _kernels_of(backend: str) -> Any:
    """Return the module with a backend's two halves. Importing it imports Triton, so only used ones
    are imported.
    """
    return importlib.import_module(f"tempoquant.kernels.{Backend(backend).value}")
