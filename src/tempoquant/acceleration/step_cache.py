"""diffusers' step caches on a pipeline of several denoisers: each denoiser and guidance branch has
its own state.

diffusers keeps a state for each `cache_context` of each model. It never resets one at the boundary
between denoisers or after an interrupted video, and it gives both guidance branches one list of
MagCache's ratios. This module does both before each call of a denoiser.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks.hooks import HookRegistry, StateManager
from torch import nn

from tempoquant.acceleration.cache_settings import CacheSettings
from tempoquant.checkpoint.magnitude_ratios import NOT_RECORDED, MagnitudeRatios
from tempoquant.errors import UnsupportedError
from tempoquant.models.families import PipelineFacts, facts_of
from tempoquant.models.family import ModelFamily, PipelineIndex
from tempoquant.models.hooks import own_forward, unobtrusive
from tempoquant.models.host_timesteps import HostTimesteps
from tempoquant.timesteps import denoiser_at

_BRANCHES = {"cond": "conditional", "uncond": "unconditional"}
"""The guidance branches by their names in pipelines' `cache_context`."""


@dataclass
class CallCounts:
    """Calls of one denoiser: `computed` whole, `skipped` with the cached output of an earlier
    one.
    """

    computed: int = 0
    skipped: int = 0


@dataclass
class _Cached:
    """One denoiser under a cache.

    Attributes:
        config: diffusers', which MagCache's hooks read at every call.
        managers: of the hooks' states.
        last: timestep of the latest call, by guidance branch.
    """

    name: str
    model: Any
    config: Any
    managers: list[StateManager]
    counts: CallCounts = field(default_factory=CallCounts)
    last: dict[str, float] = field(default_factory=dict)

    @property
    def context(self) -> str:
        """Return the pipeline's name of the running guidance branch."""
        context = self.managers[0]._context
        return "inference" if context is None else context.name

    def forget(self) -> None:
        """Reset the state in the current context."""
        for manager in self.managers:
            context = manager._context
            manager.reset()
            manager.set_context(context)
        self.last.clear()

    def count(self) -> None:
        """Count the call that has just ended."""
        state = self.managers[0]._state_cache[self.context]
        if hasattr(state, "should_compute"):
            is_computed = bool(state.should_compute)
        else:  # TaylorSeer's
            is_computed = state.last_update_step == state.current_step
        self.counts.computed += is_computed
        self.counts.skipped += not is_computed


class StepCache:
    """A step cache in force on a pipeline.

    Attributes:
        settings: the cache and its settings.
    """

    def __init__(self, pipeline: Any, settings: CacheSettings, ratios: Mapping[str, MagnitudeRatios]) -> None:
        """Enable the cache.

        Args:
            ratios: denoiser to its recorded ratios; MagCache computes every step of denoisers
                without any.

        Raises:
            UnsupportedError: as `require_cacheable`.
        """
        facts = facts_of(pipeline)
        require_cacheable(pipeline, facts, settings)
        self.settings, self._pipeline, self._facts, self._ratios = settings, pipeline, facts, dict(ratios)
        self._timesteps = HostTimesteps(pipeline, facts.family)
        self._running: _Cached | None = None
        self._known: dict[tuple[str, str, tuple[float, ...]], list[float]] = {}
        self._denoisers: list[_Cached] = []
        with ExitStack() as undo:
            for denoiser in facts.denoisers:
                model = getattr(pipeline, denoiser.component)
                config = _config(settings)
                model.enable_cache(config)
                undo.callback(_disable, model)
                cached = _Cached(denoiser.name, model, config, _managers(model))
                self._denoisers.append(cached)
                before = unobtrusive(lambda _model, _args, inputs, each=cached: self._begin(each, inputs))
                undo.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
                after = unobtrusive(lambda _model, _args, _output, each=cached: each.count())
                undo.callback(model.register_forward_hook(after).remove)
            self._undo = undo.pop_all()

    @property
    def counts(self) -> dict[str, CallCounts]:
        """Return each denoiser's calls so far, over all videos."""
        return {each.name: each.counts for each in self._denoisers}

    def remove(self) -> None:
        """Restore the pipeline."""
        self._undo.close()

    def _begin(self, cached: _Cached, inputs: Mapping[str, Any]) -> None:
        """Begin a denoiser's call: reset states of another denoiser's part of the video, or of
        another video.
        """
        timestep = self._timesteps.of(inputs)
        if self._running is not cached:
            if self._running is not None:
                self._running.forget()
            cached.forget()
            self._running = cached
        if timestep >= cached.last.get(cached.context, float("inf")):  # a trajectory's timesteps fall
            cached.forget()
        cached.last[cached.context] = timestep
        if self.settings.name == "magcache":
            ratios = self._ratios_of(cached)
            cached.config.mag_ratios, cached.config.num_inference_steps = ratios, len(ratios)

    def _ratios_of(self, cached: _Cached) -> list[float]:
        schedule = tuple(self._timesteps.schedule())
        own = [each for each in schedule if denoiser_at(self._facts.denoisers, each).name == cached.name]
        branch = _BRANCHES.get(cached.context, "conditional")
        key = (cached.name, branch, schedule)
        if key not in self._known:
            found = self._ratios.get(cached.name)
            self._known[key] = [NOT_RECORDED] * len(own) if found is None else found.at(branch, own)
        return self._known[key]


def require_cacheable_family(family: ModelFamily, index: PipelineIndex) -> None:
    """Raise UnsupportedError if a model changes its hidden state between the blocks too."""
    if not family.skippable_blocks:
        raise UnsupportedError(
            f"a {index.class_name} changes the hidden state between its blocks, which a step cache would do twice: "
            "leave --cache out, or pass --cache none."
        )


def require_cacheable(pipeline: Any, facts: PipelineFacts, settings: CacheSettings) -> None:
    """Raise UnsupportedError if a cache cannot skip a pipeline's blocks, or another cache exists
    already.
    """
    require_cacheable_family(facts.family, facts.index)
    for denoiser in facts.denoisers:
        model = getattr(pipeline, denoiser.component)
        if model.is_cache_enabled:
            raise UnsupportedError(f"{denoiser.name} has a cache already: call its disable_cache() first.")
        if settings.name == "firstblock" and len(facts.family.blocks_of(model)) < 2:
            raise UnsupportedError(f"{denoiser.name} has one block only, whose cache would skip nothing: use magcache.")


def _config(settings: CacheSettings) -> Any:
    if settings.name == "magcache":
        return MagCacheConfig(
            threshold=settings.threshold,
            max_skip_steps=settings.max_skip_steps,
            retention_ratio=settings.retention_ratio,
            num_inference_steps=1,
            mag_ratios=[NOT_RECORDED],
        )
    if settings.name == "firstblock":
        return FirstBlockCacheConfig(threshold=settings.threshold)
    return TaylorSeerCacheConfig(
        cache_interval=settings.interval,
        disable_cache_before_step=2,
        max_order=1,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,  # predicts the model's output alone: one tensor to keep, and every block skipped
    )


def _managers(model: nn.Module) -> list[StateManager]:
    registry = HookRegistry.check_if_exists_or_initialize(model)
    hooks = [hook for child in (registry, *registry._get_child_registries()) for hook in child.hooks.values()]
    found = [value for hook in hooks for value in vars(hook).values() if isinstance(value, StateManager)]
    return list({id(manager): manager for manager in found}.values())


def _disable(model: Any) -> None:
    model.disable_cache()
    for module in model.modules():
        own_forward(module)
