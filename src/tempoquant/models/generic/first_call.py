"""A pipeline's first call, which shows unrun settings: its timesteps, and its inputs' shapes."""

import functools
import json
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tempoquant.models.family import PipelineIndex
from tempoquant.models.generic.assumptions import Assumptions
from tempoquant.models.generic.hollow import Seen, empty_denoiser, load_hollow, run_hollow
from tempoquant.models.generic.static import denoiser_of
from tempoquant.models.guidance import Guidance
from tempoquant.models.sampling_settings import SamplingSettings


def guided(argument: str, scale: float) -> dict[str, Any]:
    """Return the arguments of a pipeline that set its guidance scale."""
    return {"guidance_scale": None, argument: scale}


class _Pipeline:
    """A pipeline's index and assumptions, as the key of a cache: there is one for each folder."""

    def __init__(self, index: PipelineIndex, assumed: Assumptions) -> None:
        self.index, self.assumed = index, assumed

    def __hash__(self) -> int:
        return hash(self.index.folder)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Pipeline) and other.index.folder == self.index.folder

    def run(self, settings: SamplingSettings, scheduler: Any = None) -> Seen:
        """Begin a generation, up to the first call. Raises ModelError."""
        component, kind, config = denoiser_of(self.index)
        pipeline = load_hollow(self.index, component, empty_denoiser(kind, config))
        if scheduler is not None:
            pipeline.scheduler = scheduler
        given = guided(self.assumed.guidance_argument, settings.guidance_scale)
        given |= {} if settings.sigmas is None else {"sigmas": list(settings.sigmas)}
        return run_hollow(pipeline, component, settings, given, {}, 1)


def inputs_at(index: PipelineIndex, assumed: Assumptions, settings: SamplingSettings) -> dict[str, Any]:
    """Return the inputs of one row of the first call, tensors on the meta device. Raises
    ModelError.
    """
    return _inputs_at(_Pipeline(index, assumed), settings)


@functools.lru_cache(maxsize=16)
def _inputs_at(pipeline: _Pipeline, settings: SamplingSettings) -> dict[str, Any]:
    assumed, call = pipeline.assumed, pipeline.run(settings).calls[0][0]
    part = Guidance(assumed.guidance_calls, assumed.guidance_rows).parts(call, None, 0)[0]
    inputs = {name: value for name, value in part.arguments.items() if name != "return_dict"}
    return dict(pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), inputs))


def schedule_of(
    index: PipelineIndex, assumed: Assumptions, settings: SamplingSettings, scheduler: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return timesteps and sigmas as the pipeline sets them on a scheduler like this one. Raises
    ModelError.
    """
    kind: Any = type(scheduler)
    return _schedule_of(_Pipeline(index, assumed), settings, kind, scheduler.to_json_string())


@functools.lru_cache(maxsize=16)
def _schedule_of(
    pipeline: _Pipeline, settings: SamplingSettings, kind: Any, config: str
) -> tuple[torch.Tensor, torch.Tensor]:
    scheduler = kind.from_config(json.loads(config))
    pipeline.run(settings, scheduler)
    sigmas = getattr(scheduler, "sigmas", scheduler.timesteps / 1000)
    return scheduler.timesteps, torch.as_tensor(sigmas)
