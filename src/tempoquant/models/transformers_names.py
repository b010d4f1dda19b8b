"""The names that transformers gives to a model's weights while it loads them, since those in its
files may be older.
"""

import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings

from tempoquant.models.small_files import NOT_DESCRIBED


def as_transformers_loads(names: Iterable[str], kind: Any, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the name in the model for each name in files, by transformers' mapping for a kind of
    model.

    Args:
        names: of weights.
        kind: the model's class.
        config: of the model. If it describes none, names are unchanged, and loading reports the
            error.
    """
    try:
        renamings = _renamings(kind, json.dumps(config, sort_keys=True))
    except NOT_DESCRIBED:
        renamings = []
    return {name: apply_renamings(name, renamings) for name in names}


@functools.lru_cache(maxsize=16)
def _renamings(kind: Any, config: str) -> list[WeightRenaming]:
    with torch.device("meta"):
        model = kind(kind.config_class.from_dict(json.loads(config)))
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    return [transform for transform in transforms if isinstance(transform, WeightRenaming)]
