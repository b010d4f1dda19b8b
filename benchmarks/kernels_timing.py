"""Times of one shape on this machine's GPU: the 16-bit product, ours by stages, plain PyTorch,
other projects'.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.kernels_methods import (
    CHECKED_TOKENS,
    MAX_WHOLE_ERROR,
    RULE,
    Layer,
    Method,
    Wrong,
    check,
    our_methods,
    random_input,
    random_layer,
    relative_error,
)
from benchmarks.kernels_peers import MAX_ERROR, PEERS, Peer
from benchmarks.kernels_roofline import bf16_linear, quantize
from benchmarks.registry import Shape
from tempoquant.formats import NVFP4_M1
from tempoquant.kernels import operators
from tempoquant.kernels.dispatch import choose
from tempoquant.kernels.reference import WeightTensors, w4a4_linear

INPUT_BYTES = 2**28  # inputs take turns until they are more than any cache
MAX_INPUTS = 8
COPY_BYTES, PEAK_SIZE = 2**31, 8192


def time_ms(function: Callable[[], Any], graph: bool = False) -> float:
    """Return the median time of a call in milliseconds, by device events, with the L2 cache emptied
    before each.

    Args:
        graph: capture calls in a CUDA graph, which removes launches from short calls; the cache
            then stays as it is.
    """
    from triton import testing

    if graph:
        return testing.do_bench_cudagraph(function, rep=100, return_mode="median")
    return testing.do_bench(function, warmup=50, rep=200, return_mode="median")


def measure_peaks(device: torch.device) -> dict[str, float | None]:
    """Measure this GPU's peaks: bytes a second of a large copy, read plus written, and products of
    8192³.
    """
    copy_ms = _time_of_copy(device)
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE, dtype=torch.bfloat16, device=device) for _ in range(2))
    flops = 2.0 * PEAK_SIZE**3
    peaks: dict[str, float | None] = {
        "bytes_per_s": 2 * COPY_BYTES / copy_ms * 1e3,
        "bf16_flops": flops / time_ms(lambda: functional.linear(a, b)) * 1e3,
        "fp8_flops": None,
    }
    if torch.cuda.get_device_capability(device) >= (8, 9):
        ones = torch.ones(PEAK_SIZE, 1, device=device)
        a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)

        def fp8_product() -> torch.Tensor:
            return torch._scaled_mm(a, b.t(), scale_a=ones, scale_b=ones.t(), out_dtype=torch.bfloat16)

        peaks["fp8_flops"] = flops / time_ms(fp8_product) * 1e3
    return peaks


def _time_of_copy(device: torch.device) -> float:
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return time_ms(lambda: target.copy_(source))


def rows_of_shape(
    shape: Shape, peaks: Mapping[str, float | None], device: torch.device, graph: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield a row a method, the 16-bit product first. A method with wrong results has a note
    instead of times.
    """
    count = min(MAX_INPUTS, -(-INPUT_BYTES // (2 * shape.num_tokens * shape.in_features)))
    inputs = [random_input(shape, device, seed) for seed in range(max(2, count))]
    linear = nn.Linear(shape.in_features, shape.out_features, dtype=torch.bfloat16, device=device).requires_grad_(False)
    baseline_ms = time_ms(_in_turn(linear, inputs), graph)
    yield _row("BF16, F.linear", shape, baseline_ms, baseline_ms, baseline_ms, peaks["bf16_flops"])
    for method in our_methods(_capability(device)):
        layer = random_layer(shape, method.format, device)
        try:
            yield _row_of_method(method, shape, inputs, layer, baseline_ms, peaks, graph)
        except Wrong as wrong:
            yield {"method": method.name, "note": f"WRONG, not timed: {wrong}"}
    yield _row_of_runtime(shape, inputs, baseline_ms, graph)
    yield _row_of_reference(shape, inputs, baseline_ms, graph)
    for peer in PEERS:
        yield _row_of_peer(peer, shape, inputs, linear, baseline_ms, peaks, graph)


def _row_of_method(
    method: Method,
    shape: Shape,
    inputs: list[torch.Tensor],
    layer: Layer,
    baseline_ms: float,
    peaks: Mapping[str, float | None],
    graph: bool,
) -> dict[str, Any]:
    """Check a method, then time it: quantizing alone, expanding alone, the product alone, the
    whole.
    """
    clip_ratio = torch.ones(1, device=inputs[0].device)
    error = check(method, inputs[0], layer, clip_ratio)
    transform, weight = layer
    down = transform.down
    assert down is not None

    def quantize_one(x: torch.Tensor, hidden: torch.Tensor) -> Any:
        return method.quantize(x, hidden, transform, method.format, RULE, clip_ratio)

    pairs = [(x, operators.branch_hidden(x, down)) for x in inputs]
    quantize_ms = time_ms(_in_turn(lambda pair: quantize_one(*pair), pairs), graph)
    multiply_ms = _time_of_product(method, [quantize_one(*pair) for pair in pairs[:2]], weight, graph)
    value_bytes = {"bf16": 2.0, "fp4": 0.5 + 1 / method.format.group_size}.get(method.backend, 1.0)
    moved = quantize(shape, value_bytes).bytes
    bytes_per_s = moved / quantize_ms * 1e3
    whole_ms = time_ms(_in_turn(lambda x: method.whole(x, layer, clip_ratio), inputs), graph)
    peak = {"fp8": peaks["fp8_flops"], "bf16": peaks["bf16_flops"]}.get(method.backend)  # others are not measured
    return {
        **_row(method.name, shape, whole_ms, multiply_ms, baseline_ms, peak),
        "backend": method.backend,
        "format": method.format.name,
        "project_ms": time_ms(_in_turn(lambda x: operators.branch_hidden(x, down), inputs), graph),
        "quantize_ms": quantize_ms,
        "quantize_gb_per_s": bytes_per_s / 1e9,
        "quantize_of_copy": bytes_per_s / (peaks["bytes_per_s"] or float("nan")),
        "expand_ms": time_ms(lambda: method.expand(weight, method.format), graph),
        "error": error,
    }


def _time_of_product(method: Method, quantized: list[Any], weight: WeightTensors, graph: bool) -> float:
    expanded = method.expand(weight, method.format)
    return time_ms(_in_turn(lambda x: method.multiply(x, expanded, weight, torch.bfloat16), quantized), graph)


def _row_of_runtime(shape: Shape, inputs: list[torch.Tensor], baseline_ms: float, graph: bool) -> dict[str, Any]:
    """Time the default format as a quantized model runs it: the backend chosen here, through
    PyTorch's operators.
    """
    x, format = inputs[0], NVFP4_M1
    layer, clip_ratio = random_layer(shape, format, x.device), torch.ones(1, device=x.device)
    backend = operators.backend_of(x.device.type, x.device.index, format.name)
    name = f"as the runtime runs {format.name}: {backend}"
    if backend == "reference":
        return {"method": name, "note": choose(x.device, format).reason}

    def whole(x: torch.Tensor) -> torch.Tensor:
        source = operators.Source(x, RULE, clip_ratio, None)
        quantized = operators.quantize_input(source, layer.transform, format, backend)
        return operators.multiply(quantized, layer.weight, format, x.dtype, backend)

    few = x[:CHECKED_TOKENS]
    error = relative_error(whole(few), w4a4_linear(few.float(), *layer, format, RULE, clip_ratio))
    if not error <= MAX_WHOLE_ERROR:
        return {"method": name, "note": f"WRONG, not timed: off by {error:.2e}"}
    return {**_row(name, shape, time_ms(_in_turn(whole, inputs), graph), None, baseline_ms, None), "error": error}


def _row_of_reference(shape: Shape, inputs: list[torch.Tensor], baseline_ms: float, graph: bool) -> dict[str, Any]:
    """Time plain dequantization: the definition in PyTorch, which runs where no kernel does."""
    format = NVFP4_M1
    layer = random_layer(shape, format, inputs[0].device)
    clip_ratio = torch.ones(1, device=inputs[0].device)
    whole_ms = time_ms(_in_turn(lambda x: w4a4_linear(x, *layer, format, RULE, clip_ratio), inputs), graph)
    return _row(f"plain dequantization, {format.name}", shape, whole_ms, None, baseline_ms, None)


def _row_of_peer(
    peer: Peer,
    shape: Shape,
    inputs: list[torch.Tensor],
    linear: nn.Linear,
    baseline_ms: float,
    peaks: Mapping[str, float | None],
    graph: bool,
) -> dict[str, Any]:
    """Time another project's linear, or give the reason why not."""
    if peer.missing:
        return {"method": peer.label, "note": peer.missing}
    copy = nn.Linear(shape.in_features, shape.out_features, dtype=torch.bfloat16, device=inputs[0].device)
    copy.load_state_dict(linear.state_dict())
    with torch.no_grad():
        try:
            forward = peer.prepare(copy.requires_grad_(False))
            error = relative_error(forward(inputs[0]), linear(inputs[0]))
        except Exception as reason:  # another package's error is the finding
            return {"method": peer.label, "note": f"does not run here: {type(reason).__name__}: {reason}"[:200]}
        if not error <= MAX_ERROR:
            return {"method": peer.label, "note": f"WRONG, not timed: off by {error:.2e} from the 16-bit product"}
        whole_ms = time_ms(_in_turn(forward, inputs), graph)
    return {**_row(peer.label, shape, whole_ms, None, baseline_ms, None), "error": error}


def _row(
    method: str, shape: Shape, whole_ms: float, multiply_ms: float | None, baseline_ms: float, peak: float | None
) -> dict[str, Any]:
    """Make a row: times, the rate of the product alone, its share of the measured peak, and its
    speedup over BF16.
    """
    row: dict[str, Any] = {"method": method, "whole_ms": whole_ms, "ratio_to_bf16": baseline_ms / whole_ms}
    if multiply_ms is not None:
        rate = bf16_linear(shape).flops / multiply_ms * 1e3
        row |= {
            "multiply_ms": multiply_ms,
            "tflop_per_s": rate / 1e12,
            "of_peak": None if peak is None else rate / peak,
        }
    return row


def _in_turn(function: Callable[[Any], Any], arguments: list[Any]) -> Callable[[], Any]:
    """Return a function without arguments that takes the given ones in turn, one a call."""
    turn = itertools.cycle(arguments)
    return lambda: function(next(turn))


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
