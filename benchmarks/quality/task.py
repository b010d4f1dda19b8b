"""The task of every row: the same calibration samples, the same held-out generations, in one
place.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tempoquant.device import compute_dtype
from tempoquant.errors import CalibrationError, RecipeError
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.source import SourceModel
from tempoquant.prompts import Prompt, check_disjoint, provenance
from tempoquant.recipe import Recipe

EVALUATION_SEED = 1_000_000
"""Added to a held-out generation's seed; calibration draws from seeds above 2^31."""
SEED_STRIDE = 1000
"""The distance between two seeds of the benchmark: prompt i of a set takes noise i of its seed."""

RESULT_VERSION = 1
"""The version of the measurements and their storage: a new one invalidates every earlier result."""

_SAMPLING = ("height", "width", "num_frames", "num_steps", "flow_shift", "guidance_scale")


@dataclass(frozen=True)
class Task:
    """One model and its treatment.

    Attributes:
        source: the 16-bit pipeline.
        fingerprint: of its files.
        settings: of every generation, of calibration and of evaluation.
        calibration: prompts to calibrate on.
        held_out: prompts to judge on.
        samples_per_denoiser: calibration samples kept of each denoiser.
        device: of the computation.

    Raises:
        CalibrationError: a prompt is in both sets, a set is empty, or one has more prompts than a
            seed has noise for.
    """

    source: SourceModel
    fingerprint: str
    settings: SamplingSettings
    calibration: Sequence[Prompt]
    held_out: Sequence[Prompt]
    samples_per_denoiser: int
    device: str = "cpu"

    def __post_init__(self) -> None:
        for prompts in (self.calibration, self.held_out):
            if not 0 < len(prompts) <= SEED_STRIDE:
                raise CalibrationError(f"a set has 1 to {SEED_STRIDE} prompts, not {len(prompts)}.")
        check_disjoint(self.held_out, provenance(self.calibration))

    def calibration_seed(self, seed: int) -> int:
        """Return the seed of a recording plan."""
        return SEED_STRIDE * seed

    def evaluation_seed(self, seed: int, index: int) -> int:
        """Return the seed of the generation of held-out prompt `index`."""
        return EVALUATION_SEED + SEED_STRIDE * seed + index

    def identity(self) -> dict[str, Any]:
        """Return the facts that make another task the same, as plain values."""
        return {
            "model": self.fingerprint,
            "settings": self.settings.to_dict(),
            "calibration": provenance(self.calibration),
            "held_out": provenance(self.held_out),
            "samples_per_expert": self.samples_per_denoiser,
            "compute_dtype": str(compute_dtype(self.device)),
            "noise": [EVALUATION_SEED, SEED_STRIDE],
        }

    def resolve(self, recipe: Recipe) -> Recipe:
        """Return the recipe with this task's calibration samples filled in.

        Raises RecipeError if it asks for other samples: rows must share theirs.
        """
        if not recipe.needs_calibration:
            return recipe
        own = {key: getattr(self.settings, key) for key in _SAMPLING}
        for key, value in own.items():
            if getattr(recipe, key) not in (None, value):
                raise RecipeError(
                    f"recipe {recipe.name} calibrates with {key} = {getattr(recipe, key)}, all other rows with {value}."
                )
        return recipe.replace(**own, num_prompts=len(self.calibration), samples_per_denoiser=self.samples_per_denoiser)


def hash_of(record: Any) -> str:
    """Return the first 24 digits of the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:24]


def changed_settings(recipe: Recipe) -> Mapping[str, Any]:
    """Return a recipe's settings that differ from their defaults, as plain values, without its
    name.

    A setting that a later version adds does not change recipes without it.
    """
    now, defaults = recipe.to_dict(), Recipe(name=recipe.name).to_dict()  # without None
    return {key: now.get(key) for key in now.keys() | defaults.keys() if now.get(key) != defaults.get(key)}


def key_of(task: Task, recipe: Recipe | None, seed: int, eight_bit_timesteps: tuple[float, float] | None = None) -> str:
    """Return the name of one row's and seed's result: the same for the same task, seed and recipe,
    whatever the recipe's name.
    """
    settings = None if recipe is None else changed_settings(task.resolve(recipe))
    eight_bits = {} if eight_bit_timesteps is None else {"eight_bit_timesteps": repr(eight_bit_timesteps)}
    return hash_of({**task.identity(), "recipe": settings, "seed": seed, "version": RESULT_VERSION, **eight_bits})
