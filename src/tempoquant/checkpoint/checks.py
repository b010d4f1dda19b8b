"""Checks of content from outside: each raises a CheckpointError that names the key and the
remedy.
"""

import re
from collections.abc import Set
from typing import Any

from tempoquant.errors import CheckpointError
from tempoquant.validation import shorten

MAX_TEXT = 4096  # characters of a name, note or hash
REMEDY = "The file is damaged or newer than this TempoQuant: fetch it again, or upgrade tempoquant."


def damaged(what: str) -> CheckpointError:
    """Make the error for content that this TempoQuant would not write; `what` is a sentence without
    its full stop.
    """
    return CheckpointError(f"{what}. {REMEDY}")


def check_name(name: Any) -> None:
    """Raise CheckpointError unless `name` is a dotted module name of sensible length."""
    is_dotted = isinstance(name, str) and len(name) <= MAX_TEXT and re.fullmatch(r"\w+(\.\w+)*", name, re.ASCII)
    require(bool(is_dotted), "layers", "is keyed by dotted module names", name)


def check_text(key: str, value: Any) -> None:
    """Raise CheckpointError unless a value is a text of sensible length."""
    is_text = isinstance(value, str) and len(value) <= MAX_TEXT
    require(is_text, key, f"is a text of at most {MAX_TEXT} characters", value)


def check_keys(record: Any, required: Set[str], optional: Set[str] = frozenset()) -> None:
    """Raise CheckpointError unless a record is an object with the required keys and no others but
    optional ones.
    """
    require(isinstance(record, dict), "an entry", "is an object", record)
    missing, unknown = sorted(required - set(record)), sorted(set(record) - required - optional, key=str)
    if missing:
        raise damaged(f"{missing[0]!r} is missing")
    if unknown:
        raise damaged(f"unknown key {shorten(unknown[0])}")


def require(condition: bool, key: str, rule: str, value: Any) -> None:
    """Raise CheckpointError unless the condition holds; the error names the key, its rule and its
    value.
    """
    if not condition:
        raise damaged(f"{key} {rule}, not {shorten(value)}")
