"""The arguments of one call as tensors and an outline of everything else, so that files can hold
them.

Most denoisers are called with tensors alone; some also take numbers, switches, and lists of
tensors.
"""

from collections.abc import Mapping
from typing import Any

import torch

from tempoquant.errors import CalibrationError

OUTLINE_KEY = "arguments"
"""The key of the outline, as JSON, in a safetensors file's metadata."""

_PLAIN = (bool, int, float, str, type(None))


def take_apart(arguments: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Split a call's arguments into tensors by name and the outline of the rest; None if all are
    tensors.

    A tensor in a list, a tuple or a dict is named by its path, such as "img_ids.0". The outline is
    plain JSON.

    Raises:
        CalibrationError: an argument is neither a tensor, nor plain, nor made of these.
    """
    tensors: dict[str, torch.Tensor] = {}
    outline = {name: _outline(name, value, tensors) for name, value in arguments.items()}
    return tensors, None if tensors.keys() == outline.keys() else outline


def _outline(path: str, value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, _PLAIN):
        return {"value": value}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_outline(f"{path}.{index}", each, tensors) for index, each in enumerate(value)]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _outline(f"{path}.{key}", each, tensors) for key, each in value.items()}}
    raise CalibrationError(
        f"the denoiser is called with {path}, a {type(value).__name__}, which cannot be kept in a file: leave it out "
        "of the pipeline's call."
    )


def put_together(tensors: Mapping[str, torch.Tensor], outline: Any) -> dict[str, Any]:
    """Rebuild the arguments that `take_apart` split. Raises ValueError for an outline that it would
    not make.
    """
    if outline is None:
        return dict(tensors)
    if not isinstance(outline, dict):
        raise ValueError(f"arguments are outlined by name, not by {outline!r}")
    return {name: _filled(node, tensors) for name, node in outline.items()}


def _filled(node: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(node, dict) and len(node) == 1:
        ((kind, content),) = node.items()
        if kind == "tensor" and content in tensors:
            return tensors[content]
        if kind == "value" and isinstance(content, _PLAIN):
            return content
        if kind in ("list", "tuple") and isinstance(content, list):
            items = [_filled(each, tensors) for each in content]
            return items if kind == "list" else tuple(items)
        if kind == "dict" and isinstance(content, dict):
            return {key: _filled(each, tensors) for key, each in content.items()}
    raise ValueError(f"an argument is outlined by {node!r}")


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors in a nested structure, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for each in value for tensor in tensors_in(each)]
    return []
