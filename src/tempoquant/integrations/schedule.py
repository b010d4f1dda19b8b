"""The sampling loop's schedule, known without loading a model: which timesteps there are, and who runs at each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from tempoquant.errors import ModelError
from tempoquant.integrations.pipeline_folder import components_of, read_json
from tempoquant.timesteps import NUM_TRAIN_TIMESTEPS, Expert, expert_of


def shifted(scheduler: Any, flow_shift: float | None) -> Any:
    """The scheduler, or one of its kind with another flow shift. Raises ModelError when it has none."""
    if flow_shift is None:
        return scheduler
    key = next((key for key in ("flow_shift", "shift") if key in scheduler.config), None)
    if key is None:
        raise ModelError(
            f"the pipeline's {type(scheduler).__name__} has no flow shift: set flow_shift to null in sampling.json, "
            "or use a flow-matching scheduler such as UniPCMultistepScheduler."
        )
    if scheduler.config[key] == flow_shift:
        return scheduler
    return type(scheduler).from_config(scheduler.config, **{key: flow_shift})


@dataclass(frozen=True)
class Step:
    """One step of the sampling loop.

    Attributes:
        timestep: as the transformer is told, a tensor of one element.
        sigma: the noise's share of the latents, 0 … 1.
        expert: who runs.
    """

    timestep: torch.Tensor
    sigma: float
    expert: Expert


def load_scheduler(folder: Path, flow_shift: float | None) -> Any:
    """A pipeline's scheduler alone. Raises ModelError when it does not load, or has no flow shift to set."""
    _, class_name = components_of(folder).get("scheduler", ("", "no scheduler"))
    try:
        scheduler = getattr(diffusers, class_name).from_pretrained(folder, subfolder="scheduler", local_files_only=True)
    except (AttributeError, OSError, ValueError, TypeError) as error:
        raise ModelError(f"{folder / 'scheduler'} does not load as a {class_name}: {error}") from error
    return shifted(scheduler, flow_shift)


def sampling_steps(folder: Path, num_steps: int, flow_shift: float | None) -> list[Step]:
    """The steps that a pipeline takes with these settings, in order, without loading a model."""
    scheduler = load_scheduler(folder, flow_shift)
    scheduler.set_timesteps(num_steps)
    boundary_ratio = read_json(folder / "model_index.json")["boundary_ratio"]
    sigmas = getattr(scheduler, "sigmas", scheduler.timesteps / NUM_TRAIN_TIMESTEPS)
    return [
        Step(timestep.reshape(1), float(sigma), expert_of(float(timestep), boundary_ratio))
        for timestep, sigma in zip(scheduler.timesteps, sigmas, strict=False)  # a last sigma, 0, belongs to no step
    ]
