"""Clip search: one clip ratio per layer and timestep bin, by trying candidates. arXiv 2605.27003, section on
timestep-aware activation clipping; the exponent offset k of the paper is folded in as ·2^k."""

from collections.abc import Sequence

import torch

from tempoquant.errors import CalibrationError
from tempoquant.formats import Format, ScaleRule, quantize_activation

# Rows are gathered up to this many before the candidates are tried on them: fewer, larger matrix products.
_CHUNK_ROWS = 4096


class ClipSearch:
    """Squared output error of every candidate clip ratio, summed per timestep bin as calls come in.

    The reference is the quantized layer with unquantized activations, so the error is ‖(Q(x) − x)·Q(R)ᵀ‖²; the branch
    and the bias read the raw x and cancel.

    Args:
        residual: Q(R) dequantized, (out, in) float32.
        candidates: clip ratios, in the order that breaks ties (the first minimum wins).
        num_bins: timestep bins.
        max_tokens: evenly spaced tokens taken from one call.
    """

    def __init__(
        self,
        residual: torch.Tensor,
        format: Format,
        rule: ScaleRule,
        candidates: Sequence[float],
        num_bins: int,
        max_tokens: int,
    ) -> None:
        self._residual = residual
        self._format, self._rule = format, rule
        self._candidates = tuple(candidates)
        self._max_tokens = max_tokens
        self._waiting: list[list[torch.Tensor]] = [[] for _ in range(num_bins)]
        self.squared_error = torch.zeros(num_bins, len(self._candidates), dtype=torch.float64)
        self.num_tokens = [0] * num_bins

    def add(self, smoothed: torch.Tensor, timestep_bin: int) -> None:
        """Take in the smoothed inputs of one call: (…, in) float32."""
        rows = smoothed.reshape(-1, smoothed.shape[-1])
        if rows.shape[0] > self._max_tokens:
            spaced = torch.linspace(0, rows.shape[0] - 1, self._max_tokens, device=rows.device).round().long()
            rows = rows[spaced]
        waiting = self._waiting[timestep_bin]
        waiting.append(rows)
        self.num_tokens[timestep_bin] += rows.shape[0]
        if sum(part.shape[0] for part in waiting) >= _CHUNK_ROWS:
            self._measure(timestep_bin)

    def best(self) -> torch.Tensor:
        """(num_bins,) float32: the candidate of least error in each bin.

        Raises CalibrationError when a bin saw no token: its clip ratio would be a guess.
        """
        for timestep_bin, count in enumerate(self.num_tokens):
            if count == 0:
                raise CalibrationError(
                    f"timestep bin {timestep_bin} of {len(self.num_tokens)} saw no calibration call: "
                    "calibrate with more steps, or use fewer bins."
                )
            self._measure(timestep_bin)
        chosen = self.squared_error.argmin(1)
        return torch.tensor(self._candidates, dtype=torch.float32)[chosen]

    def _measure(self, timestep_bin: int) -> None:
        if not self._waiting[timestep_bin]:
            return
        rows = torch.cat(self._waiting[timestep_bin])
        self._waiting[timestep_bin].clear()
        for index, clip_ratio in enumerate(self._candidates):
            rounded = quantize_activation(rows, self._format, self._rule, clip_ratio)
            error = (rounded - rows) @ self._residual.T
            self.squared_error[timestep_bin, index] += error.square().sum(dtype=torch.float64).cpu()
