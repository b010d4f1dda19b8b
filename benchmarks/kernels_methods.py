"""Our computations of a 4-bit linear, divided into the stages that benchmarks.kernels times, and
their checks.

A stage is checked against the definition (kernels/reference.py) or against its own operands in
float64 before anything is timed. `Wrong` names the failed stage and its error.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks import vendor_products
from benchmarks.registry import Shape
from tempoquant.formats import (
    INT4,
    NVFP4,
    NVFP4_M1,
    Format,
    ScaleRule,
    pack,
    scale_to_bytes,
    to_codes,
    weight_scale,
)
from tempoquant.input_transform import InputTransform
from tempoquant.kernels.dispatch import FP4_CAPABILITIES
from tempoquant.kernels.operators import branch_hidden
from tempoquant.kernels.quantized_input import QuantizedInput
from tempoquant.kernels.reference import WeightTensors, dequantize_residual, round_input, w4a4_linear

RULE = ScaleRule.LEAST_ERROR
RANK = 32
CHECKED_TOKENS = 256
# Largest relative errors by norm. Values may differ where float32 sums of the deflation end on
# either side of a boundary between levels. A product's error is that of 16-bit results, 2^-9 a
# rounding.
MAX_DIFFERENT_VALUES = 2e-3
MAX_PRODUCT_ERROR = 2.0**-7
MAX_WHOLE_ERROR = 0.05  # hidden is rounded to bfloat16, which moves a few inputs to the next level


class Wrong(Exception):
    """A stage with a wrong result: it is not timed."""


class Layer(NamedTuple):
    """A layer's transform of its input, and its weight."""

    transform: InputTransform
    weight: WeightTensors


class Method(NamedTuple):
    """One computation: the backend's kernels, with one of the products."""

    name: str
    backend: str
    format: Format
    quantize: Callable[..., QuantizedInput]
    expand: Callable[[WeightTensors, Format], tuple[Any, ...]]
    product: Callable[..., torch.Tensor]

    def multiply(
        self, quantized: QuantizedInput, expanded: tuple[Any, ...], weight: WeightTensors, dtype: torch.dtype
    ) -> torch.Tensor:
        """Compute the product with branch and bias."""
        return self.product(quantized, *expanded, weight.up, weight.bias, dtype)

    def whole(self, x: torch.Tensor, layer: Layer, clip_ratio: torch.Tensor) -> torch.Tensor:
        """Run all stages, as a layer that shares its input with no other does."""
        transform, weight = layer
        hidden = None if transform.down is None else branch_hidden(x, transform.down)
        quantized = self.quantize(x, hidden, transform, self.format, RULE, clip_ratio)
        return self.multiply(quantized, self.expand(weight, self.format), weight, x.dtype)


def our_methods(capability: int) -> list[Method]:
    """Return the methods that a GPU of this compute capability (90 for 9.0) can run."""
    from tempoquant.kernels import bf16, fp4, fp8, int8, quantize_to, triton_expand

    def expand_to_bf16(weight: WeightTensors, format: Format) -> tuple[Any, ...]:
        return triton_expand.expand_to_bf16(weight, format), weight.tensor_scale

    def as_stored(weight: WeightTensors, format: Format) -> tuple[Any, ...]:
        return (weight,)

    def fp4_multiply(quantized: QuantizedInput, weight: WeightTensors, *others: Any) -> torch.Tensor:
        up, bias, dtype = others
        return fp4.fp4_multiply(quantized, weight._replace(up=up, bias=bias), NVFP4_M1, dtype)

    of_fp4 = ("fp4", NVFP4_M1, quantize_to.quantize_to_fp4, as_stored)
    of_fp8 = ("fp8", NVFP4_M1, quantize_to.quantize_to_fp8, triton_expand.expand_to_fp8)
    of_bf16 = ("bf16", NVFP4, quantize_to.quantize_to_bf16, expand_to_bf16)
    of_int8 = ("int8", INT4, quantize_to.quantize_to_int8, triton_expand.expand_to_int8)
    methods = [
        Method("fp4", *of_fp4, fp4_multiply),
        Method("fp8, product by Triton", *of_fp8, fp8.fp8_multiply),
        Method("fp8, product by cuBLAS or CUTLASS", *of_fp8, vendor_products.fp8_scaled_mm),
        Method("bf16, product by Triton", *of_bf16, bf16.bf16_multiply),
        Method("bf16, product by cuBLAS", *of_bf16, vendor_products.bf16_linear),
        Method("int8", *of_int8, int8.int8_multiply),
    ]
    runs = {"fp4": capability // 10 in FP4_CAPABILITIES, "fp8": capability >= 89}
    return [method for method in methods if runs.get(method.backend, True)]


def random_layer(shape: Shape, format: Format, device: torch.device, seed: int = 0) -> Layer:
    """Make a layer as the default recipe leaves it: smoothing, rotation, branch, deflation, offset,
    bias; random numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    dense = random(shape.out_features, shape.in_features) * random(shape.out_features, 1).exp() / 50
    scale = weight_scale(dense, format, ScaleRule.CEIL)
    down = (random(RANK, shape.in_features) / shape.in_features**0.5).bfloat16()
    transform = InputTransform(
        smoothing_factor=random(shape.in_features).exp().bfloat16(),
        rotated=True,
        down=down,
        deflation=(random(shape.in_features, RANK) / 16).bfloat16(),
        input_offset=(random(shape.in_features) / 16).bfloat16(),
    )
    weight = WeightTensors(
        packed=pack(to_codes(dense, scale.effective, format), format),
        scale=scale_to_bytes(scale.group, format),
        tensor_scale=scale.tensor if format.has_tensor_scale else None,
        up=(random(shape.out_features, RANK) / 8).bfloat16(),
        bias=random(shape.out_features).bfloat16(),
    )
    return Layer(transform, weight)


def random_input(shape: Shape, device: torch.device, seed: int) -> torch.Tensor:
    """Make an input (tokens, in) bfloat16, with some features much larger than others."""
    generator = torch.Generator(device).manual_seed(seed)
    features = torch.randn(shape.in_features, generator=generator, device=device).exp().bfloat16()
    x = torch.empty(shape.num_tokens, shape.in_features, dtype=torch.bfloat16, device=device)
    return x.normal_(generator=generator).mul_(features)


def numbers_of(quantized: QuantizedInput, format: Format) -> torch.Tensor:
    """Decode the quantized values: (tokens, in) float32, exact."""
    if quantized.values.dtype == torch.uint8 and quantized.scale is not None:  # packed, as a weight is
        return dequantize_residual(WeightTensors(quantized.values, quantized.scale.view(torch.uint8)), format)
    values = quantized.values.float()
    if quantized.scale is None:
        return values
    scale = quantized.scale.reshape(len(values), -1)
    return (values.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1)


def check(method: Method, x: torch.Tensor, layer: Layer, clip_ratio: torch.Tensor) -> float:
    """Check every stage against its law on the first and the last tokens of x.

    Returns:
        the relative error of the whole against the reference. Raises Wrong.
    """
    half = CHECKED_TOKENS // 2
    x = x if len(x) <= CHECKED_TOKENS else torch.cat([x[:half], x[-half:]])
    transform, weight = layer
    hidden = None if transform.down is None else branch_hidden(x, transform.down)
    quantized = method.quantize(x, hidden, transform, method.format, RULE, clip_ratio)
    numbers = numbers_of(quantized, method.format)
    z = transform.quantizer_input(x.float(), None if hidden is None else hidden.float())
    differing = (numbers != round_input(z, method.format, RULE, clip_ratio)).float().mean().item()
    if not differing <= MAX_DIFFERENT_VALUES:
        raise Wrong(f"{method.name}: {differing:.2%} of the quantized inputs are not the reference's")
    product = numbers.double() @ dequantize_residual(weight, method.format).double().T
    if hidden is not None and weight.up is not None:
        product += hidden.double() @ weight.up.double().T
    if weight.bias is not None:
        product += weight.bias.double()
    y = method.multiply(quantized, method.expand(weight, method.format), weight, x.dtype)
    _require(method, "product", relative_error(y, product), MAX_PRODUCT_ERROR)
    whole = method.whole(x, layer, clip_ratio)
    error = relative_error(whole, w4a4_linear(x.float(), *layer, method.format, RULE, clip_ratio))
    _require(method, "whole linear", error, MAX_WHOLE_ERROR)
    return error


def _require(method: Method, what: str, error: float, largest: float) -> None:
    if not error <= largest:  # NaN too
        raise Wrong(f"{method.name}: the {what} is off by {error:.2e}, at most {largest:.2e} is right")


def relative_error(y: torch.Tensor, wanted: torch.Tensor) -> float:
    """Compute ‖y − wanted‖ / ‖wanted‖ in float64."""
    wanted = wanted.double()
    return ((y.double() - wanted).norm() / wanted.norm()).item()
