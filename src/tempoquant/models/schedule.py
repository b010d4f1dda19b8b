"""The sampling loop's schedule without a loaded model: its timesteps, and the denoiser at each."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tempoquant.errors import ModelError
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.source import SourceModel
from tempoquant.timesteps import NUM_TRAIN_TIMESTEPS, denoiser_at

_SHIFT_ARGUMENTS = ("flow_shift", "shift")
_FLOW_SCHEDULERS = "UniPCMultistepScheduler or FlowMatchEulerDiscreteScheduler"
_NO_SHIFT = "leave --flow-shift out and set flow_shift to null in sampling.json"
_PROBES = (1.0, 5.0)
"""Two flow shifts that no schedule can confuse."""
_NUM_PROBED_STEPS = 8


def flow_shift_of(scheduler: Any) -> float | None:
    """Return a scheduler's flow shift; None if its class has none, or follows the number of tokens
    instead.
    """
    argument = _shift_argument(scheduler)
    if argument is None or scheduler.config.get("use_dynamic_shifting"):
        return None
    value: float = scheduler.config[argument]
    return value


def shifted(scheduler: Any, flow_shift: float | None) -> Any:
    """Return the scheduler, or one of its kind with another flow shift.

    Raises:
        ModelError: its class takes no flow shift, its other settings disable the shift, or it makes
            no timesteps.
    """
    if flow_shift is None:
        return scheduler
    name, argument = type(scheduler).__name__, _shift_argument(scheduler)
    if argument is None:
        raise ModelError(
            f"the pipeline's {name} has no flow shift: {_NO_SHIFT}, or use a flow-matching scheduler such as "
            f"{_FLOW_SCHEDULERS}."
        )

    def sigmas_with(flow_shift: float) -> torch.Tensor:
        return _set_timesteps(_with(scheduler, **{argument: flow_shift}), _NUM_PROBED_STEPS)

    if torch.equal(*map(sigmas_with, _PROBES)):
        if scheduler.config[argument] == flow_shift:
            return scheduler
        raise ModelError(
            f"the flow shift of the pipeline's {name} moves no timestep as scheduler_config.json sets it up: turn "
            f"use_flow_sigmas on and other sigmas off there, or {_NO_SHIFT}."
        )
    if torch.equal(_set_timesteps(copy.deepcopy(scheduler), _NUM_PROBED_STEPS), sigmas_with(flow_shift)):
        return scheduler
    return type(scheduler).from_config(scheduler.config, **{argument: flow_shift})


def _arguments(scheduler: Any) -> set[str]:
    return set(inspect.signature(type(scheduler).__init__).parameters)


def _shift_argument(scheduler: Any) -> str | None:
    """Return its class's name of the flow shift. A config proves nothing: it keeps settings of
    other classes.
    """
    return next((name for name in _SHIFT_ARGUMENTS if name in _arguments(scheduler)), None)


def _with(scheduler: Any, **changes: float) -> Any:
    """Make another of its class, from the arguments that the class takes; diffusers warns of
    others.
    """
    taken = {name: value for name, value in scheduler.config.items() if name in _arguments(scheduler)}
    return type(scheduler)(**{**taken, **changes})


def _set_timesteps(scheduler: Any, num_steps: int, set_timesteps: Callable[[Any], None] | None = None) -> torch.Tensor:
    """Set a scheduler's timesteps as the pipeline does; return its sigmas. Raises ModelError if it
    needs more arguments.
    """
    try:
        if set_timesteps is None:
            scheduler.set_timesteps(num_steps)
        else:
            set_timesteps(scheduler)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, AssertionError, RuntimeError) as error:
        dynamic = scheduler.config.get("use_dynamic_shifting")
        remedy = "set use_dynamic_shifting to false in scheduler_config.json" if dynamic else f"use {_FLOW_SCHEDULERS}"
        raise ModelError(
            f"the pipeline's {type(scheduler).__name__} makes no timesteps from the number of steps alone ({error}), "
            f"which is all that the pipeline tells it: {remedy}."
        ) from error
    sigmas = getattr(scheduler, "sigmas", scheduler.timesteps / NUM_TRAIN_TIMESTEPS)
    return torch.as_tensor(sigmas)


@dataclass(frozen=True)
class Step:
    """One step of the sampling loop.

    Attributes:
        timestep: the transformer's argument, a tensor of one element.
        sigma: the noise's share of the latents, 0 … 1.
        denoiser: the name of the running one.
    """

    timestep: torch.Tensor
    sigma: float
    denoiser: str


def load_scheduler(source: SourceModel, flow_shift: float | None) -> Any:
    """Return a pipeline's scheduler alone. Raises ModelError if it does not load, or has no flow
    shift to set.
    """
    if (component := source.components.get("scheduler")) is None:
        raise ModelError(f"{source.folder} names no scheduler in its {source.index.file_name}: fetch the model again.")
    try:
        kind: Any = component.kind
        scheduler = kind.from_pretrained(source.folder, subfolder="scheduler", local_files_only=True)
    except (AttributeError, OSError, ValueError, TypeError) as error:
        raise ModelError(f"{component.folder} does not load as a {component.class_name}: {error}") from error
    return shifted(scheduler, flow_shift)


def sampling_steps(source: SourceModel, settings: SamplingSettings) -> list[Step]:
    """Return the steps that a pipeline takes with these settings, in order, without loading a
    model.

    Raises:
        ModelError: the scheduler does not load, has no flow shift to set, or makes no timesteps.
    """
    scheduler = load_scheduler(source, settings.flow_shift)
    latents = source.geometry.latents(settings.height, settings.width, settings.num_frames)
    sigmas = _set_timesteps(
        scheduler, settings.num_steps, lambda own: source.family.set_timesteps(source.index, own, settings, latents)
    )
    timesteps = source.family.scheduled(scheduler.timesteps)
    return [
        Step(timestep.reshape(1), float(sigma), denoiser_at(source.denoisers, float(timestep)).name)
        for timestep, sigma in zip(timesteps, sigmas, strict=False)  # a last sigma, 0, belongs to no step
    ]
