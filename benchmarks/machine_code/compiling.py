"""Compilation of a `Launch` to the machine code of a compute capability; no GPU is needed.

Triton compiles for a target that it is told; `nvdisasm` and `cuobjdump`, which come with its wheel,
print the result.
"""

import importlib
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import native_specialize_impl

from tempoquant import kernels
from tempoquant.kernels.launch import Launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Binary(NamedTuple):
    """One kernel as compiled: the resources of a thread and a program, and the code as text.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread in memory, for spilled registers.
        shared: bytes of a program, without the one KiB that every program takes beside them.
        listing: the output of nvdisasm.
    """

    registers: int
    stack: int
    shared: int
    listing: str


def named_launches() -> Iterator[tuple[str, Launch]]:
    """Yield all specializations of all kernel modules, as (module: name, launch)."""
    for module in pkgutil.iter_modules(kernels.__path__):
        found = importlib.import_module(f"{kernels.__name__}.{module.name}")
        for name, launch in found.specializations() if hasattr(found, "specializations") else ():
            yield f"{module.name.removeprefix('triton_')}: {name}", launch


def source_of(launch: Launch) -> ASTSource:
    """Return the kernel with its types, constants and alignment, as a launch with these arguments
    specializes it.
    """
    signature: dict[str, Any] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            kind, key = "constexpr", None
        else:
            specialize, align = not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment
            kind, key = native_specialize_impl(CUDABackend, value, parameter.is_const, specialize, align)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(parameter.num,)] = value
        elif isinstance(key, str):
            attributes[(parameter.num,)] = CUDABackend.parse_attr(key)
    unknown = set(launch.arguments) - {parameter.name for parameter in launch.kernel.params}
    if unknown:
        raise TypeError(f"{launch.kernel.__name__} takes no {', '.join(sorted(unknown))}.")
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_for(launch: Launch, capability: int) -> Any:
    """Return Triton's compiled kernel of a launch, for 90 that of compute capability 9.0. Raises
    what Triton raises.
    """
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source_of(launch), target=target, options=launch.options)


def binary_of(launch: Launch, capability: int) -> Binary:
    """Compile a launch and parse its code."""
    compiled = compile_for(launch, capability)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        usage = _output_of("cuobjdump", "-res-usage", str(file))
        listing = _output_of("nvdisasm", "-c", str(file))
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Binary(found["REG"], found["STACK"], compiled.metadata.shared, listing)


def _output_of(tool: str, *arguments: str) -> str:
    """Return the output of one of Triton's own tools. Raises CalledProcessError."""
    command = [os.fspath(TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
