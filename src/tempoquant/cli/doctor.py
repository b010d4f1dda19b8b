"""`tempoquant doctor`: what this machine runs each format and attention with, how fast, and what to
install.
"""

import platform
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tempoquant.cli.options import Json
from tempoquant.cli.running import Outcome, run_command
from tempoquant.progress import Progress

LIBRARIES = ("tempoquant", "torch", "triton", "diffusers", "transformers", "accelerate", "safetensors", "peft")
RUN_BY = {
    "fp4": "FP4 tensor cores",
    "fp8": "FP8 tensor cores",
    "int8": "INT8 tensor cores",
    "bf16": "BF16 tensor cores",
    "reference": "plain PyTorch, slow",
}
COUNTED = (
    "Speeds are those of a Wan block's ten linears at 480 × 832 beside 16 bits at their best. They are counted from "
    "machine code (python -m benchmarks.machine_code), not measured; attention stays in 16 bits and is not in them."
)


def command(as_json: Json = False) -> None:
    """Show what this machine runs each format and attention with, how fast, and what to install."""

    def work(progress: Progress) -> Outcome:
        from rich.console import Group

        record: dict[str, Any] = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "libraries": {name: installed(name) for name in LIBRARIES},
            "devices": devices(),
            "gpus": gpus(),
        }
        record["advice"] = list(advice(record))
        libraries = ", ".join(f"{name} {found or 'not installed'}" for name, found in record["libraries"].items())
        system = f"Python {record['python']}, {record['platform']}; {libraries}."
        tables = (formats_table(record["devices"]), attention_table(record["devices"]), gpus_table(record["gpus"]))
        return Outcome(record, Group(*tables, COUNTED, "", system, "", *record["advice"]))

    run_command(work, as_json)


def installed(name: str) -> str | None:
    """Return the version of a library; None if it is not installed."""
    if name == "triton":
        from tempoquant.kernels.dispatch import triton_version

        return triton_version()
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def devices() -> list[dict[str, Any]]:
    """Return every device a pipeline can be on, with the kernels that dispatch chooses for each
    format there.
    """
    import torch

    from tempoquant.formats import FORMATS
    from tempoquant.kernels.counted import counted_for
    from tempoquant.kernels.dispatch import choose

    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "memory_gib": properties.total_memory / 2**30,
                "compute_capability": f"{properties.major}.{properties.minor}",
            }
        )
    found.append({"device": "cpu", "name": platform.processor() or platform.machine()})
    for device in found:
        device["kernels"] = {}
        for name, format in FORMATS.items():
            choice = choose(torch.device(device["device"]), format)
            counted = counted_for(device["name"], format, choice.backend)
            device["kernels"][name] = {
                "backend": choice.backend.value,
                "reason": choice.reason,
                "counted_speed": counted and counted[1],
                "counted_for": counted and counted[0].name,
            }
        device["attention"] = attention_of(device["device"])
    return found


def gpus() -> list[dict[str, Any]]:
    """Return the GPUs whose kernels were counted: what each runs a format with, and how fast."""
    from tempoquant.formats import FORMATS
    from tempoquant.kernels.counted import COUNTED_GPUS
    from tempoquant.kernels.dispatch import backend_at

    return [
        {
            "name": gpu.name,
            "compute_capability": ".".join(map(str, gpu.capability)),
            "kernels": {
                name: {"backend": backend_at(gpu.capability, format).value, "counted_speed": gpu.ratios.get(name)}
                for name, format in FORMATS.items()
            },
        }
        for gpu in COUNTED_GPUS
    ]


def attention_of(device: str) -> dict[str, Any]:
    """Return which of diffusers' attention backends each speed selects on a device for a Wan, and
    which are installed.
    """
    import torch

    from tempoquant.acceleration.attention import BACKENDS, capability_of, choose_attention, is_installed
    from tempoquant.acceleration.speeds import SPEEDS
    from tempoquant.models.families import FAMILIES

    capability = capability_of(torch.device(device))
    choices = {speed: choose_attention(speed, FAMILIES[0], capability) for speed in SPEEDS}
    return {
        "installed": [name for name in BACKENDS if is_installed(name)],
        "chosen": {
            speed: {"backend": each.backend, "reason": each.reason, "missing": list(each.missing)}
            for speed, each in choices.items()
        },
    }


def formats_table(found: Sequence[dict[str, Any]]) -> Any:
    """Make a table with a row for each device and format: what multiplies it, and how fast."""
    from rich.table import Table

    from tempoquant.recipe import Recipe

    default = Recipe.load("default").format
    table = Table(title="This machine", title_justify="left")
    for column in ("device", "format", "run by", "speed, 16 bits = 1 (counted)"):
        table.add_column(column)
    for device in found:
        about = [device["name"]]
        if "compute_capability" in device:
            about += [f"compute capability {device['compute_capability']}", f"{device['memory_gib']:.0f} GiB"]
        name = f"{device['device']}: {', '.join(about)}"
        for format, kernels in device["kernels"].items():
            shown = f"{format} (default)" if format == default else format
            table.add_row(name, shown, RUN_BY[kernels["backend"]], speed_of(kernels))
            name = ""
        table.add_section()
    return table


def gpus_table(found: Sequence[dict[str, Any]]) -> Any:
    """Make a table with a row for each counted GPU and a column for each format."""
    from rich.table import Table

    table = Table(title="What GPUs run each format with, and how fast (counted)", title_justify="left")
    table.add_column("GPU")
    for format in found[0]["kernels"]:
        table.add_column(format)
    for gpu in found:
        cells = []
        for kernels in gpu["kernels"].values():
            speed = kernels["counted_speed"]
            cells.append(kernels["backend"].upper() + ("" if speed is None else f", {speed:.2f} ×"))
        table.add_row(f"{gpu['name']} ({gpu['compute_capability']})", *cells)
    return table


def speed_of(kernels: dict[str, Any]) -> str:
    """Return the counted speed of one format on a device, in words."""
    if kernels["backend"] == "reference":
        return "far below 1: for trying things out"
    if kernels["counted_speed"] is None:
        return "not counted"
    return f"{kernels['counted_speed']:.2f} ×"


def attention_table(found: Sequence[dict[str, Any]]) -> Any:
    """Make a table with a row for each device and speed, and the better backends that are not
    installed.
    """
    from rich.table import Table

    table = Table(title="Attention", title_justify="left")
    for column in ("device", "--speed", "backend", "why", "better, and not installed"):
        table.add_column(column)
    for device in found:
        name = device["device"]
        for speed, chosen in device["attention"]["chosen"].items():
            table.add_row(name, speed, chosen["backend"], chosen["reason"], "; ".join(chosen["missing"]) or "none")
            name = ""
        table.add_section()
    return table


def advice(record: dict[str, Any]) -> Iterator[str]:
    """Give advice: what to install, and which format to take on each GPU."""
    import torch

    found = [device for device in record["devices"] if device["device"] != "cpu"]
    if not found and torch.version.cuda is None and shutil.which("nvidia-smi") is not None:
        yield (
            f"There is an NVIDIA driver, but PyTorch {torch.__version__} is a build without CUDA: install one with "
            "CUDA, as https://pytorch.org/get-started/locally/ says."
        )
    elif not found:
        yield (
            "There is no GPU here: everything runs in plain PyTorch, which is exact and slow. GPU kernels need an "
            "NVIDIA GPU of compute capability 8.0 or higher and Triton."
        )
    elif record["libraries"]["triton"] is None and torch.version.hip is None:
        package = "triton-windows" if platform.system() == "Windows" else "triton"
        yield f"Triton is not installed, so the GPU runs plain PyTorch: pip install '{package}>=3.6'."
    for device in found:
        yield from _of_gpu(device)


def _of_gpu(device: dict[str, Any]) -> Iterator[str]:
    kernels, name = device["kernels"], f"{device['device']} ({device['name']})"
    if any("it needs Triton 3.6" in each["reason"] for each in kernels.values()):
        yield f"{name} has four-bit tensor cores, which need Triton 3.6: pip install 'triton>=3.6'."
    if all(each["backend"] == "reference" for each in kernels.values()):
        yield f"{name} runs no kernel of ours ({kernels['nvfp4_m1']['reason']}): it saves memory here, not time."
        return
    counted = {format: each["counted_speed"] for format, each in kernels.items() if each["counted_speed"]}
    if counted:
        best = max(counted, key=lambda format: counted[format])
        speed = f"{counted[best]:.2f} times as fast as 16 bits (counted, not measured)"
        yield f"On {name} the fastest format is {best}, {speed}."
