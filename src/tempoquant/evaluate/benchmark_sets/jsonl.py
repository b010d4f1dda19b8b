"""A jsonl of one's own, as `load_prompts` reads it. A mistake in it is an error: its author can mend it."""

from pathlib import Path

from tempoquant.evaluate.benchmark_sets.item import BenchmarkSet, item_of_prompt
from tempoquant.prompts import load_prompts


def load_jsonl(path: str) -> BenchmarkSet:
    """Every line of a file. Raises CalibrationError that names file, line and remedy."""
    prompts = load_prompts(path)
    return BenchmarkSet(Path(path).name, tuple(item_of_prompt(prompt) for prompt in prompts), is_own=True)
