"""The plan of a recording: prompts, settings, the calls of each denoiser, and the provenance."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tempoquant.calibrate.sample import GuidanceBranch
from tempoquant.calibrate.selection import select_calls
from tempoquant.calibrate.store import SampleStore
from tempoquant.calibrate.store_index import BRANCHES
from tempoquant.device import compute_dtype
from tempoquant.errors import CalibrationError, ModelError, SettingsError
from tempoquant.models.clips import clip_hash
from tempoquant.models.geometry import LatentGeometry
from tempoquant.models.prompt_needs import require_needed
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.schedule import Step, flow_shift_of, load_scheduler
from tempoquant.models.source import SourceModel
from tempoquant.prompts import Prompt, provenance
from tempoquant.recipe import Recipe

if TYPE_CHECKING:
    from tempoquant.models.lora.lora import LoraSum

CALIBRATION_NOISE = 2**31
"""Added to a run's seed for its calibration noise, so that videos generated with small seeds never
share it. torch's generator on the CPU reads the lowest 32 bits of a seed: a larger number would add
nothing.
"""

MIN_SAMPLES_PER_DENOISER = 32
VIDEO_TOKENS_PER_DENOISER = 2**20
"""The tokens recorded of each denoiser by default: a Hessian of 13,824 features then sees 75 tokens
a feature.
"""

_OVERRIDES = ("height", "width", "num_frames", "num_steps", "flow_shift", "guidance_scale")
"""The sampling settings that a recipe may change; None leaves the model's own."""

Calls = frozenset[tuple[int, GuidanceBranch]]
"""The kept calls of one prompt, as (step_index, guidance_branch)."""

Wanted = Mapping[int, Calls]
"""The index of each prompt to its calls; prompts without any are left out."""


@dataclass(frozen=True)
class ModelIdentity:
    """The model that the samples come from.

    Attributes:
        fingerprint: of its files, see `output_folder.fingerprint`.
        hub_id: None for a folder.
        revision: of the hub's snapshot; None for a folder.
    """

    fingerprint: str
    hub_id: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class RecordingPlan:
    """The content of a recording.

    Attributes:
        prompts: prompt i is sampled from noise of seed CALIBRATION_NOISE + seed + i.
        settings: of every generation.
        samples_per_denoiser: calls to keep of each denoiser; all, if there are fewer.
        seed: of the noise.
        loras: added to the denoisers' weights; samples from latents ignore them.
        from_latents: noise encoded videos to each timestep instead of sampling; no denoiser runs.

    Raises:
        CalibrationError: no prompts, or no samples wanted.
    """

    prompts: Sequence[Prompt]
    settings: SamplingSettings
    samples_per_denoiser: int
    seed: int = 0
    loras: Mapping[str, "LoraSum"] = field(default_factory=dict)
    from_latents: bool = False

    def __post_init__(self) -> None:
        if not self.prompts or self.samples_per_denoiser < 1:
            raise CalibrationError(
                f"{len(self.prompts)} prompts and {self.samples_per_denoiser} samples of each denoiser leave nothing "
                "to record: give at least one of each."
            )

        if not 0 <= self.seed < 2**32 - CALIBRATION_NOISE - len(self.prompts):
            raise SettingsError(f"a seed of calibration lies in 0 … 2^31 − {1 + len(self.prompts)}, not {self.seed}.")

    def num_branches(self, source: SourceModel) -> int:
        """Return the number of guidance branches of a step: calls of a denoiser, or rows of one
        call.
        """
        return source.family.num_branches(source.index, self.settings)


def require_prompts(source: SourceModel, plan: RecordingPlan) -> None:
    """Check that prompts hold everything that the recording needs.

    Raises:
        CalibrationError: a prompt lacks something.
        ModelError: the plan noises clips, and the model's calls cannot be made from them.
    """
    if not plan.from_latents:
        require_needed(source, plan.prompts)
        return
    if source.family.noised_calls is None:
        raise ModelError(
            f"a {source.index.class_name} cannot be calibrated on clips alone, which lack what else it is conditioned "
            "on: leave --from-latents out."
        )
    for prompt in plan.prompts:
        if prompt.image is None and prompt.video is None:
            raise CalibrationError(
                f"prompt {prompt.id!r} has neither a video nor an image, so that there is nothing to encode: give it "
                "one of them."
            )


def resolve_recipe(recipe: Recipe, own: SamplingSettings, geometry: LatentGeometry) -> Recipe:
    """Fill in the sampling settings that the recipe leaves to the model, and the number of
    samples.
    """
    if not recipe.needs_calibration:
        return recipe
    settings = calibration_settings(recipe, own)
    filled = {key: getattr(settings, key) for key in _OVERRIDES}
    return recipe.replace(
        **filled, samples_per_denoiser=recipe.samples_per_denoiser or default_samples_per_denoiser(settings, geometry)
    )


def calibration_settings(recipe: Recipe, own: SamplingSettings) -> SamplingSettings:
    """Return the model's own sampling settings with the recipe's changes. Raises SettingsError."""
    return own.replace(**{key: getattr(recipe, key) for key in _OVERRIDES})


def stored_settings(store: SampleStore) -> SamplingSettings:
    """Return the sampling settings of a store. Raises CalibrationError for settings that no model
    can run.
    """
    try:
        return SamplingSettings.from_dict(store.settings)
    except (TypeError, SettingsError) as error:
        raise CalibrationError(f"{store.folder} has settings that no recording has ({error}): record again.") from error


def default_samples_per_denoiser(settings: SamplingSettings, geometry: LatentGeometry) -> int:
    """Return as many calls as hold about a million video tokens, and at least 32: 33 at 480×832 and
    81 frames.
    """
    num_tokens = geometry.num_tokens(settings.height, settings.width, settings.num_frames)
    return max(MIN_SAMPLES_PER_DENOISER, math.ceil(VIDEO_TOKENS_PER_DENOISER / num_tokens))


def wanted_calls(source: SourceModel, plan: RecordingPlan, steps: Sequence[Step]) -> Wanted:
    """Choose the calls of each denoiser by prompt. Raises CalibrationError if a denoiser has no
    step.
    """
    wanted: dict[int, set[tuple[int, GuidanceBranch]]] = {}
    num_branches = plan.num_branches(source)
    for denoiser in source.denoiser_names:
        own = [index for index, step in enumerate(steps) if step.denoiser == denoiser]
        if not own:
            raise CalibrationError(
                f"none of {len(steps)} steps with flow shift {plan.settings.flow_shift} belongs to "
                f"{denoiser}: calibrate with more steps or another flow shift."
            )
        for call in select_calls(len(own), len(plan.prompts), num_branches, plan.samples_per_denoiser):
            wanted.setdefault(call.prompt, set()).add((own[call.step], BRANCHES[call.branch]))
    return {index: frozenset(calls) for index, calls in sorted(wanted.items())}


def plan_provenance(source: SourceModel, plan: RecordingPlan, model: ModelIdentity, device: str) -> dict[str, Any]:
    """Return the provenance for store.json; the same plan, model and dtype give the same."""
    scheduler = load_scheduler(source, plan.settings.flow_shift)
    loras = {} if plan.from_latents else {denoiser: lora.sha256 for denoiser, lora in plan.loras.items()}
    return {
        "model": dataclasses.asdict(model),
        "scheduler": {"class": type(scheduler).__name__, "flow_shift": flow_shift_of(scheduler)},
        "settings": plan.settings.to_dict(),
        "seed": plan.seed,
        "compute_dtype": str(compute_dtype(device)).removeprefix("torch."),
        "from_latents": plan.from_latents,
        "prompts": provenance(plan.prompts),
        "videos": _video_hashes(plan),
        "loras": loras,
    }


def _video_hashes(plan: RecordingPlan) -> dict[str, str]:
    """Return the hash of every clip that samples are made of, by its prompt and its name."""
    if plan.from_latents:
        return {prompt.id: clip_hash(prompt.video) for prompt in plan.prompts if prompt.video is not None}
    return {f"{p.id}, {name}": clip_hash(clip) for p in plan.prompts for name, clip in sorted(p.clips.items())}
