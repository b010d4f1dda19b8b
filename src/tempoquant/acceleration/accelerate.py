"""`tempoquant.accelerate`: attention kernels, a step cache and compiled blocks for a pipeline, as
one mode.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from tempoquant.acceleration.attention import NATIVE, AttentionChoice, capability_of, choose_attention, use_attention
from tempoquant.acceleration.cache_settings import CacheName, CacheSettings, skipped_steps
from tempoquant.acceleration.choices import Choices
from tempoquant.acceleration.compiling import compile_blocks
from tempoquant.acceleration.speeds import DEFAULTS, Speed
from tempoquant.acceleration.step_cache import StepCache, require_cacheable
from tempoquant.checkpoint.magnitude_ratios import MagnitudeRatios
from tempoquant.checkpoint.schema import ComponentConfig
from tempoquant.errors import UnsupportedError
from tempoquant.models.families import PipelineFacts, facts_of

_ATTRIBUTE = "_tempoquant_acceleration"


@dataclass
class Acceleration:
    """The acceleration in force on a pipeline.

    Attributes:
        speed: "exact", "fast" or "fastest".
        attention: diffusers' backend, the reason, and better ones that are not installed.
        cache: the step cache, or None.
        is_compiled: whether blocks are compiled.
        why: a sentence for each choice.
        expected: the expected effects, a sentence each, with the word "counted" or "not measured".
    """

    speed: Speed
    attention: AttentionChoice
    cache: StepCache | None
    is_compiled: bool
    why: tuple[str, ...]
    expected: tuple[str, ...]
    _undo: ExitStack = field(repr=False)

    def remove(self) -> None:
        """Restore the pipeline, bit for bit. A second call changes nothing."""
        self._undo.close()

    def calls_in_words(self) -> str:
        """Return how many calls skipped their blocks so far, as a sentence with a space before it;
        "" without any.
        """
        counts = [] if self.cache is None else list(self.cache.counts.values())
        skipped, computed = sum(each.skipped for each in counts), sum(each.computed for each in counts)
        return f" {skipped} of {skipped + computed} denoiser calls skipped their blocks." if skipped else ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "speed": self.speed,
            "attention": self.attention.backend,
            "missing": list(self.attention.missing),
            "cache": None if self.cache is None else str(self.cache.settings),
            "compiled": self.is_compiled,
            "calls": None if self.cache is None else {n: asdict(each) for n, each in self.cache.counts.items()},
            "why": list(self.why),
            "expected": list(self.expected),
        }

    def __str__(self) -> str:
        return "\n".join((*self.why, *self.expected))


def accelerate(
    pipeline: Any,
    speed: Speed = "exact",
    *,
    attention: str | None = None,
    cache: CacheName | CacheSettings | str | None = None,
    compile: bool | None = None,
    magnitude_ratios: Mapping[str, MagnitudeRatios] | None = None,
) -> Acceleration:
    """Make a pipeline's videos faster. Call it when the pipeline is on its device, after
    `set_memory_mode`.

    Args:
        pipeline: 16-bit or quantized, of a family that TempoQuant knows.
        speed: "exact" computes every step with 16-bit attention; "fast" and "fastest" skip steps
            and use 8-bit attention if it is installed. docs/speed.md gives their cost.
        attention: a backend of diffusers in place of the choice by speed and GPU.
        cache: "magcache", "firstblock", "taylorseer", or settings of one, in place of the speed's;
            "none" for none.
        compile: whether blocks are compiled; by default on a GPU, in "fast" and "fastest", if
            nothing forbids it.
        magnitude_ratios: denoiser to its recorded ratios, for a pipeline whose checkpoint has none.

    Returns:
        The choices, their reasons, and the expected effects. Its `remove()` restores the pipeline;
        another call does so first.

    Raises:
        SettingsError: there is no such speed, cache or attention backend.
        UnsupportedError: the pipeline, memory mode or machine does not support a named choice.
    """
    facts = facts_of(pipeline)
    choices = Choices(speed, attention, cache, compile)
    if (before := acceleration_of(pipeline)) is not None:
        before.remove()
    device = pipeline._execution_device
    mode = getattr(getattr(pipeline, "_tempoquant_memory_mode", None), "mode", None)
    choices.require_possible(mode)
    chosen = choose_attention(speed, facts.family, capability_of(device), attention)
    why = [f"Speed {speed}: {DEFAULTS[speed].meaning}.", f"Attention {chosen.backend}: {chosen.reason}."]
    why += [f"Not installed, and better: {each}." for each in chosen.missing]
    settings = choices.cache
    ratios = {**recorded_ratios(pipeline, facts), **(magnitude_ratios or {})}
    if settings is not None:
        require_cacheable(pipeline, facts, settings)
        require_recorded(settings, [denoiser.name for denoiser in facts.denoisers], ratios)
    compiles, reason = choices.compiling(device.type, mode, _has_plain_blocks(pipeline, facts))
    why.append(f"{'Blocks compiled' if compiles else 'Not compiled'}: {reason}.")
    why.append("No step cache." if settings is None else f"Cache of steps: {settings}.")
    with ExitStack() as undo:
        undo.callback(setattr, pipeline, _ATTRIBUTE, None)
        if chosen.backend != NATIVE or attention is not None:
            undo.enter_context(use_attention(pipeline, facts, chosen.backend))
        if compiles:
            undo.enter_context(compile_blocks(pipeline, facts))
        in_force = None if settings is None else StepCache(pipeline, settings, ratios)
        if in_force is not None:
            undo.callback(in_force.remove)
        expected = _expected(settings, ratios, chosen, compiles)
        found = Acceleration(speed, chosen, in_force, compiles, tuple(why), expected, undo.pop_all())
    setattr(pipeline, _ATTRIBUTE, found)
    return found


def accelerate_by(pipeline: Any, choices: Choices) -> Acceleration:
    """Apply the choices. Raises as `accelerate`."""
    return accelerate(
        pipeline, choices.speed, attention=choices.attention, cache=choices.asked_cache, compile=choices.asked_compile
    )


def acceleration_of(pipeline: Any) -> Acceleration | None:
    """Return the acceleration in force on a pipeline; None for none."""
    return getattr(pipeline, _ATTRIBUTE, None)


def recorded_ratios(pipeline: Any, facts: PipelineFacts) -> dict[str, MagnitudeRatios]:
    """Return the recorded ratios in the denoisers' checkpoints."""
    found = {}
    for denoiser in facts.denoisers:
        quantizer = getattr(getattr(pipeline, denoiser.component), "hf_quantizer", None)
        component = getattr(quantizer, "component", None)
        if isinstance(component, ComponentConfig) and component.magnitude_ratios is not None:
            found[denoiser.name] = component.magnitude_ratios
    return found


def require_recorded(settings: CacheSettings, denoisers: Iterable[str], ratios: Mapping[str, MagnitudeRatios]) -> None:
    """Raise UnsupportedError for MagCache without the ratios that it needs."""
    for name in denoisers if settings.name == "magcache" else ():
        if name not in ratios:
            raise UnsupportedError(
                f"MagCache needs magnitude ratios, which a recording measures, and {name} has none: quantize "
                "anew from samples that this version records (tempoquant record … --overwrite), or choose "
                "--cache firstblock, taylorseer or none."
            )


def _has_plain_blocks(pipeline: Any, facts: PipelineFacts) -> bool:
    models = [getattr(pipeline, denoiser.component) for denoiser in facts.denoisers]
    return not any(
        "forward" in model.get_submodule(block).__dict__ for model in models for block in facts.family.blocks_of(model)
    )


def _expected(
    settings: CacheSettings | None, ratios: Mapping[str, MagnitudeRatios], attention: AttentionChoice, compiles: bool
) -> tuple[str, ...]:
    """Return the expected effects, in sentences."""
    sentences = []
    if settings is not None and settings.name == "magcache":
        lists = [skipped_steps(own, settings) for each in ratios.values() for own in each.by_branch.values()]
        num_calls, num_skipped = sum(map(len, lists)), sum(map(sum, lists))
        sentences.append(
            f"On the recorded schedule {num_skipped} of {num_calls} denoiser calls skip their blocks: denoising "
            f"is at most {num_calls / (num_calls - num_skipped):.2f} times as fast (counted)."
        )
    elif settings is not None:
        sentences.append(f"Only a run shows how many steps {settings.name} skips (not measured here).")
    if attention.backend != NATIVE or compiles:
        sentences.append(f"The gain of {attention.backend}{' and compiling' if compiles else ''} is not measured yet.")
    return tuple(sentences)
