"""The predictions of `plan --time`, as plain values and as tables for people."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tempoquant.cli.memory_table import Machine, recommendation
from tempoquant.cli.tables import MIN_WIDTH, NOT_MEASURED
from tempoquant.planning.gpus import Gpu
from tempoquant.planning.memory_plan import MemoryPlan, ModelPlan
from tempoquant.planning.time_plan import SIXTEEN_BIT, Part, VideoTime, video_time
from tempoquant.planning.traced_video import TracedVideo
from tempoquant.planning.work import MEMORY, TENSOR_CORES, TRANSFERS

_MARKS = {TENSOR_CORES: "T", MEMORY: "M", TRANSFERS: "C"}
_LEGEND = "Limited by: T tensor cores, M the GPU's memory, C copies of weights to the GPU."


def predicted_from(source: str) -> str:
    """Return the label of every figure."""
    return f"predicted from {source}; nothing was run"


def time_record(
    video: TracedVideo, plan: MemoryPlan, machine: Machine, gpus: Iterable[Gpu], speeds: Sequence[Any]
) -> dict[str, Any]:
    """Return plain values: seconds, operations and bytes.

    Args:
        plan: whose fastest mode that fits is taken, of the 16-bit and of the quantized model.
        machine: the GPU's datasheet says its memory where this does not.
        speeds: of the quantized model.
    """
    return {
        "num_steps": video.size.num_steps,
        "calls_a_step": video.num_branches,
        "not_counted": list(video.others.not_counted),
        "gpus": [_gpu_record(video, plan, machine, gpu, speeds) for gpu in gpus],
    }


def _gpu_record(
    video: TracedVideo, plan: MemoryPlan, machine: Machine, gpu: Gpu, speeds: Sequence[Any]
) -> dict[str, Any]:
    its = Machine(machine.device_bytes or gpu.memory_gib * 2**30, machine.ram_bytes)
    videos: list[dict[str, Any]] = []
    missing: dict[str, str] = {}

    def add(model: ModelPlan, labels: Sequence[Any]) -> None:
        mode = its.fastest(model)
        if mode is None:
            missing.update(dict.fromkeys((label or SIXTEEN_BIT for label in labels), recommendation(model, its)))
            return
        videos.extend(_video_record(video_time(video, gpu, mode, label)) for label in labels)

    add(plan.sixteen_bit, [None])
    add(plan.quantized, speeds)
    return {
        "gpu": gpu.name,
        "kind": predicted_from(gpu.source),
        "capability": list(gpu.capability),
        "bytes_per_s": gpu.bytes_per_s,
        "pcie_bytes_per_s": gpu.pcie_bytes_per_s,
        "operations_per_s": dict(gpu.rates),
        "videos": videos,
        "does_not_fit": missing,
    }


def _video_record(found: VideoTime) -> dict[str, Any]:
    step, whole = found.whole_step, found.whole
    return {
        "label": found.label,
        "memory": found.mode.mode,
        "in_chunks": found.mode.in_chunks,
        "attention": found.attention.backend,
        "attention_products": list(found.attention.products),
        "compiled": found.is_compiled,
        "skipping": found.skipping,
        "calls": {name: {"computed": n.computed, "skipped": n.skipped} for name, n in found.counts.items()},
        "step": [_part_record(part, step.seconds) for part in found.step],
        "step_seconds": step.seconds,
        "step_limit": step.limit,
        "phases": [_part_record(part, whole.seconds) for part in found.phases],
        "video_seconds": whole.seconds,
        "video_limit": whole.limit,
    }


def _part_record(part: Part, whole: float) -> dict[str, Any]:
    return {
        "name": part.name,
        "operations": part.operations,
        "bytes": part.num_bytes,
        "seconds": part.seconds,
        "share": part.seconds / whole,
        "limit": part.limit,
    }


def time_tables(record: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Return the parts of one GPU, or how long each of several takes. `record`: of the command,
    with its "time".
    """
    time = record["time"]
    gpus = time["gpus"]
    if len(gpus) > 1:
        yield _gpus_table(record, gpus)
    for gpu in gpus if len(gpus) == 1 else ():
        if gpu["videos"]:
            yield _seconds_table(record, gpu)
            yield _work_table(gpu)
        yield from (Text(sentence) for sentence in dict.fromkeys(gpu["does_not_fit"].values()))
    if any(gpu["videos"] for gpu in gpus):
        yield Text(_LEGEND)
    yield from (Text(f"{label}: {words}") for label, words in _notes(gpus).items())
    if time["not_counted"]:
        yield Text(f"Not counted: {', '.join(time['not_counted'])}, each used once.")


def _notes(gpus: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return what each speed supposes of steps, by label."""
    return {video["label"]: video["skipping"] for gpu in gpus for video in gpu["videos"]}


def _title(record: Mapping[str, Any], rest: str) -> str:
    time = record["time"]
    calls = f"{time['calls_a_step']} call{'s' if time['calls_a_step'] > 1 else ''}"
    return (
        f"{record['model']}, {record['height']}×{record['width']}, {record['num_frames']} frames, "
        f"{time['num_steps']} steps of {calls}, {rest}"
    )


def _seconds_table(record: Mapping[str, Any], gpu: Mapping[str, Any]) -> Table:
    videos = gpu["videos"]
    table = Table(title=_title(record, f"{gpu['gpu']}: {gpu['kind']}"), title_justify="left", min_width=MIN_WIDTH)
    table.add_column("")
    for video in videos:
        table.add_column(video["label"], justify="right")
    for key, whole in (("step", "a step"), ("phases", "a video")):
        for parts in zip(*(video[key] for video in videos), strict=True):
            table.add_row(parts[0]["name"], *(_cell(part) for part in parts))
        table.add_section()
        name = "step" if key == "step" else "video"
        totals = [f"{seconds(v[f'{name}_seconds'])} {_MARKS[v[f'{name}_limit']]}" for v in videos]
        table.add_row(f"{whole}, mean" if key == "step" else whole, *totals)
        table.add_section()
    rows = {
        "memory mode": [f"{v['memory']}, {'in chunks' if v['in_chunks'] else 'in one piece'}" for v in videos],
        "attention": [", ".join(dict.fromkeys(v["attention_products"])) for v in videos],
        "blocks compiled": ["yes" if v["compiled"] else "no" for v in videos],
        "calls computed": [_calls(v) for v in videos],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _calls(video: Mapping[str, Any]) -> str:
    computed, skipped = (sum(each[key] for each in video["calls"].values()) for key in ("computed", "skipped"))
    return f"{computed:.0f} of {computed + skipped:.0f}"


def _work_table(gpu: Mapping[str, Any]) -> Table:
    videos = gpu["videos"]
    table = Table(title="Operations and bytes of a step, mean: counted", title_justify="left", min_width=MIN_WIDTH)
    table.add_column("")
    for video in videos:
        table.add_column(video["label"], justify="right")
    for parts in zip(*(video["step"] for video in videos), strict=True):
        table.add_row(parts[0]["name"], *(_work(part["operations"], part["bytes"]) for part in parts))
    table.add_section()
    sums = [[sum(part[key] for part in video["step"]) for key in ("operations", "bytes")] for video in videos]
    table.add_row("a step", *(_work(*each) for each in sums))
    return table


def _gpus_table(record: Mapping[str, Any], gpus: Sequence[Mapping[str, Any]]) -> Table:
    title = _title(record, f"seconds a video (a step): {gpus[0]['kind']}")
    table = Table(title=title, title_justify="left", min_width=MIN_WIDTH)
    labels = list(dict.fromkeys(label for gpu in gpus for label in (*_by_label(gpu), *gpu["does_not_fit"])))
    for name in ("GPU", *sorted(labels, key=_place), "memory mode, 16-bit and quantized"):
        table.add_column(name, justify="left" if name == "GPU" else "right")
    for gpu in gpus:
        videos = _by_label(gpu)
        cells = [_both(videos.get(label)) for label in sorted(labels, key=_place)]
        modes = dict.fromkeys((label == SIXTEEN_BIT, video["memory"]) for label, video in videos.items())
        table.add_row(gpu["gpu"], *cells, ", ".join(mode for _, mode in modes))
    return table


def _by_label(gpu: Mapping[str, Any]) -> dict[str, Any]:
    return {video["label"]: video for video in gpu["videos"]}


def _place(label: str) -> int:
    return (SIXTEEN_BIT, "exact", "fast", "fastest").index(label)


def _both(video: Mapping[str, Any] | None) -> str:
    if video is None:
        return NOT_MEASURED
    return f"{seconds(video['video_seconds'])} ({seconds(video['step_seconds'])}) {_MARKS[video['video_limit']]}"


def _cell(part: Mapping[str, Any]) -> str:
    return (
        f"{seconds(part['seconds'])} {part['share']:4.0%} {_MARKS[part['limit']]}" if part["seconds"] else NOT_MEASURED
    )


def _work(operations: float, num_bytes: float) -> str:
    """Return a text such as "785 TFLOP, 289 GB"; bytes alone where nothing is multiplied."""
    numbers = [_scaled(operations, "FLOP")] if operations else []
    return ", ".join((*numbers, _scaled(num_bytes, "B"))) if num_bytes else NOT_MEASURED


def seconds(value: float) -> str:
    """Return a text such as "4.18 s", "152 s" or "0.21 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= 0.1 * size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{_three_digits(value / 1e-6)} µs"


def _scaled(value: float, unit: str) -> str:
    prefixes = {1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k"}
    size = next((size for size in prefixes if value >= size), 1.0)
    return f"{_three_digits(value / size)} {prefixes.get(size, '')}{unit}"


def _three_digits(value: float) -> str:
    digits = 0 if value <= 0 else max(0, 2 - math.floor(math.log10(value)))
    return f"{value:.{min(digits, 3)}f}"
