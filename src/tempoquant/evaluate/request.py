"""Request: the task of an evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass

from tempoquant.errors import SettingsError
from tempoquant.evaluate.benchmark_sets import BenchmarkSet, Overlap
from tempoquant.evaluate.plan import Model
from tempoquant.evaluate.vbench.settings import VBenchSettings
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.schedule import flow_shift_of, load_scheduler
from tempoquant.placement.modes import Memory


@dataclass(frozen=True)
class Request:
    """The models of an evaluation, and its benchmark.

    Attributes:
        reference: the model that the others were quantized from.
        models: the others, labels unique.
        benchmark: the source of the items.
        settings: of every generation; flow_shift is a number, unless the reference's scheduler has
            none.
        seeds: every item is generated with each.
        ids, limit, overlap: see `benchmark_sets.select`.
        command: the user's command line, for the record.
        memory: the memory mode of every pipeline, the reference's as well: modes tile the
            autoencoder.
        vbench: settings of VBench's scores; None for none.
    """

    reference: Model
    models: Sequence[Model]
    benchmark: BenchmarkSet
    settings: SamplingSettings
    seeds: Sequence[int] = (0,)
    ids: Sequence[str] | None = None
    limit: int | None = None
    overlap: Overlap = Overlap.REFUSE
    command: str = ""
    memory: Memory = "resident"
    vbench: VBenchSettings | None = None

    def __post_init__(self) -> None:
        if self.settings.flow_shift is None and flow_shift_of(load_scheduler(self.reference.source, None)) is not None:
            raise SettingsError("the flow shift has to be the same for every model: give one with --flow-shift.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise SettingsError(f"seeds are one or more different whole numbers, not {list(self.seeds)}.")

    @property
    def sides(self) -> list[Model]:
        """Return the reference, then the models."""
        return [self.reference, *self.models]
