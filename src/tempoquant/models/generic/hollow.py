"""A pipeline whose denoiser computes nothing: it shows the denoiser's inputs at almost no cost.

The text encoder and the other small components are real. The denoiser has no blocks' weights: its
blocks run on the meta device, where only shapes are computed, and return zeros.
"""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn
from torch.utils import _pytree as pytree

from tempoquant.calibrate.capture import arguments_by_name, computing_with, watching_inputs
from tempoquant.errors import ModelError
from tempoquant.models.family import Config, PipelineIndex
from tempoquant.models.sampling_settings import SamplingSettings

DTYPE = torch.bfloat16
_LOADING = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError)


class _Enough(Exception):
    """Ends a generation once everything was seen."""


@dataclass
class Seen:
    """The observations of a hollow generation.

    Attributes:
        calls: of the denoiser, by step: the arguments by name.
        timesteps: of the scheduler.
        blocks: names in the order in which they ran, in the first call.
        inputs: of the linears of each block, by their names in it, in the first call; on the meta
            device.
    """

    calls: list[list[dict[str, Any]]] = field(default_factory=lambda: [[]])
    timesteps: list[float] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    inputs: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


def empty_denoiser(kind: Any, config: Config) -> Any:
    """Return a denoiser whose parameters are on the meta device."""
    with init_empty_weights(include_buffers=False):
        model = kind.from_config({key: value for key, value in config.items() if key != "quantization_config"})
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPE)
    return model.eval().requires_grad_(False)


def load_hollow(index: PipelineIndex, component: str, denoiser: nn.Module) -> Any:
    """Load a pipeline with a given denoiser, in 16 bits, on the CPU.

    Raises:
        ModelError: it does not load.
    """
    kind: Any = getattr(diffusers, index.class_name, None)
    if kind is None:
        raise ModelError(f"{index.folder} is a {index.class_name}, which the installed diffusers lacks.")
    try:
        pipeline = kind.from_pretrained(
            index.folder, dtype=DTYPE, use_safetensors=True, local_files_only=True, **{component: denoiser}
        )
    except _LOADING as error:
        raise ModelError(f"{index.folder} does not load as a {index.class_name}: {error}") from error
    pipeline.__class__ = type(index.class_name, (kind,), {"_execution_device": torch.device("cpu")})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def run_hollow(
    pipeline: Any,
    component: str,
    settings: SamplingSettings,
    given: dict[str, Any],
    blocks: dict[str, nn.Module],
    num_steps: int,
    prompt: str = "a",
) -> Seen:
    """Generate for so many steps, and record the calls.

    Args:
        given: arguments of the pipeline beside texts, size and steps.
        blocks: of the denoiser by name, which return zeros. Without any, the first call ends the
            generation.

    Raises:
        ModelError: the pipeline needs more than a prompt, or its denoiser does not run without
            weights.
    """
    seen, denoiser = Seen(), getattr(pipeline, component)
    taken = inspect.signature(type(pipeline).__call__).parameters
    size = {"height": settings.height, "width": settings.width, "num_frames": settings.num_frames}
    arguments = {"prompt": prompt, "negative_prompt": "", **size, **given, "output_type": "latent"}

    def watch(*args: Any, **kwargs: Any) -> Any:
        seen.timesteps = [float(each) for each in pipeline.scheduler.timesteps]
        seen.calls[-1].append(arguments_by_name(denoiser, args, kwargs))
        if not blocks:
            raise _Enough
        return type(denoiser).forward(denoiser, *args, **kwargs)

    def on_step(*_: Any) -> dict[str, Any]:
        if len(seen.calls) == num_steps:
            raise _Enough
        seen.calls.append([])
        return {}

    forwards: dict[nn.Module, Callable[..., Any]] = {
        block: functools.partial(_stand_in, seen, name, block) for name, block in blocks.items()
    }
    with computing_with({**forwards, denoiser: watch}), _as_model_error(pipeline):
        pipeline(
            **{name: value for name, value in arguments.items() if name in taken},
            num_inference_steps=settings.num_steps,
            generator=torch.Generator("cpu").manual_seed(0),
            callback_on_step_end=on_step,
        )
    return seen


@contextlib.contextmanager
def _as_model_error(pipeline: Any) -> Iterator[None]:
    try:
        yield
    except _Enough:
        pass
    except _LOADING as error:
        raise ModelError(
            f"the generic family cannot run a {type(pipeline).__name__} with a prompt alone "
            f"({type(error).__name__}: {str(error)[:300]}): it needs a model family of its own, see CONTRIBUTING.md."
        ) from error


def _stand_in(seen: Seen, name: str, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a block on the meta device for the shapes of its output, and return zeros."""
    own: dict[str, torch.Tensor] = {}
    linears = {each: module for each, module in block.named_modules() if isinstance(module, nn.Linear)}
    on_meta = pytree.tree_map_only(torch.Tensor, _Once(), (args, kwargs))
    with watching_inputs(linears, own.__setitem__):
        answer = type(block).forward(block, *on_meta[0], **on_meta[1])
    if name not in seen.inputs:
        seen.blocks.append(name)
        seen.inputs[name] = own
    return pytree.tree_map_only(torch.Tensor, lambda like: torch.zeros(like.shape, dtype=like.dtype), answer)


class _Once:
    """Moves tensors to the meta device; the same tensor to the same one."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self._known:
            self._known[id(tensor)] = (tensor, tensor.to("meta"))
        return self._known[id(tensor)][1]


def denoiser_class(library: str, class_name: str) -> Any:
    """Return a component's class. Raises ModelError if the installed library has none of that
    name.
    """
    kind = getattr(importlib.import_module(library), class_name, None)
    if kind is None:
        raise ModelError(f"the {library} installed here has no {class_name}: upgrade it.")
    return kind
