"""Hooks on modules: those that only place weights, and those that see a module's computation."""

from collections.abc import Callable
from typing import Any

from diffusers.hooks import group_offloading
from torch import nn

OFFLOADING = group_offloading._GROUP_OFFLOADING
OFFLOADING_HOOKS = (
    OFFLOADING,
    group_offloading._LAYER_EXECUTION_TRACKER,
    group_offloading._LAZY_PREFETCH_GROUP_OFFLOADING,
)
"""Names of diffusers' hooks that bring weights and keep no activation; its activation caches have
others.
"""


def is_watched(module: nn.Module) -> bool:
    """Return whether a hook, PyTorch's or diffusers', may keep a module's inputs or outputs."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    registry = getattr(module, "_diffusers_hook", None)
    others = set() if registry is None else set(registry.hooks) - set(OFFLOADING_HOOKS)
    return bool(others) or not all(getattr(hook, "keeps_nothing", False) for hook in hooks)


def unobtrusive(hook: Callable[..., None]) -> Callable[..., None]:
    """Mark a module's hook that keeps none of the tensors it sees, see `is_watched`."""
    hook.keeps_nothing = True  # type: ignore[attr-defined]
    return hook


def own_forward(module: Any) -> None:
    """Remove its class's forward from a module, if a library that wrapped it left it on the
    instance.
    """
    if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
        del module.forward
