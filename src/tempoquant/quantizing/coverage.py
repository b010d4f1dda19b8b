"""A check that calibration samples reach every timestep bin, before any of them is recorded."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tempoquant.calibrate.store import SampleStore
from tempoquant.errors import CalibrationError
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.schedule import sampling_steps
from tempoquant.models.source import SourceModel
from tempoquant.prompts import Prompt
from tempoquant.recipe import Recipe
from tempoquant.recording.plan import RecordingPlan, wanted_calls
from tempoquant.timesteps import TimestepBins


class SampleAt(NamedTuple):
    """The timestep and guidance branch of a sample, recorded or planned."""

    timestep: float
    guidance_branch: str


class Coverage(NamedTuple):
    """The schedule and the samples of a calibration.

    Attributes:
        schedule: every timestep of each denoiser, falling.
        samples: of each denoiser.
    """

    schedule: Mapping[str, Sequence[float]]
    samples: Mapping[str, Sequence[SampleAt]]


def check_coverage(recipe: Recipe, coverage: Coverage) -> None:
    """Raise CalibrationError if samples leave a timestep bin without a clip ratio, or statistics
    without a sample.
    """
    for denoiser, samples in coverage.samples.items():
        bins = TimestepBins.from_step_fractions(coverage.schedule[denoiser], recipe.bin_fractions_of(denoiser))
        missing = set(range(bins.num_bins)) - {bins.of(sample.timestep) for sample in samples}
        if missing and recipe.clip_ratios:
            raise CalibrationError(
                f"{len(samples)} samples of {denoiser} leave {len(missing)} of its {bins.num_bins} timestep bins "
                "without any: calibrate on more samples per denoiser, or more steps, or use fewer bins."
            )
        if all(each.guidance_branch != "conditional" for each in samples) and recipe.statistics_branches != "both":
            raise CalibrationError(
                f"none of {len(samples)} samples of {denoiser} is of the conditional branch, the only one that "
                "this recipe's statistics see: calibrate on more samples per denoiser."
            )


def stored(store: SampleStore) -> Coverage:
    """Return the coverage of recorded samples."""
    samples = {
        name: [SampleAt(entry.timestep, entry.guidance_branch) for entry in store.entries(name)]
        for name in store.denoisers
    }
    return Coverage({name: store.schedule(name) for name in store.denoisers}, samples)


def planned(source: SourceModel, recipe: Recipe, settings: SamplingSettings, prompts: Sequence[Prompt]) -> Coverage:
    """Return the coverage of the samples that this resolved recipe will record. Raises
    CalibrationError if a denoiser has no step.
    """
    assert recipe.samples_per_denoiser is not None  # resolve_recipe filled it in
    steps = sampling_steps(source, settings)
    plan, names = RecordingPlan(prompts, settings, recipe.samples_per_denoiser), source.denoiser_names
    samples: dict[str, list[SampleAt]] = {name: [] for name in names}
    for calls in wanted_calls(source, plan, steps).values():
        for step_index, branch in calls:
            step = steps[step_index]
            samples[step.denoiser].append(SampleAt(float(step.timestep), branch))
    schedule = {name: [float(step.timestep) for step in steps if step.denoiser == name] for name in names}
    return Coverage(schedule, samples)
