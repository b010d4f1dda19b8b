"""QuantizedLinear: a QuantizedLayer as a module that diffusers, accelerate and peft accept as an
nn.Linear.

The weight stays packed in memory. All tensors are held in their stored form (docs/checkpoint.md),
so that state_dict *is* the checkpoint, and keep their dtypes under any cast of the module. They are
parameters, not buffers, because accelerate leaves buffers on the accelerator when it offloads a
module.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tempoquant.checkpoint.schema import LayerEntry
from tempoquant.checkpoint.tensors import KEYS, check_layer, entry_of, from_stored, keys_by_bin, stored_as, to_stored
from tempoquant.errors import CheckpointError
from tempoquant.input_transform import InputTransform
from tempoquant.kernels.fp8_window import fp8_exact_rows
from tempoquant.kernels.input_gradient import GradientTensors, gradient_tensors
from tempoquant.kernels.reference import WeightTensors
from tempoquant.layer import QuantizedLayer
from tempoquant.runtime.bin_clock import BinClock
from tempoquant.runtime.by_tape import kind_of
from tempoquant.runtime.linear_computation import compute
from tempoquant.runtime.packed_weight import PackedWeight
from tempoquant.runtime.shared_input import SharedInput
from tempoquant.runtime.straight_through import straight_through


class QuantizedLinear(nn.Linear):
    """One 4-bit linear.

    Attributes:
        entry: fixes every tensor's presence, dtype and shape.
        clock: holds the current timestep bin; all layers of a model share it.
        compute_dtype: the dtype that `weight.dtype` reports, and so the dtype of peft's adapters.
        shared_input: joins the linears that read one input (`share_inputs`); None for none.
        keys_by_bin: the tensors that differ by timestep bin.
        kind: stands for all layers of its shapes (`by_tape.kind_of`).
        packed, scale, tensor_scale, smoothing_factor, clip_ratio, up, down, deflation,
            input_offset, bias: as stored, or None where absent.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    tensor_scale: torch.Tensor | None
    smoothing_factor: torch.Tensor | None
    clip_ratio: torch.Tensor
    up: torch.Tensor | None
    down: torch.Tensor | None
    deflation: torch.Tensor | None
    input_offset: torch.Tensor | None

    def __init__(
        self,
        entry: LayerEntry,
        clock: BinClock,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        """Make a layer with uninitialized tensors, to be loaded into. `device="meta"` allocates
        nothing.
        """
        nn.Module.__init__(self)  # nn.Linear's would allocate a dense weight
        self.in_features, self.out_features = entry.in_features, entry.out_features
        self.entry, self.clock, self.compute_dtype = entry, clock, compute_dtype
        self.shared_input: SharedInput | None = None
        self._fits_fp8: bool | None = None
        self.keys_by_bin, self.kind = keys_by_bin(entry), kind_of(entry, clock.bins.num_bins)
        table = stored_as(entry, clock.bins.num_bins)
        for key in KEYS:
            form = table.get(key)
            empty = None if form is None else torch.empty(form.shape, dtype=form.dtype, device=device)
            self.register_parameter(key, None if empty is None else nn.Parameter(empty, requires_grad=False))

    @classmethod
    def from_layer(
        cls, layer: QuantizedLayer, clock: BinClock | None = None, compute_dtype: torch.dtype = torch.bfloat16
    ) -> "QuantizedLinear":
        """Make a module that runs a layer, sharing its memory. Raises CheckpointError if the bins
        are not the clock's.
        """
        clock = clock or BinClock(layer.bins)
        if clock.bins != layer.bins:
            raise CheckpointError(
                f"a layer with bins {layer.bins.edges} needs a clock with them, not {clock.bins.edges}."
            )
        linear = cls(entry_of(layer), clock, compute_dtype, device="meta")
        for key, tensor in to_stored(layer, "the layer").items():
            setattr(linear, key, nn.Parameter(tensor, requires_grad=False))
        linear.settle()
        return linear

    def to_layer(self) -> QuantizedLayer:
        """Return the layer that this module runs, sharing its memory."""
        return from_stored(self._stored(), self.entry, self.clock.bins)

    def check(self, name: str) -> None:
        """Raise CheckpointError, starting with `name`, unless every tensor agrees with the
        entry.
        """
        check_layer(self._stored(), self.entry, self.clock.bins.num_bins, name)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """Return the dense weight's shape, dtype and device without values; using its values raises
        UnsupportedError.
        """
        return PackedWeight(self.out_features, self.in_features, self.compute_dtype, self.packed.device)

    @property
    def num_bytes(self) -> int:
        """Return the bytes that replace the 16-bit weight, as `QuantizedLayer.num_bytes` counts
        them.
        """
        return self.to_layer().num_bytes

    @property
    def bits_per_weight(self) -> float:
        return self.to_layer().bits_per_weight

    @property
    def fits_fp8(self) -> bool:
        """Return whether FP8 holds every number of the weight, in a format that allows it.

        A row of an MXFP4 weight may span more octaves; then the layer runs in bfloat16. `settle`
        looks it up.
        """
        if self._fits_fp8 is None:
            weight = self.to_layer().at_bin(0).weight_tensors  # codes and scales are the same in every bin
            self._fits_fp8 = bool(fp8_exact_rows(weight, self.entry.format).all())
        return self._fits_fp8

    def settle(self) -> None:
        """Look up the facts about the weight's numbers that a compiled graph cannot compute; does
        nothing on meta.
        """
        if self.entry.format.is_fp8_exact and not self.packed.is_meta:
            _ = self.fits_fp8

    def dequantize(self, timestep_bin: int | None = None) -> torch.Tensor:
        """Return the effective weight, branch and smoothing included: (out, in) float32; see
        `QuantizedLayer.dequantize`.
        """
        return self.to_layer().dequantize(timestep_bin)

    def at_timestep(self, timestep: torch.Tensor | float) -> contextlib.AbstractContextManager[None]:
        """Run a layer that stands alone in `timestep`'s bin, within this context.

        In a model, all layers share the clock: call the model, which sets it from its own
        `timestep`.
        """
        return self.clock.at(timestep)

    @straight_through
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer: (batch, …, in) to (batch, …, out), in the dtype of x; the gradient is
        that of the dequantized layer.
        """
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):  # autocast would compute the exact products in 16 bits
                return compute(self, x)
        return compute(self, x)

    def gradient_tensors(self, x: torch.Tensor) -> list[GradientTensors]:
        """Return the tensors of the gradient at x: one for the batch, or one for each row if rows
        have separate weights.
        """
        bins = self.clock.rows(x) if self.keys_by_bin else None
        if bins is None:
            return [gradient_tensors(self.input_transform(), self.weight_tensors())]
        of_rows = (bins if "up" in self.keys_by_bin else bins[:1]).split(1)
        return [gradient_tensors(self.input_transform(row), self.weight_tensors(row)) for row in of_rows]

    def extra_repr(self) -> str:
        entry = self.entry
        smoothed = ", smoothed" if entry.smoothed else ""
        return (
            f"in_features={entry.in_features}, out_features={entry.out_features}, bias={entry.bias is not None}, "
            f"format={entry.format.name}, rank={entry.rank}{smoothed}, timestep_bins={self.clock.bins.num_bins}"
        )

    def input_transform(self, bins: torch.Tensor | None = None) -> InputTransform:
        """Return the transform of inputs of one timestep bin, (1,) int64; None suffices without
        tensors by bin, or with one bin.
        """
        return self.transform_with(self._of_bin("deflation", bins), self._of_bin("input_offset", bins))

    def transform_with(self, deflation: torch.Tensor | None, input_offset: torch.Tensor | None) -> InputTransform:
        """Return the transform with these tensors of one bin: (in, rank) and (in,)."""
        smoothing_factor = self.smoothing_factor
        return InputTransform(
            smoothing_factor=None if smoothing_factor is None else smoothing_factor.view(torch.bfloat16),
            rotated=self.entry.rotated,
            down=self.down,
            deflation=deflation,
            input_offset=input_offset,
        )

    def weight_tensors(self, bins: torch.Tensor | None = None) -> WeightTensors:
        """Return the weight for such inputs; `bins` as for `input_transform`."""
        return self.weight_with(self._of_bin("up", bins), self._of_bin("bias", bins))

    def weight_with(self, up: torch.Tensor | None, bias: torch.Tensor | None) -> WeightTensors:
        """Return the weight with these tensors of one bin: (out, rank) and (out,)."""
        tensor_scale = self.tensor_scale
        return WeightTensors(
            packed=self.packed,
            scale=self.scale,
            tensor_scale=None if tensor_scale is None else tensor_scale.view(torch.float32).reshape(()),
            up=up,
            bias=bias,
        )

    def _of_bin(self, key: str, bins: torch.Tensor | None) -> torch.Tensor | None:
        tensor: torch.Tensor | None = getattr(self, key)
        if tensor is None or key not in self.keys_by_bin:
            return tensor
        # The bin's number stays on the device, so there is no host synchronization.
        (of_bin,) = (tensor if bins is None else tensor.index_select(0, bins)).unbind()
        return of_bin

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._fits_fp8 = None  # other numbers may not fit
        self.settle()

    def _stored(self) -> dict[str, torch.Tensor]:
        return {key: tensor.detach() for key in KEYS if (tensor := getattr(self, key)) is not None}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # Casts (`.to(dtype)`, layerwise casting) reach tensors through here. They skip integers, so
        # floating tensors go through as bytes: devices and sharing change, values never do.
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            return fn(tensor.view(torch.uint8)).view(tensor.dtype) if tensor.is_floating_point() else fn(tensor)

        return super()._apply(keep_dtype, recurse)
