"""JSON records of layers with input features that calibration hardly saw, for a component's config
and its journal.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tempoquant.checkpoint.checks import check_keys, check_name, require
from tempoquant.layer import HardlySeen

MAX_FEATURES = 2**20
MAX_LAYERS = 100_000


def hardly_seen_to_dict(layers: Mapping[str, HardlySeen]) -> dict[str, Any]:
    """Return plain JSON values, the inverse of `hardly_seen_from_dict`."""
    return {name: asdict(seen) for name, seen in sorted(layers.items())}


def hardly_seen_from_dict(layers: Any) -> dict[str, HardlySeen]:
    """Check and parse the records. Raises CheckpointError that names the key."""
    require(isinstance(layers, dict) and len(layers) <= MAX_LAYERS, "hardly_seen", "is an object", layers)
    for name, seen in layers.items():
        check_name(name)
        check_keys(seen, set(HardlySeen.__dataclass_fields__))
        count, factor = seen["num_features"], seen["amplification"]
        require(type(count) is int and 0 < count <= MAX_FEATURES, "num_features", "is a count above 0", count)
        is_number = type(factor) in (int, float) and 0 < factor < math.inf
        require(is_number, "amplification", "is a finite number above 0", factor)
    return {name: HardlySeen(**seen) for name, seen in layers.items()}
