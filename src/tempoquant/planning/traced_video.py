"""The computation of a video, traced once for all GPUs: its calls of denoisers, texts,
autoencoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tempoquant.acceleration.cache_settings import CacheSettings, skipped_steps
from tempoquant.acceleration.speeds import DEFAULTS, Speed
from tempoquant.checkpoint.magnitude_ratios import BRANCHES
from tempoquant.models.pipeline_configs import PipelineConfigs
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.planning.call_work import TracedDenoiser, trace_denoiser
from tempoquant.planning.generation_memory import QuantizedLayers, foreseen_layers
from tempoquant.planning.memory_plan import own_layers
from tempoquant.planning.other_work import OtherWork, other_work
from tempoquant.recipe import Recipe
from tempoquant.timesteps import NUM_TRAIN_TIMESTEPS, denoiser_at

FEWEST_STEPS_TO_ASSUME = 20
"""Steps of the measurement on the bundled model: with fewer, neighbours differ more, and no step is
assumed to be left out."""


@dataclass(frozen=True)
class TracedVideo:
    """The computation of one video.

    Attributes:
        configs: of the pipeline.
        size: of the video, its steps and its guidance.
        layers: the 4-bit layers of each denoiser, its own or those that a recipe would give it;
            None where it has none.
        shares_inputs: whether 4-bit linears that read one tensor quantize it once.
        denoisers: one call of each, in 16 bits.
        others: all else.
    """

    configs: PipelineConfigs
    size: SamplingSettings
    layers: Mapping[str, QuantizedLayers | None]
    shares_inputs: bool
    denoisers: Mapping[str, TracedDenoiser]
    others: OtherWork

    @property
    def num_branches(self) -> int:
        """Return how many branches guidance has, each a call a step, or a row of one."""
        return self.configs.family.num_branches(self.configs.index, self.size)


def trace_video(configs: PipelineConfigs, size: SamplingSettings, recipe: Recipe) -> TracedVideo:
    """Trace a video.

    Args:
        configs: of a 16-bit pipeline, or of a quantized one, whose own layers are then taken.
        recipe: what a 16-bit pipeline would be quantized with.

    Raises:
        ModelError: a config describes no model of its class.
        RecipeError: the recipe does not fit the model.
        SettingsError: the model makes no videos of that size.
    """
    configs.geometry.require(size)
    layers = own_layers(configs)
    if not configs.quantized:
        layers = {name: foreseen_layers(configs, name, recipe) for name in layers}
    own = next((each.recipe for each in configs.quantized.values()), recipe)
    traced: dict[str, TracedDenoiser] = {}
    for name in layers:  # those that are alike, as Wan2.2's two, are traced once
        alike = next((each for each in traced if configs.denoiser(each) == configs.denoiser(name)), None)
        traced[name] = trace_denoiser(configs, name, size) if alike is None else traced[alike]
    text_format = configs.text_encoder_format if configs.quantized else recipe.text_encoder
    others = other_work(configs, size, text_format)
    return TracedVideo(configs, size, layers, own.share_smoothing, traced, others)


@dataclass(frozen=True)
class CallCounts:
    """Calls of one denoiser in a video, those of all branches of guidance.

    Attributes:
        computed: whole.
        skipped: without their blocks, by a cache.
    """

    computed: float
    skipped: float


def counts_of(video: TracedVideo, speed: Speed) -> tuple[dict[str, CallCounts], str]:
    """Return the calls of each denoiser at a speed, and where the number of skipped ones is from,
    as a sentence.

    The schedule is flow matching's: evenly spaced noise, shifted by the flow shift.
    """
    configs, cache = video.configs, DEFAULTS[speed].cache
    if cache is not None and not configs.family.skippable_blocks:
        cache = None
    steps: dict[str, list[float]] = {name: [] for name in video.denoisers}
    for timestep in _timesteps(video.size):
        steps[denoiser_at(configs.denoisers, timestep).name].append(timestep)
    counts, is_counted = {}, True
    for name, own in steps.items():
        num_calls = len(own) * video.num_branches
        recorded = _recorded(video, name, own, cache)
        is_counted = is_counted and recorded is not None
        skipped = num_calls * _assumed(video, speed) if recorded is None else recorded
        counts[name] = CallCounts(num_calls - skipped, skipped)
    return counts, _sentence(video, speed, cache, is_counted)


def _assumed(video: TracedVideo, speed: Speed) -> float:
    """Return the share of calls that are left out of a model of which nothing was recorded."""
    return DEFAULTS[speed].skipped_on_tiny if video.size.num_steps >= FEWEST_STEPS_TO_ASSUME else 0.0


def _recorded(video: TracedVideo, name: str, own: list[float], cache: CacheSettings | None) -> float | None:
    """Count the calls that a cache leaves out by what was recorded of the denoiser; None where
    nothing was.
    """
    if cache is None:
        return 0.0
    found = video.configs.quantized.get(name)
    ratios = None if found is None else found.magnitude_ratios
    if ratios is None:
        return None
    branches = BRANCHES[: video.num_branches]
    return float(sum(sum(skipped_steps(ratios.at(branch, own), cache)) for branch in branches))


def _sentence(video: TracedVideo, speed: Speed, cache: CacheSettings | None, is_counted: bool) -> str:
    if DEFAULTS[speed].cache is None:
        return "Every step is computed."
    if cache is None:
        return "Every step is computed: a cache of steps does not suit this model's blocks."
    if is_counted:
        return "Steps are skipped by the magnitude ratios that were recorded of this model."
    if not _assumed(video, speed):
        return (
            f"Every step is computed: of fewer than {FEWEST_STEPS_TO_ASSUME} steps none is assumed to be skipped, and "
            "nothing was recorded of this model."
        )
    return (
        f"{_assumed(video, speed):.0%} of the denoiser calls are skipped: an assumption, since it was so on "
        "the bundled model, and nothing was recorded of this one."
    )


def _timesteps(size: SamplingSettings) -> list[float]:
    """Return the steps' timesteps, 0 clean … 1000 noise, falling."""
    num_steps, shift = size.num_steps, 1.0 if size.flow_shift is None else size.flow_shift
    sigmas = [1 - step / num_steps for step in range(num_steps)]
    shifted = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas]
    return [NUM_TRAIN_TIMESTEPS * sigma for sigma in (shifted if size.sigmas is None else size.sigmas)]
