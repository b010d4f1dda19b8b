"""The facts in a pipeline's classes and configs, before anything is run: its denoiser and its
blocks.
"""

import functools
import json
from typing import Any

import torch
from torch import nn

from tempoquant.errors import ModelError
from tempoquant.models.family import Config, PipelineIndex
from tempoquant.models.generic.hollow import denoiser_class
from tempoquant.models.small_files import read_object

_COMPONENT = "transformer"


def denoiser_of(index: PipelineIndex) -> tuple[str, Any, Config]:
    """Return a pipeline's denoiser: its component, its class, and its config.

    Raises:
        ModelError: there is none by the name of transformer, or more than one.
    """
    found = sorted(name for name in index.components if name.startswith(_COMPONENT))
    if found != [_COMPONENT]:
        what = " and ".join(found) or "none"
        raise ModelError(
            f"the generic family runs pipelines with one denoiser called transformer, and {index.folder} has {what}: "
            "it needs a model family of its own, see CONTRIBUTING.md."
        )
    return (
        _COMPONENT,
        denoiser_class(*index.components[_COMPONENT]),
        read_object(index.folder / _COMPONENT / "config.json"),
    )


def lists_of_blocks(kind: Any, config: Config) -> tuple[str, ...]:
    """Return the ModuleLists whose members are of a class that diffusers calls repeated, or does
    not split.

    Raises:
        ModelError: there are none.
    """
    own = {key: value for key, value in config.items() if key != "quantization_config"}
    return _lists_of_blocks(kind, json.dumps(own, sort_keys=True))


@functools.lru_cache(maxsize=16)
def _lists_of_blocks(kind: Any, config: str) -> tuple[str, ...]:
    names = {*(getattr(kind, "_repeated_blocks", None) or []), *(getattr(kind, "_no_split_modules", None) or [])}
    try:
        with torch.device("meta"):
            model = kind.from_config(json.loads(config))
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, AssertionError) as error:
        raise ModelError(f"a config does not describe a {kind.__name__}: {error}") from error
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(type(each).__name__ in names for each in module)
    }
    outermost = tuple(name for name in lists if not any(name.startswith(f"{other}.") for other in lists))
    if not outermost:
        raise ModelError(
            f"a {kind.__name__} says nothing of repeated blocks (_repeated_blocks, _no_split_modules) that lie in a "
            "ModuleList: it needs a model family of its own, see CONTRIBUTING.md."
        )
    return outermost
