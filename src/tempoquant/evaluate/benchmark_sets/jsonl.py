"""A user's own jsonl, as `load_prompts` reads it. A mistake in it is an error, since the user can
correct it.
"""

from pathlib import Path

from tempoquant.evaluate.benchmark_sets.item import BenchmarkSet, item_of_prompt
from tempoquant.prompts import load_prompts


def load_jsonl(path: str) -> BenchmarkSet:
    """Load every line of a file. Raises CalibrationError that names file, line and remedy."""
    prompts = load_prompts(path)
    return BenchmarkSet(Path(path).name, tuple(item_of_prompt(prompt) for prompt in prompts), is_own=True)
