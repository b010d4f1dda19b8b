"""Tapes: what a function of tensors allocates and launches, recorded once and then played.

The Python that makes a launch asks tensors for strides, chooses tiles and looks the compiled kernel
up, which takes longer than the launch. For all inputs of one shape the answers are the same, and a
tape holds them: buffers to allocate, operations of PyTorch, and compiled kernels with the places of
their arguments. It holds no tensor of a layer, so one tape serves every layer of a shape, and
weights may move or be replaced at any time.

A recording sees every operation of PyTorch and every launch. What it cannot play again it does not
keep: then the function itself runs, each time. So a tape gives what its function gives.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from tempoquant.kernels import launch
from tempoquant.kernels.dispatch import are_sums_promoted
from tempoquant.kernels.launch import Compiled, Launch, TensorDescriptor
from tempoquant.kernels.triton_gemm import is_interpreted

_Result = TypeVar("_Result")
_Step = Callable[[list[Any], int], None]
_Tensors = Sequence[torch.Tensor | None]

_ALLOCATIONS = {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default}
PLAYS_ON_CPU = False
_MOST = 4096
_UNKNOWN: Any = object()
_TAPES: "dict[Any, Tape | None]" = {}
_TRIED: set[Any] = set()


class _CannotBeTaped(Exception):
    """Says that a part of what runs cannot be held by a tape."""


def situation(x: torch.Tensor) -> tuple[Any, ...] | None:
    """Return what decides a launch beside its tensors; None where no tape may be played.

    That is so for tensors of other classes, where a profiler wants to hear of each launch, for a
    device that is not the current one, and on a CPU, but for tests and benchmarks, which set
    PLAYS_ON_CPU.
    """
    if type(x) is not torch.Tensor or launch.is_observed():
        return None
    if not x.is_cuda:
        if not PLAYS_ON_CPU:
            return None
    elif is_interpreted() or x.get_device() != torch.cuda.current_device():
        return None
    driver = None if is_interpreted() else triton.runtime.driver.active
    return x.shape, x.dtype, x.get_device(), driver, are_sums_promoted()


def taped(key: Any, given: _Tensors, function: Callable[[], _Result]) -> _Result:
    """Return `function()`, played from a tape where there is one, else run and recorded.

    Args:
        key: decides, beside dtypes, all but the values of tensors: their shapes, and what
            `situation` says.
        given: the tensors that `function` reads.
        function: returns a tensor, or a NamedTuple of tensors and None, and has no other effect.
    """
    dtypes: list[torch.dtype | None] = []
    for tensor in given:
        if tensor is None:
            dtypes.append(None)
        elif tensor.data_ptr() % 16 or not tensor.is_contiguous():
            return function()
        else:
            dtypes.append(tensor.dtype)
    key = key, *dtypes
    tape = _TAPES.get(key, _UNKNOWN)
    if tape is _UNKNOWN:
        return _record(key, given, function)
    played: _Result = function() if tape is None else tape.play(given)
    return played


def _record(key: Any, given: _Tensors, function: Callable[[], _Result]) -> _Result:
    recorder = _Recorder(given)
    with recorder, launch.noting(recorder.note):
        result = function()
    if len(_TAPES) + len(_TRIED) >= _MOST:
        _TAPES.clear()
        _TRIED.clear()
    try:
        _TAPES[key] = recorder.tape(result)
    except _CannotBeTaped:
        if key in _TRIED:
            _TAPES[key] = None
        _TRIED.add(key)  # a first run computes what the second, recorded too, finds in caches
    return result


class Tape:
    """Holds what a recording found: values to begin with, steps, and where the results then are.

    A value's place is its index in a list: what is given, then numbers and what the steps make.
    """

    def __init__(self, rest: list[Any], steps: list[_Step], kind: Any, results: tuple[int | None, ...]) -> None:
        self._rest, self._steps, self._kind, self._results = rest, steps, kind, results

    def play(self, given: _Tensors) -> Any:
        """Return what the recorded function would for these tensors."""
        values = [*given, *self._rest]
        stream = _current_stream()
        for step in self._steps:
            step(values, stream)
        made = [None if place is None else values[place] for place in self._results]
        return made[0] if self._kind is None else self._kind(*made)


def _current_stream() -> int:
    if is_interpreted():
        return 0
    driver = triton.runtime.driver.active
    stream: int = driver.get_current_stream(driver.get_current_device())
    return stream


class _Recorder(TorchDispatchMode):
    """Writes down what happens within it."""

    def __init__(self, given: _Tensors) -> None:
        super().__init__()
        self._num_given = len(given)
        self._values: list[Any] = list(given)  # keeps what was made: no two have one address
        # Each step with the place that it fills and those that it reads.
        self._steps: list[tuple[_Step, int | None, tuple[int, ...]]] = []
        self._has_failed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        try:
            self._note_operation(func, args, kwargs or {}, result)
        except _CannotBeTaped:
            self._has_failed = True
        return result

    def note(self, launched: Launch, compiled: Compiled | None) -> None:
        """Note a launch and the kernel that was compiled for it, None under the interpreter."""
        try:
            if compiled is None and not is_interpreted():
                raise _CannotBeTaped
            names = launched.arguments if compiled is None else compiled.names
            places = tuple(self._place_of_argument(launched.arguments[name]) for name in names)
            launching = _interpreting(launched, places) if compiled is None else _launching(launched, compiled, places)
            self._steps.append((launching, None, places))
        except _CannotBeTaped:
            self._has_failed = True

    def tape(self, result: Any) -> Tape:
        """Return the tape of what was noted. Raises _CannotBeTaped."""
        kind = None if isinstance(result, torch.Tensor) else type(result)
        results = tuple(
            None if each is None else self._place_of(each) for each in ([result] if kind is None else result)
        )
        if self._has_failed:
            raise _CannotBeTaped
        needed = set(results)
        steps = []
        for step, filled, read in reversed(self._steps):
            if filled is None or filled in needed:
                steps.append(step)
                needed.update(read)
        rest = [None if isinstance(each, torch.Tensor) else each for each in self._values[self._num_given :]]
        return Tape(rest, steps[::-1], kind, results)

    def _note_operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if not isinstance(result, torch.Tensor) or func._schema.is_mutable:
            raise _CannotBeTaped
        if func in _ALLOCATIONS and result.is_contiguous():
            place = self._add(result)
            self._steps.append((_allocating(place, result), place, ()))
            return
        if any(isinstance(each, torch.Tensor | list | tuple) for each in kwargs.values()):
            raise _CannotBeTaped
        read = tuple(self._place_of(each) if isinstance(each, torch.Tensor) else self._add(each) for each in args)
        place = self._add(result)
        self._steps.append((_operating(place, func, read, kwargs), place, read))

    def _add(self, value: Any) -> int:
        if isinstance(value, list | tuple) and any(isinstance(each, torch.Tensor) for each in value):
            raise _CannotBeTaped
        self._values.append(value)
        return len(self._values) - 1

    def _place_of(self, tensor: torch.Tensor) -> int:
        """Return where a tensor of this address, shape and dtype is."""
        for place, value in enumerate(self._values):
            if isinstance(value, torch.Tensor) and _form(value) == _form(tensor) and value.numel():
                return place
        raise _CannotBeTaped

    def _place_of_argument(self, argument: Any) -> int:
        """Return where a kernel's argument is. Of a tensor only its address counts."""
        if TensorDescriptor is not None and isinstance(argument, TensorDescriptor):
            base = self._place_of_argument(argument.base)
            place = self._add(None)
            self._steps.append((_describing(place, base, argument), place, (base,)))
            return place
        if not isinstance(argument, torch.Tensor):
            return self._add(argument)
        if is_interpreted():
            return self._place_of(argument)
        address = argument.data_ptr()
        found = [place for place, value in enumerate(self._values)
                 if isinstance(value, torch.Tensor) and address and value.data_ptr() == address]  # fmt: skip
        if not found or sum(place < self._num_given for place in found) > 1:
            raise _CannotBeTaped
        return found[0]


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _allocating(place: int, like: torch.Tensor) -> _Step:
    shape, dtype, device = tuple(like.shape), like.dtype, like.device

    def allocate(values: list[Any], stream: int) -> None:
        values[place] = torch.empty(shape, dtype=dtype, device=device)

    return allocate


def _operating(place: int, func: Any, read: tuple[int, ...], kwargs: dict[str, Any]) -> _Step:
    def operate(values: list[Any], stream: int) -> None:
        values[place] = func(*[values[each] for each in read], **kwargs)

    return operate


def _describing(place: int, base: int, example: Any) -> _Step:
    fields = {name: value for name, value in vars(example).items() if name != "base"}

    def describe(values: list[Any], stream: int) -> None:
        descriptor = values[place] = object.__new__(TensorDescriptor)  # without its checks
        vars(descriptor).update(fields, base=values[base])

    return describe


def _launching(launched: Launch, compiled: Compiled, places: tuple[int, ...]) -> _Step:
    run, function, metadata = compiled.run, compiled.function, compiled.metadata
    first, second, third = (*launched.grid, 1, 1)[:3]
    arguments = operator.itemgetter(*places)

    def start(values: list[Any], stream: int) -> None:
        run(first, second, third, stream, function, metadata, None, None, None, *arguments(values))

    return start


def _interpreting(launched: Launch, places: tuple[int, ...]) -> _Step:
    def start(values: list[Any], stream: int) -> None:
        arguments = {name: values[place] for name, place in zip(launched.arguments, places, strict=True)}
        launched.kernel[launched.grid](**arguments, **launched.options)

    return start
