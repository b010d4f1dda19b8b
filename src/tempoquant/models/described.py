"""The tensors of the model that a config describes: their shapes and names, without their
values.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from diffusers import ConfigMixin

from tempoquant.models.small_files import check_statistics


class Parameter(NamedTuple):
    """A parameter or buffer.

    Attributes:
        shape: its own.
        aliases: all its names in the model, since tied weights are stored once.
    """

    shape: tuple[int, ...]
    aliases: frozenset[str]


@functools.lru_cache(maxsize=16)
def described_by(kind: Any, config: str) -> Mapping[str, Parameter]:
    """Return every parameter and buffer of the model that a config (JSON) describes. Raises one of
    `NOT_DESCRIBED`.

    They are on the meta device, without values, and cached, since a command asks for the same few
    models repeatedly.
    """
    with torch.device("meta"):
        values = json.loads(config)
        is_diffusers = issubclass(kind, ConfigMixin)
        model = kind.from_config(values) if is_diffusers else kind(kind.config_class.from_dict(values))
    if is_diffusers:
        check_statistics(model.config)
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    aliases = {name: frozenset(group) for group in names.values() for name in group}
    return {
        name: Parameter(tuple(tensor.shape), aliases.get(name, frozenset({name})))
        for name, tensor in model.state_dict().items()
    }
