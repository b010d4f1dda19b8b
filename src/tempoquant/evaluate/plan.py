"""What every model of an evaluation generates, and how; and in which timestep bins it is judged."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tempoquant.acceleration.accelerate import accelerate_by
from tempoquant.acceleration.choices import Choices
from tempoquant.errors import ModelError
from tempoquant.evaluate.benchmark_sets import Item
from tempoquant.evaluate.evaluation_folder import Take
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.schedule import Step, sampling_steps
from tempoquant.models.source import SourceModel
from tempoquant.placement.modes import Memory
from tempoquant.recipe import Recipe
from tempoquant.timesteps import TimestepBins, denoiser_at

NUM_MAPPED = 2
"""The reference's calls of so many items are kept: what single layers do differs little between items."""


def as_it_is(_pipeline: Any) -> None:
    """A model that needs no preparation."""


@dataclass(frozen=True)
class Model:
    """One side of the comparison.

    Attributes:
        label: unique, fit for a folder's name.
        source: the pipeline.
        activation_bits: as the user wrote them; None for those of the checkpoint.
        prepare: called with the pipeline before it runs; can be pickled.
        speed: at which it generates, beside the label that says so; None for every step and 16-bit attention.
    """

    label: str
    source: SourceModel
    activation_bits: str | None = None
    prepare: Callable[[Any], None] = as_it_is
    speed: Choices | None = None

    @property
    def folder(self) -> Path:
        """Where the pipeline lies."""
        return self.source.folder

    def make_ready(self, pipeline: Any) -> None:
        """Prepare a pipeline that is loaded and has its scheduler, and set its speed. Raises as `accelerate`."""
        self.prepare(pipeline)
        if self.speed is not None:
            accelerate_by(pipeline, self.speed)


@dataclass(frozen=True)
class Plan:
    """What every model generates, and how.

    Attributes:
        reference: the pipeline whose scheduler all models use.
        items, seeds: every item with every seed.
        settings: flow_shift is a number, unless the reference's scheduler has none.
        device: where to run, as workers name it.
        steps: of the sampling loop.
        bins: the timestep bins that everything is reported in: the paper's, whatever a model's own.
        memory: the memory mode of every pipeline.
    """

    reference: SourceModel
    items: Sequence[Item]
    seeds: Sequence[int]
    settings: SamplingSettings
    device: str
    steps: Sequence[Step]
    bins: Mapping[str, TimestepBins]
    memory: Memory = "resident"

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
        """With the steps that the reference's scheduler takes.

        Raises ModelError when it does not load, and for a modular pipeline, whose phases cannot be timed.
        """
        if reference.index.is_modular:
            raise ModelError(
                f"a {reference.index.class_name} has no methods whose time an evaluation could measure: measure its "
                "quality with tempoquant compare."
            )
        steps = sampling_steps(reference, settings)
        paper = Recipe.load("paper")
        bins = {}
        for name in reference.denoiser_names:
            timesteps = [float(step.timestep) for step in steps if step.denoiser == name]
            bins[name] = TimestepBins.from_step_fractions(timesteps, paper.bin_fractions_of(name))
        # Workers may run in another folder, where relative paths mean something else.
        items = [replace(item, image=item.image.resolve()) if isinstance(item.image, Path) else item for item in items]
        return cls(reference, items, seeds, settings, device, steps, bins, memory)

    @property
    def mapped_steps(self) -> set[int]:
        """The middle step of each timestep bin."""
        by_bin: dict[str, list[int]] = {}
        for index, step in enumerate(self.steps):
            by_bin.setdefault(self.bin_name(float(step.timestep)), []).append(index)
        return {indices[len(indices) // 2] for indices in by_bin.values()}

    @property
    def mapped_takes(self) -> set[tuple[str, int]]:
        """Ids and seeds of the generations whose transformer calls layer maps are made from."""
        return {(item.id, self.seeds[0]) for item in self.items[:NUM_MAPPED]}

    def bin_name(self, timestep: float) -> str:
        """Such as "high_noise bin 0", the cleanest of its denoiser."""
        name = denoiser_at(self.reference.denoisers, timestep).name
        return f"{name} bin {self.bins[name].of(timestep)}"

    @property
    def bin_names(self) -> list[str]:
        """Of every bin that a step falls into, in sampling order."""
        return list(dict.fromkeys(self.bin_name(float(step.timestep)) for step in self.steps))

    def takes(self, label: str) -> list[tuple[Item, Take]]:
        """Everything a model generates: all seeds of an item after each other."""
        return [(item, Take(label, item.id, seed)) for item in self.items for seed in self.seeds]
