"""The steps of `benchmarks.gpu_first_day`, one function each; each returns plain values, in its own
process.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tempoquant.runtime.linear import QuantizedLinear

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "tomli-w",
    "tempoquant",
)
HIDDEN, TOKENS = 5120, 32_760
ERROR_OF_BF16 = 2.0**-7
"""The error of a bfloat16 output with sums in another order: a right kernel stays below it."""


class Described(NamedTuple):
    """A step: its function, which takes a device, its limit, and its requirements."""

    run: Callable[[str], Any]
    seconds: float
    needs_gpu: bool = True
    on_a_cpu: bool = False
    needs_program: str = ""


def device_or_why() -> tuple[str, str]:
    """Return the device, and the reason why steps that need a GPU cannot run; empty if they can."""
    if torch.cuda.is_available():
        return "cuda", ""
    return "cpu", "it needs an NVIDIA GPU, and there is none here"


def run_here(name: str, device: str) -> Any:
    """Run one step in this process."""
    with torch.no_grad():
        return STEPS[name].run(device)


def versions(device: str) -> dict[str, Any]:
    """Return the versions that the figures depend on."""
    found: dict[str, Any] = {"python": platform.python_version(), "device": device}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if device != "cpu":
        free, total = torch.cuda.mem_get_info()
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "capability": torch.cuda.get_device_capability(),
            "cuda": torch.version.cuda,
            "free_bytes": free,
            "total_bytes": total,
        }
    return found


def compile_launches(device: str) -> dict[str, Any]:
    """Compile every launch that Wan needs for this GPU, in as many processes as there are cores."""
    major, minor = (9, 0) if device == "cpu" else torch.cuda.get_device_capability()
    parts = ("expand:", "quantize:", "outside:", "fp8_gemm:", "bf16_gemm:", "int8_gemm:")
    parts = parts[:1] if device == "cpu" else parts

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as threads:

        def compiled(part: str) -> list[dict[str, Any]]:
            table = Path(folder) / part
            command = [
                sys.executable,
                "-m",
                "tests.kernels.compile_all",
                "--capability",
                str(10 * major + minor),
                "--only",
                part,
                "--json",
                str(table),
            ]
            environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if not table.exists():
                raise RuntimeError(done.stderr[-1000:])
            rows: list[dict[str, Any]] = json.loads(table.read_text())
            return rows

        rows = [row for of_part in threads.map(compiled, parts) for row in of_part]
    return {
        "launches": len(rows),
        "failed": {row["name"]: row["error"][-300:] for row in rows if row["error"]},
        "spilled": {row["name"]: row["spilled"] for row in rows if row["spilled"]},
    }


def checked_linear(format: str, num_features: int, device: str) -> QuantizedLinear:
    """Return a linear of whole numbers, whose answer in float64 is known; seeded."""
    from benchmarks.launch_overhead import random_linear
    from tempoquant.timesteps import TimestepBins

    linear: QuantizedLinear = random_linear(format, TimestepBins(), num_features).to(device)
    packed = torch.randint(256, linear.packed.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    linear.packed.copy_(packed & 0x77)
    if linear.smoothing_factor is not None:
        linear.smoothing_factor.view(torch.bfloat16).fill_(1.0)
    if linear.tensor_scale is not None:
        linear.tensor_scale.view(torch.float32).fill_(1.0)
    linear.clip_ratio.view(torch.float32).fill_(1.0)
    return linear


def layer(device: str) -> dict[str, Any]:
    """Compare one real layer of each format, as a model runs it, with the definition in float64;
    non-contiguous too.
    """
    from tempoquant.kernels import operators

    num_features, num_tokens = (128, 8) if device == "cpu" else (HIDDEN, 512)
    found = {}
    for format in ("nvfp4_m1", "mxfp4", "nvfp4", "int4"):
        linear = checked_linear(format, num_features, device)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(1, num_tokens, 2 * num_features, generator=generator).to(device, torch.bfloat16)
        for name, part in (("dense", x[..., :num_features].contiguous()), ("every second feature", x[..., ::2])):
            wanted, y = linear(part.double()), linear(part)
            error = float((y.double() - wanted).norm() / wanted.norm())
            found[f"{format}, {name}"] = {"error": error, "is_right": error < ERROR_OF_BF16}
        found[f"{format}, {name}"]["backend"] = operators.backend_of(x.device.type, x.device.index, format)
    return found


def kernel_tests(device: str) -> dict[str, Any]:
    """Run the kernel tests on this GPU, which run under the interpreter elsewhere."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "tests/kernels",
        "--ignore=tests/kernels/test_compiled.py",
        "-n",
        str(min(8, os.cpu_count() or 1)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"exit_code": done.returncode, "output": done.stdout[-3000:]}


def peaks(device: str) -> dict[str, Any]:
    """Measure this GPU's peaks: a copy, 16-bit and FP8 products of 8192³."""
    from benchmarks.kernels_timing import measure_peaks

    return measure_peaks(torch.device(device))


def stages(device: str) -> dict[str, Any]:
    """Measure every stage at 480p's shapes and 720p's feed-forward, and each variant of the FP8
    product.
    """
    from benchmarks.kernels_timing import measure_peaks, rows_of_shape
    from benchmarks.registry import VIDEO_TOKENS, shapes_of_block

    small, large = (shapes_of_block(tokens) for tokens in VIDEO_TOKENS.values())
    shapes = [*small, *(shape for shape, names in large.items() if any("ffn" in name for name in names))]
    found, measured = measure_peaks(torch.device(device)), {}
    for shape in shapes:
        measured[str(shape)] = [*rows_of_shape(shape, found, torch.device(device)), *_ways_of_the_product(shape)]
        print(json.dumps({str(shape): measured[str(shape)]}), flush=True)  # a later interruption keeps this
    return measured


def _ways_of_the_product(shape: Any) -> Iterator[dict[str, Any]]:
    """Yield {promoted, not} × {pointer, descriptor} of the FP8 product, as far as the backend
    offers them.
    """
    from benchmarks.kernels_timing import time_ms
    from tempoquant.kernels import dispatch
    from tempoquant.kernels.fp8 import TILES
    from tempoquant.kernels.triton_gemm import Product, multiply

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda")

    row_scale, column_scale = random(shape.num_tokens).abs(), random(shape.out_features).abs()
    values = random(shape.num_tokens, shape.in_features).to(torch.float8_e4m3fn)
    weight = random(shape.out_features, shape.in_features).to(torch.float8_e4m3fn)
    product = Product(values, weight, row_scale, column_scale, None, None, None)
    promoted = getattr(dispatch, "promoted_sums", None)
    for is_promoted in (False, True) if promoted is not None else (None,):
        for is_described in (False, True):
            with promoted() if is_promoted else contextlib.nullcontext():

                def run(is_described: bool = is_described) -> torch.Tensor:
                    return multiply(product, torch.bfloat16, TILES, is_described=is_described)

                yield {"method": "FP8 product", "promoted": is_promoted, "described": is_described, "ms": time_ms(run)}


def graph_replay(device: str) -> dict[str, Any]:
    """Check that a linear captured in a CUDA graph, replayed with other inputs, gives the same as
    outside.
    """
    from benchmarks.kernels_timing import time_ms

    linear = checked_linear("nvfp4_m1", HIDDEN, device)
    x = torch.randn(1, 512, HIDDEN, device=device, dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        linear(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x)
    x.normal_()
    graph.replay()
    torch.cuda.synchronize()
    is_same = torch.equal(y, linear(x))
    return {"is_same": is_same, "eager_ms": time_ms(lambda: linear(x)), "replayed_ms": time_ms(graph.replay)}


def block(device: str) -> dict[str, Any]:
    """Measure one Wan block at 480p: 16-bit and W4A4, in one piece and in chunks, eager and
    compiled.
    """
    from benchmarks.gpu_first_day_models import measure_block

    return measure_block(device)


def swap(device: str) -> dict[str, Any]:
    """Measure two denoisers that change places: allocated, active and reserved peaks beside the
    size of one of them.
    """
    from benchmarks.gpu_first_day_models import measure_swap

    return measure_swap(device)


def sanitizer(device: str) -> dict[str, Any]:
    """Check by compute-sanitizer that no access is outside of memory, on small shapes."""
    code = "from benchmarks import gpu_first_day_models as m; m.small_linears()"
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "7", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"exit_code": done.returncode, "output": (done.stdout + done.stderr)[-2000:]}


STEPS = {
    "versions": Described(versions, 30, needs_gpu=False, on_a_cpu=True),
    "compile": Described(compile_launches, 150, needs_gpu=False, on_a_cpu=True),
    "layer": Described(layer, 60, on_a_cpu=True),
    "kernel tests": Described(kernel_tests, 150),
    "peaks": Described(peaks, 30),
    "stages": Described(stages, 150),
    "graph replay": Described(graph_replay, 40),
    "block": Described(block, 120, on_a_cpu=True),
    "swap": Described(swap, 60, on_a_cpu=True),
    "sanitizer": Described(sanitizer, 60, needs_program="compute-sanitizer"),
}
