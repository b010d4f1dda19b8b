"""The Python around one 4-bit linear: the cost of a launch before the GPU hears of it.

    python -m benchmarks.launch_overhead --json

No GPU is needed and none is used: kernels are compiled for compute capability 9.0 (10.0 for fp4) by
Triton's own compiler, and its driver is replaced by one whose launcher returns at once. The
benchmark times everything else: our module, its tapes, PyTorch's allocations (on the CPU), and the
arguments of each launch. The C part of a launch, some microseconds of CUDA's driver, is not
included, and the branch's product, which PyTorch computes, is an allocation here. The outputs are
meaningless, since no kernel runs.
"""

import argparse
import collections
import cProfile
import dataclasses
import importlib
import pkgutil
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget

import tempoquant
from benchmarks.json_line import publish
from benchmarks.scale import commit_name
from tempoquant import kernels
from tempoquant.formats import get_format, scale_to_bytes
from tempoquant.kernels import operators, tape
from tempoquant.kernels.dispatch import Backend, Choice
from tempoquant.runtime.bin_clock import BinClock
from tempoquant.runtime.linear import QuantizedLinear
from tempoquant.timesteps import TimestepBins

CASES = (("fp8", "nvfp4_m1"), ("fp8", "mxfp4"), ("int8", "int4"), ("bf16", "nvfp4"), ("fp4", "nvfp4"))
CAPABILITIES = {"fp4": 100}
"""The compute capability that a backend's kernels are compiled for; 9.0 for the others."""
BINS = {"one bin": TimestepBins(), "three bins": TimestepBins((400.0, 700.0))}


class StubDriver:
    """A Triton driver of a GPU that does not exist: it loads nothing, and its launches return at
    once.
    """

    class utils:
        """The driver's functions for compiled kernels."""

        @staticmethod
        def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
            """Return module, function, registers, spills, threads."""
            return 1, 1, 128, 0, 1024

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            """Return the properties of an H100."""
            return {"max_shared_mem": 232_448, "multiprocessor_count": 132}

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.launches: list[tuple[Any, ...]] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return a launcher that records its arguments."""
        return self._launch

    def _launch(self, *arguments: Any) -> None:
        self.launches.append(arguments)

    def get_current_device(self) -> int:
        """Return the first device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Return a GPU of that compute capability."""
        return GPUTarget("cuda", self.capability, 32)


def random_linear(format: str, bins: TimestepBins, num_features: int, rank: int = 32) -> QuantizedLinear:
    """Make a linear with everything that the default recipe gives one, of valid bytes."""
    from tempoquant.planning.foreseen import Linear, foreseen_entry
    from tempoquant.recipe import Recipe

    shape = Linear(get_format(format), 5120, 5120, 0, rank)  # narrow ones have fewer tensors by bin
    entry = foreseen_entry(Recipe.load("default"), shape, "bfloat16", bins.num_bins)
    entry = dataclasses.replace(entry, in_features=num_features, out_features=num_features)
    linear = QuantizedLinear(entry, BinClock(bins), torch.bfloat16)
    one = scale_to_bytes(torch.full((1, 1), 2.0**-6), entry.format).flatten()
    generator = torch.Generator().manual_seed(0)
    for key, tensor in linear.state_dict().items():
        if key == "scale":
            tensor.copy_(one.repeat(tensor.numel() // len(one)).view(tensor.shape))
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.02, generator=generator)
        else:
            tensor.zero_()
    linear.settle()
    return linear


def microseconds(call: Callable[[], Any], repeats: int, rounds: int) -> list[float]:
    """Return the processor time of one call, the mean over `repeats`, in each of the rounds: other
    work does not count.
    """
    found = []
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(repeats):
            call()
        found.append((time.thread_time() - start) / repeats * 1e6)
    return found


def measure(backend: str, format: str, bins: TimestepBins, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one row: the least and the median of the rounds, the number of kernels that a linear
    launches, and of tapes that it plays.
    """
    driver = StubDriver(CAPABILITIES.get(backend, 90))
    triton.runtime.driver.set_active(driver)
    for module_function in _jit_functions():
        module_function.device_caches.clear()
    tape._TAPES.clear()
    tape._TRIED.clear()
    linear = random_linear(format, bins, arguments.features)
    x = torch.zeros(1, arguments.tokens, arguments.features, dtype=torch.bfloat16)
    with (
        torch.no_grad(),
        mock.patch.object(tape, "PLAYS_ON_CPU", True),
        mock.patch.object(operators, "choose", lambda device, format: Choice(Backend(backend), "stubbed")),
        mock.patch.object(operators.functional, "linear", _allocate_product),
        linear.at_timestep(500.0),
    ):
        stays = {each.data_ptr() for each in (x, *linear.parameters())}
        linear(x)  # compiles, and launches as Triton does
        by_triton = [_comparable(each, stays) for each in driver.launches]
        linear(x)  # is recorded again where the first call filled caches
        driver.launches.clear()
        linear(x)
        by_tape = [_comparable(each, stays) for each in driver.launches]
        assert by_tape == by_triton, "a launch is not what Triton's own is"
        num_tapes = sum(each is not None for each in tape._TAPES.values())
        row = {"backend": backend, "format": format, "launches": len(by_triton), "tapes": num_tapes}
        driver.launches = collections.deque(maxlen=1)  # type: ignore[assignment]
        times = microseconds(lambda: linear(x), arguments.repeats, arguments.rounds)
        if arguments.profile:
            with cProfile.Profile() as profile:
                for _ in range(arguments.repeats):
                    linear(x)
            pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    return row | {"least_us": min(times), "median_us": statistics.median(times)}


def _comparable(arguments: tuple[Any, ...], stays: set[int]) -> list[Any]:
    """Return the facts that two launches of the same must share: grid, stream, kernel, numbers, and
    where tensors lie.

    Args:
        stays: addresses of tensors that both launches have; any other tensor shares its size.
    """
    kernel, others = arguments[:6], arguments[9:]  # between them are profilers' hooks, here none
    return [repr(kernel), *(_place(each, stays) for each in others)]


def _place(argument: Any, stays: set[int]) -> Any:
    if hasattr(argument, "base"):
        return {name: _place(value, stays) for name, value in vars(argument).items()}
    if not isinstance(argument, torch.Tensor):
        return repr(argument)
    memory = argument.untyped_storage()
    return memory.data_ptr() if memory.data_ptr() in stays else memory.nbytes(), argument.storage_offset()


def _allocate_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _jit_functions() -> list[Any]:
    """Return every kernel of ours; a new driver has compiled none."""
    names = [each.name for each in pkgutil.iter_modules(kernels.__path__, "tempoquant.kernels.")]
    modules = [importlib.import_module(name) for name in names]
    return [each for module in modules for each in vars(module).values() if isinstance(each, triton.JITFunction)]


def of_16_bits(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure PyTorch's own linear of one token on the CPU: the least cost of a module's call."""
    linear = nn.Linear(16, 16, dtype=torch.bfloat16)
    x = torch.zeros(1, 1, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        times = microseconds(lambda: linear(x), arguments.repeats, arguments.rounds)
    return {
        "backend": "torch",
        "format": "16-bit, 16 × 16",
        "launches": 1,
        "least_us": min(times),
        "median_us": statistics.median(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--features",
        type=int,
        default=256,
        help="features of input and output; they do not change the Python code that runs",
    )
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=200, help="number of calls in a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs=2, metavar=("BACKEND", "FORMAT"), help="one case")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--json", type=Path, nargs="?", const=Path("-"), help="append the JSON line to this file too")
    arguments = parser.parse_args()
    cases = [tuple(arguments.only)] if arguments.only else CASES
    rows = [of_16_bits(arguments)]
    for backend, format in cases:
        for name, bins in BINS.items():
            rows.append({"bins": name} | measure(backend, format, bins, arguments))
    for row in rows:
        print(
            f"{row['backend']:>9} {row['format']:<16} {row.get('bins', ''):<11} {row['launches']} launches, "
            f"{row['least_us']:7.1f} µs at least, {row['median_us']:7.1f} µs median"
        )
    record = {
        "benchmark": "launch_overhead",
        "version": tempoquant.__version__,
        "commit": commit_name(),
        "kind": "measured with a stubbed launcher",
        "features": arguments.features,
        "rows": rows,
    }
    publish(record, None if arguments.json == Path("-") else arguments.json)


if __name__ == "__main__":
    main()
