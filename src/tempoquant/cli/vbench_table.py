"""The scores of VBench, for people."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from tempoquant.cli.tables import metrics_table
from tempoquant.evaluate.vbench.scores import LOG
from tempoquant.evaluate.vbench.summary import METRICS

TRAP = (
    "VBench's consistency, smoothness and flickering score collapsed videos high: read them beside PSNR, SSIM and VMAF "
    "against the reference."
)


def vbench_text(found: Mapping[str, Any], output: Path) -> Iterator[RenderableType]:
    """Yield a row for each model's metric, the failures, and the warning about the scores.

    Args:
        found: the key `vbench` of evaluation.json.
        output: the evaluation's folder.
    """
    there = {row["metric"] for row in found["summary"]}
    words = {name: metric.words for name, metric in METRICS.items() if name in there}
    yield metrics_table(f"VBench {found['version']}; 95 % bootstrap intervals", words, found["summary"])
    for failure in found["failed"]:
        which = (
            f"{failure['label']}, {failure['id']}, seed {failure['seed']}" if "id" in failure else "all that was left"
        )
        yield Text(f"VBench's {failure['dimension']} failed ({which}): {failure['why']}", style="bold red")
    if found["failed"]:
        yield f"VBench's own output is in {output / LOG}. The same command retries failures."
    yield TRAP
