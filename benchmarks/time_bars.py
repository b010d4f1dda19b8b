r"""The predicted time of a video by part: stacked bars of several GPUs. Nothing is run.

    # of what `plan … --time --json` printed
    python -m benchmarks.time_bars --figure docs/where_time_goes.png
    # from the output of `plan … --time --json`
    python -m benchmarks.time_bars --times plan.json --figure FILE

The prediction is that of `tempoquant plan MODEL --time`; the report draws the same bars.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tempoquant.acceleration.speeds import SPEEDS
from tempoquant.cli.memory_table import Machine, memory_record
from tempoquant.cli.time_table import time_record
from tempoquant.models.pipeline_configs import read_configs
from tempoquant.models.wan.published import A14B
from tempoquant.planning.gpus import GPUS
from tempoquant.planning.memory_plan import plan_memory
from tempoquant.planning.traced_video import trace_video
from tempoquant.recipe import Recipe
from tempoquant.report.time_bars import SEGMENTS, TimeFigure, TimePart, times_of

SHOWN = ("RTX 4090", "RTX 5090", "H100 SXM", "B200")


def predicted(model: str) -> TimePart:
    """Return what `tempoquant plan MODEL --time` predicts, of all known GPUs, at the published
    size.
    """
    configs = read_configs(model)
    size, recipe = configs.family.published(configs.index)[1], Recipe.load("default")
    plan, machine = plan_memory(configs, size, recipe), Machine()
    times = time_record(trace_video(configs, size, recipe), plan, machine, GPUS.values(), SPEEDS)
    return times_of({**memory_record(plan, machine), "time": times})


def draw(times: TimePart, gpus: Sequence[str], file: Path) -> None:
    """Draw a panel a GPU, each with a scale of its own."""
    from matplotlib.figure import Figure

    shown = [figure for figure in times.figures if figure.title in gpus] or list(times.figures)
    figure = Figure(figsize=(9, 1.0 + 1.35 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), squeeze=False)[:, 0]
    for panel, each in zip(panels, shown, strict=True):
        _draw_panel(panel, each)
    panels[-1].set_xlabel("seconds a video", fontsize=8)
    handles = [panels[0].barh([0], [0], color=f"C{index}", label=name) for index, name in enumerate(SEGMENTS)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    kinds = "; ".join(dict.fromkeys(each.kind for each in shown))
    figure.suptitle(f"{times.about}\n{kinds}", fontsize=9)
    figure.savefig(file, dpi=130)


def _draw_panel(axes: Any, figure: TimeFigure) -> None:
    for row, bar in enumerate(figure.bars):
        left = 0.0
        for segment in bar.segments:
            axes.barh(row, segment.seconds, left=left, color=f"C{segment.index}", height=0.75)
            left += segment.seconds
        axes.annotate(
            f"{bar.seconds:.0f} s", (left, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(range(len(figure.bars)), [bar.label for bar in figure.bars], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(figure.title, fontsize=9, loc="left")
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Predict, or read what was predicted, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=A14B, help="as for tempoquant plan")
    parser.add_argument("--times", type=Path, help="what `tempoquant plan MODEL --time --json` printed")
    parser.add_argument("--gpus", nargs="+", default=list(SHOWN), help="by their names in its table")
    parser.add_argument("--figure", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.times is None:
        times = predicted(arguments.model)
    else:
        times = times_of(json.loads(arguments.times.read_text(encoding="utf-8")))
    draw(times, arguments.gpus, arguments.figure)
    print(f"{arguments.figure}: {times.about}")


if __name__ == "__main__":
    main()
