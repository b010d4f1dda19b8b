"""The bundled model's held-out set: procedural, disjoint from training and calibration by its
seeds.
"""

from tempoquant.evaluate.benchmark_sets.item import BenchmarkSet, item_of_prompt
from tempoquant.prompts import Prompt
from tempoquant.tiny.sets import evaluation_items

NUM_ITEMS = 24
"""The default number of items."""


def load_bundled(limit: int | None = None) -> BenchmarkSet:
    """Load the first `limit` held-out items, NUM_ITEMS for None."""
    prompts = [Prompt(item.id, item.image, item.prompt) for item in evaluation_items(limit or NUM_ITEMS)]
    return BenchmarkSet("tiny", tuple(item_of_prompt(prompt) for prompt in prompts), is_own=True)
