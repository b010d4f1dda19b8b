"""Forward hooks: contexts that watch the calls of modules, and remove their hooks."""

import contextlib
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Name = TypeVar("Name", bound=Hashable)


@contextlib.contextmanager
def _while_hooked(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def watching_inputs(modules: Mapping[Name, nn.Module], observe: Callable[[Name, torch.Tensor], None]) -> Iterator[None]:
    """Call `observe(name, first positional input)` before each call of the named modules within
    this context.
    """
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: observe(name, args[0]))
        for name, module in modules.items()
    ]
    with _while_hooked(handles):
        yield


@contextlib.contextmanager
def watching_outputs(
    modules: Mapping[Name, nn.Module], observe: Callable[[Name, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Call `observe(name, first positional input, output)` after each call of the named modules
    within this context.
    """
    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: observe(name, args[0], output))
        for name, module in modules.items()
    ]
    with _while_hooked(handles):
        yield


@contextlib.contextmanager
def watching_gradients(
    modules: Mapping[Name, nn.Module], observe: Callable[[Name, torch.Tensor], None]
) -> Iterator[None]:
    """Call `observe(name, gradient)` for calls of the named modules within this context.

    It runs when a backward pass has the gradient of a call's output, even if no input of the module
    needs one.
    """

    def watch(name: Name, output: torch.Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()
        output.register_hook(lambda gradient: observe(name, gradient))

    with watching_outputs(modules, lambda name, _, output: watch(name, output)):
        yield


@contextlib.contextmanager
def watching_calls(module: nn.Module, observe: Callable[[dict[str, Any], Any], None]) -> Iterator[None]:
    """Call `observe(arguments by name, output)` after each call of the module within this
    context.
    """
    handle = module.register_forward_hook(
        lambda called, args, kwargs, out: observe(arguments_by_name(called, args, kwargs), out), with_kwargs=True
    )
    with _while_hooked([handle]):
        yield


def arguments_by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by name, in the order of the class's signature, without plain
    defaults.
    """
    signature = inspect.signature(type(module).forward)
    found: dict[str, Any] = {}
    for name, value in list(signature.bind(module, *args, **kwargs).arguments.items())[1:]:  # the first is the module
        parameter = signature.parameters[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found |= value
        elif not _is_plain_default(value, parameter.default):
            found[name] = value
    return found


def _is_plain_default(value: Any, default: Any) -> bool:
    return (
        type(value) is type(default)
        and (value is None or isinstance(value, bool | int | float | str))
        and (value == default)
    )


@contextlib.contextmanager
def computing_with(forwards: Mapping[nn.Module, Callable[..., torch.Tensor]]) -> Iterator[None]:
    """Replace each module's forward by the given function of its inputs within this context."""
    for module, forward in forwards.items():
        module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in forwards:
            del module.forward
