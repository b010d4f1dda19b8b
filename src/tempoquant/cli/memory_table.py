"""The predictions of `plan`, as tables for people and as plain values."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tempoquant.cli.tables import MIN_WIDTH, NOT_MEASURED, format_bytes
from tempoquant.planning.memory_plan import HOST_OVERHEAD_BYTES, OVERHEAD_BYTES, MemoryPlan, ModelPlan, ModePlan

PREDICTED = "predicted"


@dataclass(frozen=True)
class Machine:
    """The memory of a user's machine; None for an unknown one.

    Attributes:
        device_bytes: memory of the GPU.
        ram_bytes: memory of the host.
    """

    device_bytes: float | None = None
    ram_bytes: float | None = None

    @property
    def is_known(self) -> bool:
        """Return whether either is known."""
        return self.device_bytes is not None or self.ram_bytes is not None

    def fastest(self, model: ModelPlan) -> ModePlan | None:
        """Return the fastest mode that fits; None if none does, or nothing is known."""
        if not self.is_known:
            return None
        return model.fastest_within(
            *(math.inf if each is None else each for each in (self.device_bytes, self.ram_bytes))
        )

    def __str__(self) -> str:
        gpu = [] if self.device_bytes is None else [f"a GPU of {format_bytes(round(self.device_bytes))}"]
        ram = [] if self.ram_bytes is None else [f"{format_bytes(round(self.ram_bytes))} of RAM"]
        return " and ".join((*gpu, *ram))


def memory_tables(plan: MemoryPlan, machine: Machine) -> Iterator[RenderableType]:
    """Yield a table of peaks by phase for each model, the savings of quantization, and a
    recommendation for a machine.

    The phases compute blocks in chunks of tokens; one row gives the peak in one piece.
    """
    for model in (plan.quantized, plan.sixteen_bit):
        yield _phases_table(plan, model)
    shares = ", ".join(f"{mode.mode} {plan.reduction(mode.mode):.1%}" for mode in plan.quantized.modes)
    yield Text(
        f"4-bit linears are counted as the kernels {plan.kernels} run them (tempoquant doctor says what runs where)."
    )
    yield Text(f"{PREDICTED}: quantized takes less GPU memory than 16-bit by {shares}, in the same mode.")
    yield from recommendations(plan, machine)


def recommendations(plan: MemoryPlan, machine: Machine) -> Iterator[RenderableType]:
    """Yield a sentence for each model, if anything is known of the machine."""
    if machine.is_known:
        for model in (plan.quantized, plan.sixteen_bit):
            yield Text(recommendation(model, machine))


def recommendation(model: ModelPlan, machine: Machine) -> str:
    """Recommend in one sentence the fastest mode for a machine, or state how much memory the
    smallest modes lack.
    """
    mode = machine.fastest(model)
    if mode is not None:
        how = "in chunks" if mode.in_chunks else "in one piece"
        ram = "" if machine.ram_bytes is None else f", RAM {format_bytes(mode.host)}"
        return (
            f"{model.label} on {machine}: --memory {mode.mode}, {how}, {PREDICTED} peak {format_bytes(mode.peak)}{ram}."
        )
    return f"{model.label} on {machine}: no mode fits; {'; '.join(_missing(model, machine))}."


def _missing(model: ModelPlan, machine: Machine) -> Iterator[str]:
    """Yield what the smallest mode lacks on the GPU, and in RAM."""
    modes = (*model.modes, *model.in_one_piece)
    found = False
    if machine.device_bytes is not None:
        least = min(modes, key=lambda each: each.peak)
        if (missing := least.peak + OVERHEAD_BYTES - machine.device_bytes) > 0:
            found = True
            yield (
                f"{least.mode} lacks {format_bytes(math.ceil(missing))} of the GPU in {least.deciding.name} (fewer "
                "--frames or a smaller --size need less)"
            )
    if machine.ram_bytes is not None:
        least = min(modes, key=lambda each: each.host)
        if (missing := least.host + HOST_OVERHEAD_BYTES - machine.ram_bytes) > 0:
            found = True
            yield (
                f"{least.mode} lacks {format_bytes(math.ceil(missing))} of RAM "
                f"({format_bytes(HOST_OVERHEAD_BYTES)} are reserved for the system)"
            )
    if not found:
        yield "each mode that fits the GPU needs more RAM, and each that fits the RAM needs a larger GPU"


def memory_record(plan: MemoryPlan, machine: Machine) -> dict[str, Any]:
    """Return plain values, in bytes throughout."""
    size, gpu, ram = plan.size, machine.device_bytes, machine.ram_bytes
    models = [_model_record(model, machine) for model in (plan.sixteen_bit, plan.quantized)]
    return {
        "model": plan.model,
        "kind": PREDICTED,
        "height": size.height,
        "width": size.width,
        "num_frames": size.num_frames,
        "kernels": plan.kernels,
        "overhead_bytes": OVERHEAD_BYTES,
        "host_overhead_bytes": HOST_OVERHEAD_BYTES,
        "gpu_bytes": None if gpu is None else round(gpu),
        "ram_bytes": None if ram is None else round(ram),
        "models": models,
        "reduction": {mode.mode: plan.reduction(mode.mode) for mode in plan.quantized.modes},
    }


def _model_record(model: ModelPlan, machine: Machine) -> dict[str, Any]:
    fastest = machine.fastest(model)
    return {
        "label": model.label,
        "disk_bytes": model.disk,
        "recommended": None if fastest is None else fastest.mode,
        "recommended_in_chunks": None if fastest is None else fastest.in_chunks,
        "modes": [_mode_record(mode) for mode in model.modes],
        "modes_in_one_piece": [_mode_record(mode) for mode in model.in_one_piece],
    }


def _mode_record(mode: ModePlan) -> dict[str, Any]:
    places = mode.places
    phases = [
        {"name": phase.name, "weights_bytes": phase.weights, "activations_bytes": phase.activations}
        for phase in mode.phases
    ]
    return {
        "mode": mode.mode,
        "in_chunks": mode.in_chunks,
        "peak_bytes": mode.peak,
        "deciding_phase": mode.deciding.name,
        "host_bytes": mode.host,
        "pinned_bytes": mode.pinned,
        "copied_bytes": {
            "before_the_first_step": places.copied_first,
            "between_denoisers": list(places.copied_between),
            "each_call": list(places.copied_each_call),
            "from_disk": places.from_disk,
        },
        "read_bytes": {"first_calls": list(places.read_first), "each_call": list(places.read_each_call)},
        "phases": phases,
    }


def _phases_table(plan: MemoryPlan, model: ModelPlan) -> Table:
    size = plan.size
    title = (
        f"{plan.model}, {model.label}, {size.height}×{size.width}, {size.num_frames} frames, in chunks: {PREDICTED} "
        f"GPU memory (and {format_bytes(OVERHEAD_BYTES)} beside it)"
    )
    table = Table(title=title, title_justify="left", min_width=MIN_WIDTH)
    table.add_column("")
    for mode in model.modes:
        table.add_column(mode.mode, justify="right")
    for phases in zip(*(mode.phases for mode in model.modes), strict=True):
        marks = ["* " if phase is mode.deciding else "" for phase, mode in zip(phases, model.modes, strict=True)]
        cells = [f"{mark}{format_bytes(phase.peak)}" for mark, phase in zip(marks, phases, strict=True)]
        table.add_row(phases[0].name, *cells)
    table.add_section()
    rows = [
        ("peak, decided by *", [f"{format_bytes(mode.peak)} = {mode.peak / 1e9:.1f} GB" for mode in model.modes]),
        ("peak in one piece", [format_bytes(mode.peak) for mode in model.in_one_piece]),
        ("RAM", [format_bytes(mode.host) for mode in model.modes]),
        ("of it page-locked", [format_bytes(m.pinned) if m.pinned else NOT_MEASURED for m in model.modes]),
        ("disk", [format_bytes(model.disk)] * len(model.modes)),
    ]
    for name, cells in rows:
        table.add_row(name, *cells)
    return table
