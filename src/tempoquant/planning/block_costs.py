"""The cost of quantizing one denoiser, from shapes alone: bytes on disk and in memory,
floating-point operations.

Bytes on disk are exact except for file headers. Memory and speed follow formulas with constants
measured by benchmarks/scale.py: an estimate, good to some tens of percent.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tempoquant.calibrate.phases import phases_of
from tempoquant.checkpoint.tensors import StoredAs, stored_as
from tempoquant.device import compute_dtype
from tempoquant.methods.lowrank import ITERATIONS, OVERSAMPLING
from tempoquant.models.source import SourceModel
from tempoquant.planning.foreseen import HEADER_BYTES, Linear, foreseen_entry, num_bytes
from tempoquant.planning.recording_memory import RecordingMemory
from tempoquant.recipe import Recipe

_CHUNK_COPIES = 7  # of the tokens that statistics process at once: float32, smoothed, quantized, transposed
_WORK_MATRICES = 4  # of the widest linear while it is rounded: weight, residual, working copy, product
_HESSIAN_MATRICES = 1.3  # of in × in: the feedback matrix and the largest product of its factorization
_PANEL = 1024  # the Hessian's sum computes this much beyond the triangle
_SVD_PASSES = 2 * ITERATIONS + 2  # products of the weight with the branch's directions
_EIGEN_PASSES = ITERATIONS + 2  # products of the covariance with them


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one kind of work, over a whole denoiser.

    Attributes:
        forward: running blocks, in the compute dtype.
        statistics: Hessians, in float32.
        solving: factorizations, branches and GPTQ, in float32.
        searching: clip ratios, in float32.
        num_columns: that are rounded one by one.
    """

    forward: float
    statistics: float
    solving: float
    searching: float
    num_columns: int


class DenoiserCosts:
    """One denoiser under one resolved recipe.

    Args:
        source: the 16-bit pipeline.
        num_samples: calibration samples of this denoiser.
        device: that computes; it fixes the dtype.

    Raises:
        ModelError: files are missing or damaged.
    """

    def __init__(self, source: SourceModel, denoiser: str, recipe: Recipe, num_samples: int, device: str) -> None:
        self._forms: Mapping[str, StoredAs] = {name: form for name, (_, form) in source.forms(denoiser).items()}
        self._modulation = source.modulation(denoiser)
        self._linears = {**source.linears(denoiser), **self._modulation}
        self._blocks, self._family = source.blocks(denoiser), source.family
        sample = source.sample_sizes(denoiser, recipe.height or 0, recipe.width or 0, recipe.num_frames or 0)
        self._denoiser, self._recipe, self._num_samples = denoiser, recipe, num_samples
        self.dtype = compute_dtype(device)
        self._memory = RecordingMemory(
            source, recipe.height or 0, recipe.width or 0, recipe.num_frames or 0, self.dtype
        )
        self.width, self.num_tokens = source.width, sample.num_tokens
        self._sample_values, self._text_values = sample.video_values, sample.text_values
        self._num_passes = len(phases_of(recipe))
        if self._num_passes and recipe.block_inputs == "quantized":
            self._num_passes += 1

    @functools.cached_property
    def num_blocks(self) -> int:
        """Return the number of blocks of the denoiser."""
        return len(self._blocks)

    @functools.cached_property
    def output_bytes(self) -> int:
        """Return the bytes of the quantized component's files."""
        total = sum(num_bytes(form) + HEADER_BYTES for form in self._forms.values())
        num_bins = len(self._recipe.bin_fractions_of(self._denoiser)) + 1
        for name, linear in self._quantized():
            weight, bias = self._forms[f"{name}.weight"], self._forms.get(f"{name}.bias")
            dtype = None if bias is None else str(bias.dtype).removeprefix("torch.")
            stored = stored_as(foreseen_entry(self._recipe, linear, dtype, num_bins), num_bins)
            total += sum(num_bytes(form) + HEADER_BYTES for form in stored.values())
            total -= num_bytes(weight) + (0 if bias is None else num_bytes(bias))
        return total

    @property
    def hidden_bytes(self) -> int:
        """Return the bytes of the hidden states before a block and before the next one, all
        samples.
        """
        if not self._num_passes:
            return 0
        return 2 * self._num_samples * self.num_tokens * self.width * self.dtype.itemsize

    @property
    def recorded_bytes(self) -> int:
        """Return the bytes of this denoiser's samples in a store, without the texts."""
        return self._num_samples * self._sample_values * self.dtype.itemsize

    @property
    def text_bytes(self) -> int:
        """Return the bytes of one text's embedding in a store."""
        return self._text_values * self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of the denoiser in memory, in the compute dtype."""
        return sum(math.prod(form.shape) for form in self._forms.values()) * self.dtype.itemsize

    @functools.cached_property
    def block_bytes(self) -> int:
        """Return the bytes of the largest block in memory, in the compute dtype."""
        sizes = dict.fromkeys(self._blocks, 0)
        for name, form in self._forms.items():
            if (block := self._family.block_of(name)) is not None:
                sizes[block] += math.prod(form.shape) * self.dtype.itemsize
        return max(sizes.values())

    @functools.cached_property
    def activation_bytes(self) -> int:
        """Return the peak bytes of a call of the denoiser on one sample, traced; 0 if nothing is
        sampled.
        """
        return self._memory.of_call(self._denoiser) if self.num_tokens else 0

    @functools.cached_property
    def encoding_bytes(self) -> int:
        """Return the bytes of the autoencoder while it encodes a video's conditions, traced; 0 if
        nothing is sampled.
        """
        return self._memory.of_encoding() if self.num_tokens else 0

    def peak_bytes(self, num_tokens_at_once: int) -> float:
        """Return the bytes on the compute device while the most demanding block is quantized,
        without hidden states.
        """
        return self.block_bytes + max(
            (self._block_peak(linears, num_tokens_at_once) for linears in self._by_block().values()), default=0.0
        )

    def _block_peak(self, linears: list[tuple[str, Linear]], num_tokens_at_once: int) -> float:
        """Return the larger of two peaks: running with all Hessians, or rounding one linear after
        another with the remaining ones.

        Covariances are as large as Hessians, and are freed before those begin.
        """
        groups = self._inputs(linears)
        gathers = self._recipe.gptq or self._recipe.deflation
        hessians = [4 * inputs[0].in_features ** 2 if gathers else 0 for inputs in groups]
        running = 0.0
        if self._num_passes:
            rows = min(self.num_tokens, num_tokens_at_once)
            chunk = 4 * _CHUNK_COPIES * rows * max(linear.in_features for _, linear in linears)
            running = sum(hessians) + max(self.activation_bytes, self.activation_bytes / 2 + chunk)
        rounding = (
            sum(hessians[number:])
            + (_HESSIAN_MATRICES - 1) * hessians[number]
            + 4 * _WORK_MATRICES * max(linear.out_features * linear.in_features for linear in inputs)
            for number, inputs in enumerate(groups)
        )
        return max(running, *rounding)

    def operations(self) -> Operations:
        """Count the operations of quantizing the whole denoiser."""
        recipe, num_samples = self._recipe, self._num_samples
        guided = recipe.guidance_scale is None or recipe.guidance_scale > 1
        seen = num_samples * (0.5 if guided and recipe.statistics_branches == "conditional" else 1.0)
        num_search_tokens = recipe.clip_search_tokens_per_bin * (len(recipe.bin_fractions_of(self._denoiser)) + 1)
        statistics = solving = searching = 0.0
        num_columns = 0
        for linears in self._by_block().values():
            for inputs in self._inputs(linears):
                columns = inputs[0].in_features
                sums = recipe.gptq + recipe.deflation
                statistics += sums * seen * inputs[0].num_input_tokens * columns * (columns + _PANEL)
                solving += columns**3 / 3 if recipe.gptq else 0
                if recipe.deflation and inputs[0].rank:
                    solving += 2 * _EIGEN_PASSES * (inputs[0].rank + OVERSAMPLING) * columns**2
            for _, linear in linears:
                size = linear.out_features * linear.in_features
                searching += 2 * len(recipe.clip_candidates()) * num_search_tokens * size
                solving += 2 * _SVD_PASSES * (linear.rank + OVERSAMPLING) * size if linear.rank else 0
                if recipe.gptq:
                    solving += size * linear.in_features
                    num_columns += linear.in_features
        forward = self._num_passes * num_samples * self.num_blocks * self.forward_operations
        return Operations(forward, statistics, solving, searching, num_columns)

    @functools.cached_property
    def forward_operations(self) -> float:
        """Count the operations of one block on one sample: its linears, and both attentions."""
        linears = sum(
            2.0 * linear.out_features * linear.in_features * self._tokens_of(name)
            for name, linear in self._linears.items()
            if linear.block_index == 0
        )
        return linears + 4.0 * self.num_tokens * self.width * (self.num_tokens + self._family.text_tokens)

    def _tokens_of(self, name: str) -> int:
        if name in self._modulation:
            return 1
        return self._family.text_tokens if self._own_name(name) in self._family.text_linears else self.num_tokens

    def _quantized(self) -> Iterator[tuple[str, Linear]]:
        for name, (out_features, in_features, block_index) in self._linears.items():
            alone = name in self._modulation
            format = self._recipe.format_of(name, self._denoiser, block_index, self.num_blocks, alone)
            if format is not None:
                rank = 0 if alone else self._recipe.rank_of(name, self._denoiser)
                yield name, Linear(format, out_features, in_features, self._tokens_of(name), rank, alone)

    def _own_name(self, name: str) -> str:
        """Return a linear's name in its block."""
        return name.removeprefix(f"{self._family.block_of(name)}.")

    def _by_block(self) -> dict[int, list[tuple[str, Linear]]]:
        blocks: dict[int, list[tuple[str, Linear]]] = {}
        for name, linear in self._quantized():
            blocks.setdefault(self._linears[name].block_index, []).append((name, linear))
        return blocks

    def _inputs(self, linears: list[tuple[str, Linear]]) -> list[list[Linear]]:
        """Group the linears of a block by the statistics they need: one set for each, or for those
        that share an input.
        """
        by_input: dict[tuple[str, ...], list[Linear]] = {}
        for name, linear in linears:
            own = self._own_name(name)
            together = next((group for group in self._family.shared_inputs if own in group), (own,))
            key = (*together, linear.format.name, str(linear.rank)) if self._recipe.share_smoothing else (own,)
            by_input.setdefault(key, []).append(linear)
        return list(by_input.values())
