"""Whether calibration samples reach every timestep bin, known before any of them is recorded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tempoquant.calibrate.store import SampleStore
from tempoquant.errors import CalibrationError
from tempoquant.integrations.recording_plan import RecordingPlan, wanted_calls
from tempoquant.integrations.sampling import SamplingSettings
from tempoquant.integrations.schedule import sampling_steps
from tempoquant.prompts import Prompt
from tempoquant.recipe import Recipe
from tempoquant.timesteps import Expert, TimestepBins


class SampleAt(NamedTuple):
    """When a sample was, or will be, recorded, and in which branch of guidance."""

    timestep: float
    guidance_branch: str


class Coverage(NamedTuple):
    """schedule: every timestep of each expert, falling. samples: of each expert."""

    schedule: Mapping[Expert, Sequence[float]]
    samples: Mapping[Expert, Sequence[SampleAt]]


def check_coverage(recipe: Recipe, coverage: Coverage) -> None:
    """Raise CalibrationError when samples leave a timestep bin without a clip ratio, or statistics without a sample."""
    for expert in Expert:
        samples = coverage.samples[expert]
        bins = TimestepBins.from_step_fractions(coverage.schedule[expert], recipe.bin_fractions(expert))
        missing = set(range(bins.num_bins)) - {bins.of(sample.timestep) for sample in samples}
        if missing and recipe.clip_ratios:
            raise CalibrationError(
                f"{len(samples)} samples of {expert.value} leave {len(missing)} of its {bins.num_bins} timestep bins "
                "without any: calibrate on more samples per expert, or more steps, or use fewer bins."
            )
        if all(each.guidance_branch != "conditional" for each in samples) and recipe.statistics_branches != "both":
            raise CalibrationError(
                f"none of {len(samples)} samples of {expert.value} is of the conditional branch, the only one that "
                "this recipe's statistics see: calibrate on more samples per expert."
            )


def stored(store: SampleStore) -> Coverage:
    """Of samples that are there."""
    samples = {e: [SampleAt(entry.timestep, entry.guidance_branch) for entry in store.entries(e)] for e in Expert}
    return Coverage({expert: store.schedule(expert) for expert in Expert}, samples)


def planned(source: Path, recipe: Recipe, settings: SamplingSettings, prompts: Sequence[Prompt]) -> Coverage:
    """Of samples that this recipe, resolved, will record. Raises CalibrationError when an expert has no step."""
    assert recipe.samples_per_expert is not None  # resolve_recipe filled it in
    steps = sampling_steps(source, settings.num_steps, settings.flow_shift)
    samples: dict[Expert, list[SampleAt]] = {expert: [] for expert in Expert}
    for calls in wanted_calls(RecordingPlan(prompts, settings, recipe.samples_per_expert), steps).values():
        for step_index, branch in calls:
            step = steps[step_index]
            samples[step.expert].append(SampleAt(float(step.timestep), branch))
    schedule = {expert: [float(step.timestep) for step in steps if step.expert is expert] for expert in Expert}
    return Coverage(schedule, samples)
