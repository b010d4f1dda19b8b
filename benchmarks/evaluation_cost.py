"""The predicted cost of the published evaluation: operations, hours, memory and storage, computed
from the model's shapes and never measured. Prints the Markdown of docs/reproduce.md and
docs/many_machines.md.

    python -m benchmarks.evaluation_cost one-machine                    # stage by stage on one H100
    # 180 items × 3 seeds × 3 models
    python -m benchmarks.evaluation_cost many-machines --gpus 8 64
    python -m benchmarks.evaluation_cost one-machine --share 0.3        # under another assumption

Every assumption is an option or stands in the printed text.
"""

import argparse
import textwrap
from collections.abc import Sequence

from benchmarks.evaluation_operations import PUBLISHED_SECONDS, SHARE, published_share, video_cost, video_tokens
from benchmarks.evaluation_scaling import Cluster, ModelLoad, model_loads, scale_plan, storage_gib
from benchmarks.evaluation_stages import (
    LOAD_BYTES_PER_S,
    NUM_CALIBRATION_PROMPTS,
    PRODUCT_SHARE,
    PUBLISHED,
    RECIPES,
    Evaluated,
    Stage,
    memory_plans,
    model_gib,
    stages,
    take_bytes,
)
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.placement.modes import WITH_WEIGHTS
from tempoquant.planning.run_estimate import GIB

NUM_ITEMS = 180  # of OpenS2V-Eval
GPUS = (1, 8, 64, 180, 540)
WRITE_S, SCORE_S = 2.8, 16.6
"""Processor seconds of writing and of measuring one video of 480 × 832 and 61 frames: measured on
one core of an AMD EPYC by `python -m benchmarks.scoring_time`.
"""


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Make a table whose first column is text and whose others are numbers."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows))


def paragraph(*sentences: str) -> str:
    """Join sentences and wrap them at the width of the documentation."""
    return textwrap.fill(" ".join(sentences), 100, break_long_words=False, break_on_hyphens=False)


def video_text(size: SamplingSettings, share: float) -> str:
    """Describe one video's operations and seconds."""
    cost = video_cost(size, share=share)
    parts = {"linears of the blocks": cost.linears, "attention": cost.attention, "autoencoder": cost.autoencoder}
    rows = [[name, f"{operations / 1e15:.1f}"] for name, operations in parts.items()]
    rows.append(["**together**", f"**{cost.operations / 1e15:.1f}**"])
    sentences = (
        f"{size.height} × {size.width}, {size.num_frames} frames, {video_tokens(size):,} tokens, "
        f"{size.num_steps} steps, both guidance branches.",
        f"At {share:.0%} of an H100's datasheet rates, a video takes {cost.seconds_16bit:.0f} s in 16 bits and "
        f"{cost.seconds_4bit:.0f} s in four bits: {cost.speedup:.2f} times as fast, as attention stays in 16 bits.",
        f"Wan publishes {PUBLISHED_SECONDS:.0f} s for 81 frames on an H100: {published_share():.0%} of its rates.",
    )
    return f"{markdown(['one video', 'PFLOP'], rows)}\n\n{paragraph(*sentences)}"


def stages_text(what: Evaluated, share: float, score_s: float) -> str:
    """Make a row for each stage on one GPU."""
    found = stages(what, score_s, share=share)
    left = sum(stage.disk_gib for stage in found)
    need = model_gib() + left + max(stage.passing_gib for stage in found)
    rows = [_stage_row(stage) for stage in found]
    hours = [f"**{sum(stage.hours[mode] for stage in found):.1f}**" for mode in ("resident", "lean")]
    rows.append(["**all**", *hours, "–", "–", "–", "–", f"**{left:.1f}**", "–"])
    gpu = [f"GPU, `{mode}`" for mode in WITH_WEIGHTS]
    headings = ["stage", "hours", "hours, `lean`", *gpu, "RAM, `swap`", "disk, kept", "disk, temporary"]
    changes = "; ".join(
        f"`{name}` {', '.join(f'{mode} −{plan.reduction(mode):.1%}' for mode in WITH_WEIGHTS)}"
        for name, plan in memory_plans(what.size).items()
    )
    sentences = (
        f"Memory and disk are in GiB, for {what.num_items} items, {what.num_seeds} seed(s) and "
        f"{NUM_CALIBRATION_PROMPTS} calibration prompts.",
        f"The 16-bit model's files take {model_gib():.1f} GiB more, so the disk needs {need:.0f} GiB.",
        f"Predicted change of a video's peak GPU memory, with the same mode on both sides: {changes}.",
    )
    return f"{markdown(headings, rows)}\n\n{paragraph(*sentences)}"


def _stage_row(stage: Stage) -> list[str]:
    hours = [f"{stage.hours[mode]:.1f}" for mode in ("resident", "lean")]
    gpu = [f"{stage.gpu_gib[mode]:.1f}" if stage.gpu_gib else "–" for mode in WITH_WEIGHTS]
    ram = f"{stage.ram_gib['swap']:.0f}" if stage.ram_gib else "–"
    disk = [f"{gib:.1f}" if gib else "–" for gib in (stage.disk_gib, stage.passing_gib)]
    return [stage.name, *hours, *gpu, ram, *disk]


def scaling_text(what: Evaluated, gpus: Sequence[int], share: float, cpu_s: tuple[float, float]) -> str:
    """Describe hours by number of GPUs, then the demands on storage and RAM."""
    loads = model_loads(what)
    alone = scale_plan(what, Cluster(1), loads, cpu_s, share=share)
    rows = []
    for number in gpus:
        plan = scale_plan(what, Cluster(number), loads, cpu_s, share=share)
        parts = (plan.load, plan.generate, plan.tail, plan.measure_alone, plan.measure_spread)
        for_all = [
            (plan.total(spread), alone.total(spread) / (number * plan.total(spread))) for spread in (False, True)
        ]
        rows.append(
            [
                f"{number}",
                *(f"{hours:.2f}" for hours in parts),
                *(f"**{hours:.1f}** ({efficiency:.0%})" for hours, efficiency in for_all),
            ]
        )
    headings = [
        "GPUs",
        "load",
        "generate",
        "last round",
        "measure, one process",
        "measure, all workers",
        "all, measured by one",
        "all, measured by all",
    ]
    table = markdown(headings, rows)
    words = "All columns are hours. The brackets show the efficiency: the share of N times one GPU's speed."
    return "\n\n".join([table, words, _storage_text(what, loads), _nodes_text(what, loads, gpus, share, cpu_s[0])])


def _storage_text(what: Evaluated, loads: Sequence[ModelLoad]) -> str:
    kinds = storage_gib(what, len(loads))
    each = ", ".join(f"{size / 1e6:.1f} MB `{kind}`" for kind, size in take_bytes(what.size).items())
    together = ", ".join(f"{gib:.0f} GiB `{kind}`" for kind, gib in kinds.items())
    return paragraph(
        f"{what.num_items} items × {what.num_seeds} seeds × {len(loads)} models make {len(loads) * what.takes:,} takes."
        f" One take is at most {each}.",
        f"All takes are at most {together}, {sum(kinds.values()):.0f} GiB together.",
    )


def _nodes_text(what: Evaluated, loads: Sequence[ModelLoad], gpus: Sequence[int], share: float, write_s: float) -> str:
    seconds = video_cost(what.size, share=share).seconds_4bit + write_s
    rows, sixteen_bit, four_bit = [], loads[0], loads[-1]
    for cluster in map(Cluster, gpus):
        written = cluster.gpus * sum(take_bytes(what.size).values()) / seconds
        rows.append(
            [
                f"{cluster.gpus}",
                f"{cluster.nodes}",
                f"{cluster.nodes * sixteen_bit.disk / 1e12:.2f}",
                f"{cluster.read_s(sixteen_bit.disk) / 60:.1f}",
                f"{written / 1e6:.0f}",
            ]
        )
    headings = ["GPUs", "nodes", "16-bit model read, TB", "minutes", "takes written, MB/s"]
    some, workers = Cluster(1), Cluster.gpus_per_node
    ram = [f"{workers * model.host / GIB:.0f}" for model in (sixteen_bit, four_bit)]
    pinned = [f"{workers * model.pinned / GIB:.0f}" for model in (sixteen_bit, four_bit)]
    sentences = (
        f"We assume that the shared folder delivers {some.storage_bytes_per_s / 1e9:g} GB/s to all nodes together and "
        f"{some.node_bytes_per_s / 1e9:g} GB/s to one, and that a node reads a model once for its {workers} workers.",
        f"{workers} workers that load the 16-bit model together hold {ram[0]} GiB of RAM. In `swap` and `lean` they "
        f"keep {pinned[0]} GiB of it page-locked. With `{RECIPES[-1]}` these are {ram[1]} and {pinned[1]} GiB.",
    )
    return f"{markdown(headings, rows)}\n\n{paragraph(*sentences)}"


def assumptions_text(share: float, cpu_s: tuple[float, float]) -> str:
    """List every assumption of the figures."""
    assumptions = (
        f"A video reaches {share:.0%} of an H100 SXM's datasheet rates: 989 TFLOP/s in BF16, 1979 in FP8, 3.35 TB/s.",
        f"Large products reach {PRODUCT_SHARE:.0%}; the estimates of recording and quantizing start from them.",
        "The copies of `lean` overlap with computing.",
        f"A worker reads and casts a model at {LOAD_BYTES_PER_S / 1e9:g} GB/s.",
        f"Writing a video takes {cpu_s[0]:g} s of a CPU core, and measuring it {cpu_s[1]:g} s (measured, AMD EPYC).",
        "An MP4 is at most a tenth of the raw frames.",
    )
    listed = "\n".join(f"- {each}" for each in assumptions)
    return f"**Computed, not measured.** The figures leave out VBench. They assume:\n\n{listed}"


def text_of(
    table: str, items: int | None = None, seeds: int | None = None, gpus: Sequence[int] = GPUS, share: float = SHARE
) -> str:
    """Return the text to print."""
    cpu_s = (WRITE_S, SCORE_S)
    if table == "one-machine":
        what = Evaluated(items or NUM_ITEMS - NUM_CALIBRATION_PROMPTS, seeds or 1, PUBLISHED)
        parts = [video_text(what.size, share), stages_text(what, share, SCORE_S)]
    else:
        parts = [scaling_text(Evaluated(items or NUM_ITEMS, seeds or 3, PUBLISHED), gpus, share, cpu_s)]
    return "\n\n".join([*parts, assumptions_text(share, cpu_s)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("one-machine", "many-machines"))
    parser.add_argument(
        "--items",
        type=int,
        help="number of items; by default 168 on one machine (without the calibration items), 180 on many",
    )
    parser.add_argument("--seeds", type=int, help="number of seeds; by default 1 on one machine, 3 on many")
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS))
    parser.add_argument(
        "--share", type=float, default=SHARE, help="share of the GPU's datasheet rates that a video reaches"
    )
    arguments = parser.parse_args()
    print(text_of(arguments.table, arguments.items, arguments.seeds, arguments.gpus, arguments.share))


if __name__ == "__main__":
    main()
