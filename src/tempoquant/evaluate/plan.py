"""The plan of an evaluation: the content and settings of every model's generations, and the
timestep bins of its judgement.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tempoquant.acceleration.accelerate import accelerate_by
from tempoquant.acceleration.choices import Choices
from tempoquant.evaluate.benchmark_sets import Item
from tempoquant.evaluate.evaluation_folder import Take
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.schedule import Step, sampling_steps
from tempoquant.models.source import SourceModel
from tempoquant.placement.modes import Memory
from tempoquant.recipe import Recipe
from tempoquant.timesteps import TimestepBins, denoiser_at

NUM_MAPPED = 2
"""The number of items whose calls of the reference are kept: errors of single layers differ little
between items.
"""


def as_it_is(_pipeline: Any) -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Model:
    """One side of the comparison.

    Attributes:
        label: unique, fit for a folder's name.
        source: the pipeline.
        activation_bits: as the user wrote them; None for the checkpoint's.
        prepare: called with the pipeline before it runs; can be pickled.
        speed: of its generation, which the label names; None for every step and 16-bit attention.
    """

    label: str
    source: SourceModel
    activation_bits: str | None = None
    prepare: Callable[[Any], None] = as_it_is
    speed: Choices | None = None

    @property
    def folder(self) -> Path:
        """Return the folder of the pipeline."""
        return self.source.folder

    def make_ready(self, pipeline: Any) -> None:
        """Prepare a loaded pipeline that has its scheduler, and set its speed. Raises as
        `accelerate`.
        """
        self.prepare(pipeline)
        if self.speed is not None:
            accelerate_by(pipeline, self.speed)


@dataclass(frozen=True)
class Plan:
    """The generations of every model, and their settings.

    Attributes:
        reference: the pipeline whose scheduler all models use.
        items, seeds: every item with every seed.
        settings: flow_shift is a number, unless the reference's scheduler has none.
        device: where to run, by its name on the workers.
        steps: of the sampling loop.
        bins: the timestep bins of all reports: the paper's, whatever a model's own bins are.
        memory: the memory mode of every pipeline.
        keeps_embeddings: whether embeddings are compared too, because a model's text encoder is
            quantized.
    """

    reference: SourceModel
    items: Sequence[Item]
    seeds: Sequence[int]
    settings: SamplingSettings
    device: str
    steps: Sequence[Step]
    bins: Mapping[str, TimestepBins]
    memory: Memory = "resident"
    keeps_embeddings: bool = False

    @classmethod
    def of(
        cls,
        reference: SourceModel,
        items: Sequence[Item],
        seeds: Sequence[int],
        settings: SamplingSettings,
        device: str,
        memory: Memory = "resident",
    ) -> "Plan":
        """Make a plan with the steps of the reference's scheduler. Raises ModelError if it does not
        load.
        """
        steps = sampling_steps(reference, settings)
        paper = Recipe.load("paper")
        bins = {}
        for name in reference.denoiser_names:
            timesteps = [float(step.timestep) for step in steps if step.denoiser == name]
            bins[name] = TimestepBins.from_step_fractions(timesteps, paper.bin_fractions_of(name))
        # Workers may run in another folder, where relative paths differ.
        items = [replace(item, image=item.image.resolve()) if isinstance(item.image, Path) else item for item in items]
        return cls(reference, items, seeds, settings, device, steps, bins, memory)

    @property
    def mapped_steps(self) -> set[int]:
        """Return the middle step of each timestep bin."""
        by_bin: dict[str, list[int]] = {}
        for index, step in enumerate(self.steps):
            by_bin.setdefault(self.bin_name(float(step.timestep)), []).append(index)
        return {indices[len(indices) // 2] for indices in by_bin.values()}

    @property
    def mapped_takes(self) -> set[tuple[str, int]]:
        """Return ids and seeds of the generations whose transformer calls make the layer maps."""
        return {(item.id, self.seeds[0]) for item in self.items[:NUM_MAPPED]}

    def bin_name(self, timestep: float) -> str:
        """Name a bin, such as "high_noise bin 0", the cleanest of its denoiser."""
        name = denoiser_at(self.reference.denoisers, timestep).name
        return f"{name} bin {self.bins[name].of(timestep)}"

    @property
    def bin_names(self) -> list[str]:
        """Return the name of every bin that a step falls into, in sampling order."""
        return list(dict.fromkeys(self.bin_name(float(step.timestep)) for step in self.steps))

    def takes(self, label: str) -> list[tuple[Item, Take]]:
        """Return all generations of a model: all seeds of an item after each other."""
        return [(item, Take(label, item.id, seed)) for item in self.items for seed in self.seeds]
