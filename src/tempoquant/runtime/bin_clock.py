"""BinClock: the current timestep bin of every QuantizedLinear of one model, and their activation
bits.

Each call of the model sets it from its own `timestep` argument, for the thread that the call runs
in: threads that share a model do not see each other's timesteps. The bins are a tensor by which a
layer indexes its tensors, so a compiled model is not recompiled when the bin changes. Each model
has its own clock and there is no global one: models, and copies of a model, are independent.
"""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from tempoquant.checkpoint.model_call import ModelCall
from tempoquant.errors import ModelError, TempoQuantError, UnsupportedError
from tempoquant.runtime.shared_input import SharedInput
from tempoquant.timesteps import TimestepBins


class Call(NamedTuple):
    """The facts of one call that a model tells its layers.

    Attributes:
        bins: (1,) or (batch,) int64, the bin of each row of the batch; None with a single bin.
        is_eight: (1,) or (batch,) bool, which rows have 8-bit activations; None if all have four.
        is_forward: whether the model's own forward began it, and not `BinClock.at`.
    """

    bins: torch.Tensor | None = None
    is_eight: torch.Tensor | None = None
    is_forward: bool = False


class _ThisThread(threading.local):
    """The calls that this thread is in, innermost last. A copy, pickled or not, begins outside of
    every call.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class BinClock:
    """The timestep bins of one model, and the current bin in each of its calls.

    Args:
        bins: the model's timestep bins.
        call: how the model takes its timestep; the default suits most models.

    Attributes:
        bins: the model's timestep bins.
        eight_bit_timesteps: activations have eight bits where low ≤ timestep < high (W4A8), and
            four elsewhere; None for four everywhere. A call keeps the interval that it began with.
        shared_inputs: of the model's linears; they are emptied when a call begins or ends.
    """

    def __init__(self, bins: TimestepBins, call: ModelCall | None = None) -> None:
        self.bins = bins
        self._model_call = call or ModelCall()
        self.eight_bit_timesteps: tuple[float, float] | None = None
        self.shared_inputs: list[SharedInput] = []
        self._this_thread = _ThisThread()
        self._position = -1

    @property
    def call(self) -> Call | None:
        """Return the innermost call that this thread is in; None outside of every call."""
        calls = self._this_thread.calls
        return calls[-1] if calls else None

    def at(self, timestep: torch.Tensor | float) -> contextlib.AbstractContextManager[None]:
        """Make `timestep` current in a context: a number, or a tensor with one element or one per
        row of the batch.

        If the tensor has more dimensions, with a timestep for each token, each row takes its
        noisiest: the tokens of a given frame are clean at every step, and do not show the time.
        """
        return self.during(self._call_at(timestep))

    @contextlib.contextmanager
    def during(self, call: Call) -> Iterator[None]:
        """Put this thread in `call` within this context."""
        self._begin(call)
        try:
            yield
        finally:
            self._end()

    def attach(self, model: nn.Module) -> None:
        """Make every call of `model` set the clock. Raises ModelError if the model takes no
        timestep by that name.
        """
        parameters = list(inspect.signature(type(model).forward).parameters)
        name = self._model_call.timestep_argument
        if name not in parameters:
            raise ModelError(
                f"{type(model).__name__}.forward takes no {name}: its layers cannot tell their timestep bin."
            )
        self._position = parameters.index(name) - 1  # a hook does not see self among the arguments
        model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        model.register_forward_hook(self._after_forward, always_call=True)

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._begin(Call(is_forward=True))  # before anything may raise: _after_forward ends it in every case
        name = self._model_call.timestep_argument
        told = kwargs[name] if name in kwargs else args[self._position]
        call = self._call_at(self._model_call.timestep(told))
        self._this_thread.calls[-1] = call._replace(is_forward=True)
        if getattr(model, "gradient_checkpointing", False) and not torch.compiler.is_compiling():
            checkpointing: Any = model._gradient_checkpointing_func  # as diffusers and transformers call it
            if not isinstance(checkpointing, _CheckpointingInCall):
                model._gradient_checkpointing_func = _CheckpointingInCall(self, checkpointing)  # type: ignore[assignment]

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.call is not None and self.call.is_forward:  # else another hook raised before ours began a call
            self._end()

    def _begin(self, call: Call) -> None:
        self._forget_inputs()
        self._this_thread.calls.append(call)

    def _end(self) -> None:
        self._forget_inputs()
        self._this_thread.calls.pop()

    def _forget_inputs(self) -> None:
        for shared in self.shared_inputs:
            shared.forget()

    def _call_at(self, timestep: torch.Tensor | float) -> Call:
        if self.bins.num_bins == 1 and self.eight_bit_timesteps is None:
            return Call()
        if not isinstance(timestep, torch.Tensor):
            timestep = torch.tensor(float(timestep))
        timestep = timestep.reshape(-1) if timestep.dim() < 2 else timestep.flatten(1).amax(1)
        bins = self.bins.of_tensor(timestep) if self.bins.num_bins > 1 else None
        if self.eight_bit_timesteps is None:
            return Call(bins)
        low, high = self.eight_bit_timesteps
        return Call(bins, (timestep >= low) & (timestep < high))

    def _call_on(self, device: torch.device) -> Call | None:
        """Return the innermost call, whose tensors go to a device once and not at every layer."""
        call = self.call
        if call is None or torch.compiler.is_compiling():  # a graph keeps nothing for its next call
            return call
        told = call.is_eight if call.bins is None else call.bins
        if told is None or told.device == device:
            return call
        bins, is_eight = (None if each is None else each.to(device) for each in (call.bins, call.is_eight))
        moved = self._this_thread.calls[-1] = call._replace(bins=bins, is_eight=is_eight)
        return moved

    def rows(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return the timestep bin of each row of x (batch, …, in): (1 or batch,) int64, on its
        device; None with a single bin.

        Raises TempoQuantError outside of a call, UnsupportedError if rows and timesteps do not
        match.
        """
        if self.bins.num_bins == 1:
            return None
        call = self._call_on(x.device)
        if call is None or call.bins is None:
            raise TempoQuantError(f"this layer has {self.bins.num_bins} timestep bins and none is current: {_REMEDY}")
        _check_rows(call.bins.shape[0], x)
        return call.bins if call.bins.device == x.device else call.bins.to(x.device)

    def select(self, clip_ratio: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the clip ratio of each row of the batch.

        Args:
            clip_ratio: (num_bins,) float32.
            x: (batch, …, in), the layer's input.

        Returns:
            (1 or batch, 1, …) float32, of x's number of dimensions; (1,) with a single bin.
        """
        rows = self.rows(x)
        return clip_ratio if rows is None else _by_row(clip_ratio[rows.to(clip_ratio.device)], x)

    def eight_bits(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return the rows of the batch with 8-bit activations: (1 or batch, 1, …) bool; None if all
        have four.
        """
        call = self._call_on(x.device)
        if call is None and self.eight_bit_timesteps is not None:
            raise TempoQuantError(f"activations have eight bits at some timesteps, and none is current: {_REMEDY}")
        return None if call is None or call.is_eight is None else _by_row(call.is_eight.to(x.device), x)


class _CheckpointingInCall:
    """Gradient checkpointing inside a call: a block's second forward, in the backward pass, joins
    the call of its first.

    The backward pass comes after the call, perhaps after others, and on a GPU in a separate thread.
    """

    def __init__(self, clock: BinClock, checkpointing: Callable[..., Any]) -> None:
        self._clock, self._checkpointing = clock, checkpointing

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        call = self._clock.call
        if call is None or torch.compiler.is_compiling():  # a graph holds the bins among its inputs
            return self._checkpointing(module, *args)

        def run(*args: Any) -> Any:
            with self._clock.during(call):
                return module(*args)

        return self._checkpointing(run, *args)


_REMEDY = "call the whole model, or the layer inside `with layer.at_timestep(t):`."


def _by_row(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Reshape (rows,) to (rows, 1, …), of x's number of dimensions. Raises UnsupportedError unless
    rows is 1 or x's batch.
    """
    _check_rows(values.shape[0], x)
    return values.reshape(-1, *[1] * (x.dim() - 1))


def _check_rows(rows: int, x: torch.Tensor) -> None:
    if rows != 1 and (x.dim() < 3 or x.shape[0] != rows):
        raise UnsupportedError(
            f"{rows} timesteps do not match an input of shape {tuple(x.shape)}: give one per row of the batch."
        )
