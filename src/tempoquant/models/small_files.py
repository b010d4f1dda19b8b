"""The files of a component that are not weights: configs, vocabularies, tokenizers. They are read
before any work.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import ConfigMixin

from tempoquant.errors import ModelError

NOT_DESCRIBED = (TypeError, ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError)
"""The errors of classes for a config that does not describe them."""

_AGAIN = "fetch the model again"
_TOKENIZER_NAME = "tokenizer.json"
_POINTER = b"version https://git-lfs"


def read_object(file: Path) -> dict[str, Any]:
    """Read a file's JSON object. Raises ModelError for a missing or malformed one."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{file} is missing: {_AGAIN}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not readable JSON ({error}): {_AGAIN}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} is not a JSON object: {_AGAIN}.")
    return value


def check_small_files(component: Path, kind: Any) -> None:
    """Raise ModelError unless a scheduler, tokenizer or processor has its files, each of which can
    be read.
    """
    needed = set(getattr(kind, "vocab_files_names", {}).values())
    if hasattr(kind, "get_image_processor_dict"):
        needed = {"preprocessor_config.json", "processor_config.json"}
    if needed and not any((component / name).is_file() for name in needed):
        raise ModelError(f"{component} holds none of {', '.join(sorted(needed))}: {_AGAIN}.")
    for file in sorted(component / name for name in needed if (component / name).is_file()):
        with file.open("rb") as opened:
            start = opened.read(len(_POINTER))
        if start in (b"", _POINTER):
            raise ModelError(f"{file} is empty, or a pointer that Git LFS left in its place: {_AGAIN}.")
    for file in sorted(component.glob("*.json")):
        if file.name == _TOKENIZER_NAME:
            _check_tokenizer(file)
        else:
            read_object(file)
    if issubclass(kind, ConfigMixin):
        try:
            kind.from_config(read_object(component / kind.config_name))
        except NOT_DESCRIBED as error:
            raise not_described(component / kind.config_name, kind, error) from error


def _check_tokenizer(file: Path) -> None:
    """Raise ModelError unless the library that reads tokenizer.json can."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # it raises no narrower class
        raise ModelError(f"{file} is not a tokenizer that can be read ({error}): {_AGAIN}.") from error


def not_described(file: Path, kind: Any, error: Exception) -> ModelError:
    """Return the error for a config that describes no object of a class."""
    return ModelError(f"{file} does not describe a {kind.__name__}: {error}")


def check_statistics(config: Mapping[str, Any]) -> None:
    """Raise ValueError unless an autoencoder has a mean and a deviation of each latent channel, if
    it has any.
    """
    channels = config.get("z_dim")
    for key in ("latents_mean", "latents_std"):
        values = config.get(key)
        if channels is None or values is None:
            continue
        if not isinstance(values, list | tuple) or len(values) != channels:
            count = len(values) if isinstance(values, list | tuple) else "no list of"
            raise ValueError(f"{key} has {count} numbers for z_dim = {channels} channels; {_AGAIN}.")
        usable = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
        if not usable or (key == "latents_std" and min(values) <= 0):
            raise ValueError(f"{key} holds something other than finite numbers, above 0 for a deviation; {_AGAIN}.")
