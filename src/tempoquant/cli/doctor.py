"""`tempoquant doctor`: the kernels that this machine runs for each format and attention, and the
reasons.
"""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tempoquant.cli.options import Json
from tempoquant.cli.running import Outcome, run_command
from tempoquant.progress import Progress

LIBRARIES = ("tempoquant", "torch", "triton", "diffusers", "transformers", "accelerate", "safetensors", "peft")


def command(as_json: Json = False) -> None:
    """Show this machine's devices and libraries, and its kernels.

    The tables give the kernels for each format and attention, with the reasons.
    """

    def work(progress: Progress) -> Outcome:
        from rich.console import Group

        record: dict[str, Any] = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "libraries": {name: installed(name) for name in LIBRARIES},
            "devices": devices(),
        }
        libraries = ", ".join(f"{name} {found or 'not installed'}" for name, found in record["libraries"].items())
        system = f"Python {record['python']}, {record['platform']}; {libraries}."
        tables = (kernels_table(record["devices"]), attention_table(record["devices"]))
        return Outcome(record, Group(*tables, system, remedy(record)))

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
        choices = {name: choose(torch.device(device["device"]), format) for name, format in FORMATS.items()}
        device["kernels"] = {name: {"backend": c.backend.value, "reason": c.reason} for name, c in choices.items()}
        device["attention"] = attention_of(device["device"])
    return found


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


def kernels_table(found: Sequence[dict[str, Any]]) -> Any:
    """Make a table with a row for each device and format; equal reasons of a device are written
    once.
    """
    from rich.table import Table

    table = Table(title="Kernels", title_justify="left")
    for column in ("device", "format", "kernels", "why"):
        table.add_column(column)
    for device in found:
        about = [device["name"]]
        if "compute_capability" in device:
            about += [f"compute capability {device['compute_capability']}", f"{device['memory_gib']:.0f} GiB"]
        name = f"{device['device']}: {', '.join(about)}"
        for format, kernels in device["kernels"].items():
            table.add_row(name, format, kernels["backend"], kernels["reason"])
            name = ""
        table.add_section()
    return table


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


def remedy(record: dict[str, Any]) -> str:
    """Return advice for a machine that runs nothing but the reference."""
    if any(kernels["backend"] != "reference" for device in record["devices"] for kernels in device["kernels"].values()):
        return "The table shows where GPU kernels run."
    if len(record["devices"]) > 1 and record["libraries"]["triton"] is None:
        return "No GPU kernels: install Triton (pip install 'tempoquant[gpu]')."
    return "No GPU kernels here: everything runs in plain PyTorch, which is exact and slow."
