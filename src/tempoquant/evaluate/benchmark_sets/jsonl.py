"""A jsonl of one's own: {"id", "image", "prompt"} a line. A mistake in it is an error: its author can mend it."""

from pathlib import Path

from tempoquant.evaluate.benchmark_sets.item import BenchmarkSet, Item
from tempoquant.prompts import load_prompts


def load_jsonl(path: str) -> BenchmarkSet:
    """Every line of a file. Raises CalibrationError that names file, line and remedy."""
    prompts = load_prompts(path)
    return BenchmarkSet(Path(path).name, tuple(Item(p.id, p.text, p.image, p.image_hash) for p in prompts))
