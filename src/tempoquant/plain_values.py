"""Plain values of dataclasses, for JSON that strict parsers read."""

import dataclasses
import json
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """Return JSON-safe values: dataclasses become objects without their None fields, infinities the
    texts "inf" and "-inf".
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(fields_of(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def to_json(record: Mapping[str, Any]) -> str:
    """Write one JSON object, indented; infinities become texts, so that strict parsers accept
    it.
    """
    return json.dumps(plain(record), indent=2, ensure_ascii=False, allow_nan=False)


def fields_of(value: Any) -> dict[str, Any]:
    """Return a dataclass's fields by name, each as it is."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
