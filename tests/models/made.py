"""A pipeline with all that is made of it: what the tests of every model family ask questions of."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tempoquant.calibrate.sample import RecordedCall
from tempoquant.evaluate.compare import Evidence, Task, compare
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.hosts.diffusers.sampling import record_trajectory
from tempoquant.models.sampling_file import default_settings
from tempoquant.models.source import SourceModel
from tempoquant.models.with_experts import ModelName
from tempoquant.prompts import Prompt
from tempoquant.quantizing import quantize
from tempoquant.recipe import Recipe

RTN = Recipe.load("rtn")
PAPER = Recipe.load("paper").replace(rank=4, num_prompts=2, samples_per_denoiser=8, bin_fractions=(0.3, 0.7))
DEFAULT = Recipe.load("default").replace(rank=4, num_prompts=2, samples_per_denoiser=8)


@dataclass(frozen=True)
class Made:
    """One pipeline with all that was made of it.

    Attributes:
        source: in 16 bits.
        prompt: held out from calibration.
        calls: of the source, for that prompt.
        folders: by the recipe's name.
        evidence: the comparison of all of these with the source.
    """

    source: SourceModel
    prompt: Prompt
    calls: list[RecordedCall]
    folders: dict[str, Path]
    evidence: Evidence


def make(folder: Path, model: ModelName, held_out: Prompt, calibration: Path, recipes: Sequence[Recipe]) -> Made:
    """Record the model for a prompt, quantize it by each recipe into `folder`, and compare."""
    source = SourceModel.open(model)
    settings = default_settings(source)
    calls = record_trajectory(load_pipeline(source, "cpu"), held_out, settings, 0)
    folders = {}
    for recipe in recipes:
        seen = calibration if recipe.needs_calibration else None
        folders[recipe.name] = quantize(model, folder / recipe.name, recipe, calibration=seen)
    models = {label: SourceModel.open(made) for label, made in folders.items()}
    return Made(source, held_out, calls, folders, compare(source, models, Task([held_out], settings), "cpu"))
