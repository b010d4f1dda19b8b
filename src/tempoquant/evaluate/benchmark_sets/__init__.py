"""The benchmarks: OpenS2V-Eval, VBench-I2V, a user's jsonl, and the bundled model's held-out
set.
"""

from pathlib import Path

from tempoquant.errors import CalibrationError
from tempoquant.evaluate.benchmark_sets.bundled import load_bundled
from tempoquant.evaluate.benchmark_sets.item import BenchmarkSet, Item, Skipped
from tempoquant.evaluate.benchmark_sets.jsonl import load_jsonl
from tempoquant.evaluate.benchmark_sets.opens2v import load_opens2v
from tempoquant.evaluate.benchmark_sets.selection import Overlap, Selection, fitting, select
from tempoquant.evaluate.benchmark_sets.vbench_i2v import load_vbench_i2v

__all__ = ["BenchmarkSet", "Item", "Overlap", "Selection", "Skipped", "fitting", "load_benchmark", "select"]

NAMES = ("tiny", "opens2v", "vbench-i2v")


def load_benchmark(
    name: str, root: Path | None, aspect_ratio: float, limit: int | None = None, with_images: bool = True
) -> BenchmarkSet:
    """Load a benchmark by its name, or a jsonl file.

    Args:
        name: one of NAMES, or the path of a jsonl file of {id, prompt, image}.
        root: folder of a downloaded benchmark.
        aspect_ratio: of the videos, width / height; VBench-I2V has its images in several.
        limit: how many items will be wanted; only the bundled set uses it, since it has no fixed
            size.
        with_images: False if the pipeline takes none: a downloaded benchmark's images are then not
            needed.

    Raises:
        CalibrationError: there is no such benchmark, it is malformed, or none of its items is
            usable.
    """
    if name == "tiny":
        found = load_bundled(limit)
    elif name in NAMES:
        if root is None:
            raise CalibrationError(f"{name} must be downloaded first: give its folder with --root.")
        is_opens2v = name == "opens2v"
        found = load_opens2v(root, with_images) if is_opens2v else load_vbench_i2v(root, aspect_ratio, with_images)
    else:
        found = load_jsonl(name)
    if root is not None and name not in NAMES[1:]:
        raise CalibrationError(f"--root is the folder of {' or '.join(NAMES[1:])}; {name} has none: leave it out.")
    if not found.items:
        why = f": {found.skipped[0].id}, for example: {found.skipped[0].why}" if found.skipped else "."
        raise CalibrationError(f"{name} has no usable item{why}")
    return found
