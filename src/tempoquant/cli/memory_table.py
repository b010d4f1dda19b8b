"""The predictions of `plan`, as tables for people and as plain values."""

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tempoquant.cli.tables import MIN_WIDTH, NOT_MEASURED, format_bytes
from tempoquant.planning.memory_plan import OVERHEAD_BYTES, MemoryPlan, ModelPlan, ModePlan

PREDICTED = "predicted"


def memory_tables(plan: MemoryPlan, device_bytes: float | None) -> Iterator[RenderableType]:
    """Yield a table of peaks by phase for each model, the savings of quantization, and a
    recommendation for a device.

    The phases compute blocks in chunks of tokens; one row gives the peak in one piece.
    """
    for model in (plan.quantized, plan.sixteen_bit):
        yield _phases_table(plan, model)
    shares = ", ".join(f"{mode.mode} {plan.reduction(mode.mode):.1%}" for mode in plan.quantized.modes)
    yield Text(f"{PREDICTED}: quantized takes less GPU memory than 16-bit by {shares}, in the same mode.")
    if device_bytes is not None:
        for model in (plan.quantized, plan.sixteen_bit):
            yield Text(recommendation(model, device_bytes))


def recommendation(model: ModelPlan, device_bytes: float) -> str:
    """Recommend in one sentence the fastest mode for a device, or state how much memory the
    smallest mode lacks.
    """
    device = f"a GPU of {format_bytes(round(device_bytes))}"
    mode = model.fastest_within(device_bytes)
    if mode is not None:
        how = "in chunks" if mode.in_chunks else "in one piece"
        return f"{model.label} on {device}: --memory {mode.mode}, {how}, {PREDICTED} peak {format_bytes(mode.peak)}."
    least = min(model.modes, key=lambda each: each.peak)
    missing = least.peak + OVERHEAD_BYTES - device_bytes
    return (
        f"{model.label} on {device}: no mode fits; {least.mode} lacks {format_bytes(round(missing))} in "
        f"{least.deciding.name}. Fewer --frames or a smaller --size need less."
    )


def memory_record(plan: MemoryPlan, device_bytes: float | None) -> dict[str, Any]:
    """Return plain values, in bytes throughout."""
    size = plan.size
    models = [_model_record(model, device_bytes) for model in (plan.sixteen_bit, plan.quantized)]
    return {
        "model": plan.model, "kind": PREDICTED, "height": size.height, "width": size.width,
        "num_frames": size.num_frames, "overhead_bytes": OVERHEAD_BYTES,
        "gpu_bytes": None if device_bytes is None else round(device_bytes), "models": models,
        "reduction": {mode.mode: plan.reduction(mode.mode) for mode in plan.quantized.modes},
    }  # fmt: skip


def _model_record(model: ModelPlan, device_bytes: float | None) -> dict[str, Any]:
    fastest = None if device_bytes is None else model.fastest_within(device_bytes)
    return {
        "label": model.label,
        "disk_bytes": model.disk,
        "recommended": None if fastest is None else fastest.mode,
        "recommended_in_chunks": None if fastest is None else fastest.in_chunks,
        "modes": [_mode_record(mode) for mode in model.modes],
        "modes_in_one_piece": [_mode_record(mode) for mode in model.in_one_piece],
    }


def _mode_record(mode: ModePlan) -> dict[str, Any]:
    phases = [
        {"name": phase.name, "weights_bytes": phase.weights, "activations_bytes": phase.activations}
        for phase in mode.phases
    ]
    return {
        "mode": mode.mode, "in_chunks": mode.in_chunks, "peak_bytes": mode.peak,
        "deciding_phase": mode.deciding.name, "host_bytes": mode.host, "pinned_bytes": mode.pinned, "phases": phases,
    }  # fmt: skip


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
