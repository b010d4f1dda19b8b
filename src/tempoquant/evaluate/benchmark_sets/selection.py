"""Selection of a benchmark's items: the requested ones, without those that a model was calibrated
on unless allowed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from tempoquant.errors import CalibrationError
from tempoquant.evaluate.benchmark_sets.item import BenchmarkSet, Item, Skipped
from tempoquant.prompts import calibrated_on


class Overlap(str, Enum):
    """The treatment of items that a model was calibrated on."""

    REFUSE = "refuse"
    EXCLUDE = "exclude"
    ALLOW = "allow"


@dataclass(frozen=True)
class Selection:
    """The items that every model is evaluated on.

    Attributes:
        items: in the benchmark's order.
        overlap: ids among them that a model was calibrated on.
        excluded: ids that were left out for that reason.
    """

    items: tuple[Item, ...]
    overlap: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()


def fitting(benchmark: BenchmarkSet, lacking: Callable[[Item], str | None]) -> BenchmarkSet:
    """Skip items that lack an input of a model, with the reason.

    Args:
        lacking: returns what an item lacks, such as "an image"; None for nothing.

    Raises:
        CalibrationError: an item of the user's own list lacks something, or every item does.
    """
    missing = {item.id: words for item in benchmark.items if (words := lacking(item)) is not None}
    if missing and (benchmark.is_own or len(missing) == len(benchmark.items)):
        id, words = next(iter(missing.items()))
        raise CalibrationError(
            f"{len(missing)} of {len(benchmark.items)} items of {benchmark.name} lack what the model needs, such as "
            f"{id!r}, which lacks {words}: give items with one."
        )
    skipped = [Skipped(id, f"the model needs {words}, and it has none.") for id, words in missing.items()]
    items = tuple(item for item in benchmark.items if item.id not in missing)
    return replace(benchmark, items=items, skipped=(*benchmark.skipped, *skipped))


def select(
    benchmark: BenchmarkSet,
    calibrated: Iterable[dict[str, str]],
    ids: Sequence[str] | None = None,
    limit: int | None = None,
    overlap: Overlap = Overlap.REFUSE,
) -> Selection:
    """Select by ids, then without the overlap (if it is excluded), then the first `limit`.

    Args:
        calibrated: provenance of every prompt that any of the models was calibrated on.

    Raises:
        CalibrationError: an id is unknown, an item overlaps (if that is refused), or nothing is
            left.
    """
    items = benchmark.items if ids is None else _by_ids(benchmark, ids)
    shared = set(calibrated_on(items, calibrated))
    excluded: tuple[str, ...] = ()
    if overlap is Overlap.EXCLUDE:
        excluded = tuple(item.id for item in items if item.id in shared)
        items = tuple(item for item in items if item.id not in shared)
    items = items[:limit]
    kept = tuple(item.id for item in items if item.id in shared)
    if kept and overlap is Overlap.REFUSE:
        raise CalibrationError(
            f"{len(kept)} of {len(items)} items were calibrated on, such as {kept[0]!r}: leave them out with "
            "--exclude-overlap, or keep them with --allow-overlap."
        )
    if not items:
        raise CalibrationError(f"no item of {benchmark.name} is left to evaluate: {len(excluded)} were calibrated on.")
    return Selection(items, kept, excluded)


def _by_ids(benchmark: BenchmarkSet, ids: Sequence[str]) -> tuple[Item, ...]:
    skipped = {skip.id: skip.why for skip in benchmark.skipped}
    known = {item.id for item in benchmark.items}
    for id in ids:
        if id not in known:
            why = f"was skipped: {skipped[id]}" if id in skipped else "is none of its items."
            raise CalibrationError(f"{benchmark.name}: {id!r} {why}")
    return tuple(item for item in benchmark.items if item.id in set(ids))
