"""The runner: it measures missing rows and seeds, and combines the finished ones."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.measure import measure
from benchmarks.quality.reference import Reference, prepare
from benchmarks.quality.results import RowFiles, combine, failed
from benchmarks.quality.rows import Row
from benchmarks.quality.task import Task
from benchmarks.quality.videos import Decoder, combine_videos
from tempoquant.errors import TempoQuantError
from tempoquant.models.recipe_fit import check_recipe_fits
from tempoquant.progress import Progress

_logger = logging.getLogger(__name__)


class Run:
    """One task, its rows and seeds, in a work folder.

    Args:
        load: makes the 16-bit pipeline; called at most once, before a measurement.
    """

    def __init__(self, task: Task, work: Path, num_seeds: int, load: Callable[[], Any], progress: Progress) -> None:
        self.task, self.work, self.seeds, self.progress = task, work, range(num_seeds), progress
        self.files = RowFiles(work / "rows", task)
        self._load, self._loaded = load, None
        self._references: dict[int, Reference] = {}
        self.errors: dict[str, TempoQuantError] = {}

    def measure(self, rows: Sequence[Row], again: bool = False) -> None:
        """Measure seed after seed, so that every row has a first answer early; a row that fails
        keeps its reason.
        """
        missing = {seed: [row for row in rows if again or self.files.load(row, seed) is None] for seed in self.seeds}
        num_rows = len(rows) * len(self.seeds)
        num_missing = sum(map(len, missing.values()))
        advance = self.progress.start("Rows and seeds", num_rows, num_rows - num_missing) if num_missing else None
        for seed, left in missing.items():
            for row in left:
                assert advance is not None
                if again or self.files.load(row, seed) is None:  # or since by the same recipe
                    self._measure_row(row, seed)
                advance()

    def _measure_row(self, row: Row, seed: int) -> None:
        if row.label in self.errors:
            return
        reference = self.reference(seed)
        try:
            recipe = None if row.recipe is None else self.task.resolve(row.recipe)
            if recipe is not None:
                check_recipe_fits(self.task.source, recipe)
            measured = measure(self.pipeline, reference, recipe, self.progress, row.eight_bit_timesteps)
            self.files.save(row, seed, measured)
        except TempoQuantError as error:
            _logger.warning("%s, seed %d: %s", row.label, seed, error)
            self.errors[row.label] = error

    @property
    def pipeline(self) -> Any:
        """Return the 16-bit pipeline."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def reference(self, seed: int) -> Reference:
        """Return the 16-bit pipeline's results for a seed."""
        if seed not in self._references:
            self._references[seed] = prepare(self.task, seed, self.pipeline, self.work, self.progress)
        return self._references[seed]

    def records(self, row: Row) -> list[dict[str, Any]]:
        """Return the finished results of a row, one a seed."""
        found = [self.files.load(row, seed) for seed in self.seeds]
        return [record for record in found if record is not None]

    def results(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return every row over its finished seeds; failed rows have their reason, rows without any
        seed are left out.
        """
        found = []
        for row in rows:
            records = self.records(row)
            if row.label in self.errors:
                found.append(failed(row, self.errors[row.label]))
            elif records:
                found.append(combine(row, records))
        return found

    def videos(self, rows: Sequence[Row], in_bundled_world: bool) -> Mapping[str, Any]:
        """Return by label the judgements of a finished row's decoded videos."""
        decoder = Decoder(self.pipeline, in_bundled_world)
        found: dict[str, list[dict[str, Any]]] = {}
        for seed in self.seeds:  # outermost, so that each 16-bit video is decoded once and need not stay
            for row in rows:
                if self.files.load(row, seed) is not None:
                    judged = decoder.judge(self.files, row, self.reference(seed), self.progress)
                    found.setdefault(row.label, []).append(judged)
            decoder.forget()
        return {label: combine_videos(judged) for label, judged in found.items()}
