"""Record calibration samples: run the 16-bit pipeline on the calibration prompts and keep its transformer calls."""

from collections.abc import Sequence

from diffusers import WanImageToVideoPipeline

from tempoquant.calibrate.sample import CalibrationSet
from tempoquant.integrations.sampling import SamplingSettings, record_trajectory
from tempoquant.progress import SILENT, Progress
from tempoquant.prompts import Prompt
from tempoquant.recipe import Recipe

_OVERRIDES = ("height", "width", "num_frames", "num_steps", "flow_shift")  # a recipe may change these, else None

CALIBRATION_NOISE = 2**40
"""Added to a run's seed for its calibration noise, so that videos generated with small seeds are never seen before."""


def resolve_recipe(recipe: Recipe, own: SamplingSettings) -> Recipe:
    """The recipe with every sampling setting it left to the model filled in."""
    if not recipe.needs_calibration:
        return recipe
    settings = calibration_settings(recipe, own)
    return recipe.replace(**{key: getattr(settings, key) for key in _OVERRIDES})


def calibration_settings(recipe: Recipe, own: SamplingSettings) -> SamplingSettings:
    """The model's own sampling settings, with what the recipe changes. Raises SettingsError."""
    return own.replace(**{key: getattr(recipe, key) for key in _OVERRIDES})


def record_calibration(
    pipeline: WanImageToVideoPipeline,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    settings: SamplingSettings,
    seed: int,
    progress: Progress = SILENT,
) -> CalibrationSet:
    """Sample every prompt without guidance, and the first few with it where the recipe searches clip ratios.

    Prompt i is sampled from the same noise in both cases, drawn with a seed that no evaluation uses.
    """
    searched = prompts[: recipe.clip_search_num_prompts] if recipe.clip_ratios else []
    advance = progress.start("Recording calibration samples", settings.num_steps * (len(prompts) + len(searched)))
    samples = CalibrationSet()
    noise_seed = CALIBRATION_NOISE + seed
    unguided = settings.replace(guidance_scale=1.0)
    for offset, prompt in enumerate(prompts):
        samples.statistics.extend(record_trajectory(pipeline, prompt, unguided, noise_seed + offset, advance))
    for offset, prompt in enumerate(searched):
        samples.clip_search.extend(record_trajectory(pipeline, prompt, settings, noise_seed + offset, advance))
    return samples
