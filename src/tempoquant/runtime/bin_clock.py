"""BinClock: tells every QuantizedLinear of one model which timestep bin is current, and how wide activations are then.

Set once per call of the model, from its own `timestep` argument. The bins stay in a tensor and clip ratios are gathered
with it, so a compiled model is not compiled again when the bin changes. There is one clock per model and no global one:
models, and copies of a model, do not disturb each other.
"""

import inspect
from typing import Any

import torch
from torch import nn

from tempoquant.errors import ModelError, TempoQuantError, UnsupportedError
from tempoquant.runtime.shared_input import SharedInput
from tempoquant.timesteps import TimestepBins


class BinClock:
    """The current timestep bin of one model.

    Attributes:
        bins: the model's timestep bins.
        current: (1,) or (batch,) int64, the bin of each row of the batch; None before the first call, and always None
            with a single bin.
        eight_bit_timesteps: activations have eight bits where low ≤ timestep < high (W4A8), and four elsewhere; None
            for four everywhere.
        shared_inputs: of the model's linears; what one of them was left holding goes at the next call.
    """

    def __init__(self, bins: TimestepBins) -> None:
        self.bins = bins
        self.current: torch.Tensor | None = None
        self.eight_bit_timesteps: tuple[float, float] | None = None
        self.shared_inputs: list[SharedInput] = []
        self._is_eight: torch.Tensor | None = None
        self._position = -1

    def set(self, timestep: torch.Tensor | float) -> None:
        """Make the bins of `timestep` current: a number, or a tensor with one element or one per row of the batch.

        Where the timestep matters, a tensor of two or more dimensions (one timestep per token) raises UnsupportedError.
        """
        if self.bins.num_bins == 1 and self.eight_bit_timesteps is None:
            return
        if not isinstance(timestep, torch.Tensor):
            timestep = torch.tensor(float(timestep))
        if timestep.dim() > 1:
            raise UnsupportedError(
                f"timestep has shape {tuple(timestep.shape)}, one per token: give one per call or per row of the batch."
            )
        timestep = timestep.reshape(-1)
        if self.bins.num_bins > 1:
            self.current = self.bins.of_tensor(timestep)
        if self.eight_bit_timesteps is not None:
            low, high = self.eight_bit_timesteps
            self._is_eight = (timestep >= low) & (timestep < high)

    def attach(self, model: nn.Module) -> None:
        """Have `model` set the clock before each of its calls. Raises ModelError when it takes no `timestep`."""
        parameters = list(inspect.signature(type(model).forward).parameters)
        if "timestep" not in parameters:
            raise ModelError(
                f"{type(model).__name__}.forward takes no timestep: its layers cannot tell their timestep bin."
            )
        self._position = parameters.index("timestep") - 1  # self is not among the arguments that a hook sees
        model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for shared in self.shared_inputs:
            shared.forget()
        self.set(kwargs["timestep"] if "timestep" in kwargs else args[self._position])

    def select(self, clip_ratio: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The clip ratio of each row of the batch.

        Args:
            clip_ratio: (num_bins,) float32.
            x: (batch, …, in), the layer's input.

        Returns:
            (1 or batch, 1, …) float32, of x's number of dimensions; (1,) with a single bin.
        """
        if self.bins.num_bins == 1:
            return clip_ratio
        if self.current is None:
            raise TempoQuantError(f"this layer has {self.bins.num_bins} timestep bins and none is current: {_REMEDY}")
        return _by_row(clip_ratio[self.current.to(clip_ratio.device)], x)

    def eight_bits(self, x: torch.Tensor) -> torch.Tensor | None:
        """Which rows of the batch have 8-bit activations: (1 or batch, 1, …) bool; None where all have four."""
        if self.eight_bit_timesteps is None:
            return None
        if self._is_eight is None:
            raise TempoQuantError(f"activations have eight bits at some timesteps, and none is current: {_REMEDY}")
        return _by_row(self._is_eight.to(x.device), x)

    def state(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What `set` changed, for `restore`."""
        return self.current, self._is_eight

    def restore(self, state: tuple[torch.Tensor | None, torch.Tensor | None]) -> None:
        """Go back to a `state`."""
        self.current, self._is_eight = state


_REMEDY = "call the whole model, or the layer inside `with layer.at_timestep(t):`."


def _by_row(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(rows,) to (rows, 1, …), of x's number of dimensions. Raises UnsupportedError unless rows is 1 or x's batch."""
    rows = values.shape[0]
    if rows != 1 and (x.dim() < 3 or x.shape[0] != rows):
        raise UnsupportedError(
            f"{rows} timesteps do not match an input of shape {tuple(x.shape)}: give one per row of the batch."
        )
    return values.reshape(-1, *[1] * (x.dim() - 1))
