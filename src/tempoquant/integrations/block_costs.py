"""What quantizing one expert costs, from shapes alone: bytes on disk and in memory, floating-point operations.

Bytes on disk are exact but for file headers. Memory and speed follow formulas with constants that benchmarks/scale.py
measured: a guide, good to some tens of percent.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from tempoquant.calibrate.phases import phases_of
from tempoquant.checkpoint.schema import LayerEntry
from tempoquant.checkpoint.tensors import StoredAs, stored_as
from tempoquant.errors import ModelError
from tempoquant.formats import Format, ScaleRule
from tempoquant.integrations.expert_weights import EXPERT_COMPONENTS, expert_forms
from tempoquant.integrations.pipeline_folder import read_json
from tempoquant.integrations.wan import compute_dtype
from tempoquant.integrations.wan_blocks import SHARED_INPUTS
from tempoquant.methods.lowrank import ITERATIONS, OVERSAMPLING
from tempoquant.recipe import Recipe
from tempoquant.timesteps import Expert

NUM_TEXT_TOKENS = 512
PIXELS_PER_LATENT = 8
FRAMES_PER_LATENT = 4

_, _TEXT_INPUTS = SHARED_INPUTS  # which read the text, the others the video
HEADER_BYTES = 128  # of one tensor in a safetensors file
_ACTIVATION_WIDTHS = 11  # a block's activations at their peak, in hidden states of the sample
_CHUNK_COPIES = 7  # of the tokens that statistics are gathered from at once: float32, smoothed, quantized, transposed
_WORK_MATRICES = 4  # of the widest linear while it is rounded: weight, residual, working copy, product
_HESSIAN_MATRICES = 1.3  # of in × in: the feedback matrix and the largest product of its factorization
_PANEL = 1024  # what the Hessian's sum computes beyond the triangle
_SVD_PASSES = 2 * ITERATIONS + 2  # products of the weight with the branch's directions
_EIGEN_PASSES = ITERATIONS + 2  # products of the covariance with them


class Linear(NamedTuple):
    """One linear of a block that gets four bits."""

    format: Format
    out_features: int
    in_features: int
    num_input_tokens: int
    rank: int


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one kind of work, over a whole expert.

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


class ExpertCosts:
    """One expert under one resolved recipe.

    Args:
        source: folder of the 16-bit pipeline.
        num_samples: calibration samples of this expert.
        device: that computes; it fixes the dtype.

    Raises:
        ModelError: files are missing or damaged.
    """

    def __init__(self, source: Path, expert: Expert, recipe: Recipe, num_samples: int, device: str) -> None:
        self._forms: Mapping[str, StoredAs] = {name: form for name, (_, form) in expert_forms(source, expert).items()}
        file = source / EXPERT_COMPONENTS[expert] / "config.json"
        config = read_json(file)
        needed = ("num_attention_heads", "attention_head_dim", "patch_size", "in_channels", "text_dim")
        if missing := [key for key in needed if key not in config]:
            raise ModelError(f"{file} does not say {missing[0]}: fetch the model again.")
        self._expert, self._recipe, self._num_samples = expert, recipe, num_samples
        self.dtype = compute_dtype(device)
        self.width: int = config["num_attention_heads"] * config["attention_head_dim"]
        self.num_tokens = video_tokens(recipe, config["patch_size"])
        self._sample_values = config["in_channels"] * self.num_tokens * math.prod(config["patch_size"])
        self._text_values = NUM_TEXT_TOKENS * config["text_dim"]
        self._num_passes = len(phases_of(recipe))
        if self._num_passes and recipe.block_inputs == "quantized":
            self._num_passes += 1

    @functools.cached_property
    def num_blocks(self) -> int:
        """How many blocks the expert has."""
        return 1 + max(int(name.split(".")[1]) for name in self._forms if name.startswith("blocks."))

    @functools.cached_property
    def output_bytes(self) -> int:
        """Of the quantized component's files."""
        total = sum(_num_bytes(form) + HEADER_BYTES for form in self._forms.values())
        num_bins = len(self._recipe.bin_fractions(self._expert)) + 1
        for name, linear in self._quantized():
            weight, bias = self._forms[f"{name}.weight"], self._forms.get(f"{name}.bias")
            dtype = None if bias is None else str(bias.dtype).removeprefix("torch.")
            stored = stored_as(foreseen_entry(self._recipe, linear, dtype, num_bins), num_bins)
            total += sum(_num_bytes(form) + HEADER_BYTES for form in stored.values())
            total -= _num_bytes(weight) + (0 if bias is None else _num_bytes(bias))
        return total

    @property
    def hidden_bytes(self) -> int:
        """Of the hidden states before a block and before the next one, all samples."""
        if not self._num_passes:
            return 0
        return 2 * self._num_samples * self.num_tokens * self.width * self.dtype.itemsize

    @property
    def recorded_bytes(self) -> int:
        """Of this expert's samples in a store, but for the texts."""
        return self._num_samples * self._sample_values * self.dtype.itemsize

    @property
    def text_bytes(self) -> int:
        """Of one text's embedding in a store."""
        return self._text_values * self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        """Of the expert in memory, in the compute dtype."""
        return sum(math.prod(form.shape) for form in self._forms.values()) * self.dtype.itemsize

    @functools.cached_property
    def block_bytes(self) -> int:
        """Of the largest block in memory, in the compute dtype."""
        sizes = [0] * self.num_blocks
        for name, form in self._forms.items():
            if name.startswith("blocks."):
                sizes[int(name.split(".")[1])] += math.prod(form.shape) * self.dtype.itemsize
        return max(sizes)

    @property
    def activation_bytes(self) -> float:
        """Of a block that runs on one sample, at its peak."""
        return _ACTIVATION_WIDTHS * self.num_tokens * self.width * self.dtype.itemsize

    def peak_bytes(self, num_tokens_at_once: int) -> float:
        """On the device that computes, while the block that needs most of it is quantized; hidden states apart."""
        return self.block_bytes + max(
            (self._block_peak(linears, num_tokens_at_once) for linears in self._by_block().values()), default=0.0
        )

    def _block_peak(self, linears: list[tuple[str, Linear]], num_tokens_at_once: int) -> float:
        """Running with all Hessians there, or rounding one linear after another, with the Hessians that are left.

        Covariances are as large as Hessians, and are used up before those begin.
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
            sum(hessians[number:]) + (_HESSIAN_MATRICES - 1) * hessians[number]
            + 4 * _WORK_MATRICES * max(linear.out_features * linear.in_features for linear in inputs)
            for number, inputs in enumerate(groups)
        )  # fmt: skip
        return max(running, *rounding)

    def operations(self) -> Operations:
        """Of quantizing the whole expert."""
        recipe, num_samples = self._recipe, self._num_samples
        guided = recipe.guidance_scale is None or recipe.guidance_scale > 1
        seen = num_samples * (0.5 if guided and recipe.statistics_branches == "conditional" else 1.0)
        num_search_tokens = recipe.clip_search_tokens_per_bin * (len(recipe.bin_fractions(self._expert)) + 1)
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
        """Of one block on one sample: its linears, and both attentions."""
        linears = sum(
            2.0 * math.prod(form.shape) * self._tokens_of(name)
            for name, form in self._forms.items()
            if name.startswith("blocks.0.") and name.endswith(".weight") and len(form.shape) == 2
        )
        return linears + 4.0 * self.num_tokens * self.width * (self.num_tokens + NUM_TEXT_TOKENS)

    def _tokens_of(self, name: str) -> int:
        return NUM_TEXT_TOKENS if any(part in name for part in _TEXT_INPUTS) else self.num_tokens

    def _quantized(self) -> Iterator[tuple[str, Linear]]:
        for name, form in self._forms.items():
            linear = name.removesuffix(".weight")
            if name.startswith("blocks.") and linear != name and len(form.shape) == 2:
                format = self._recipe.format_of(linear, self._expert, int(name.split(".")[1]), self.num_blocks)
                if format is not None:
                    rank = self._recipe.rank_of(linear, self._expert)
                    yield linear, Linear(format, form.shape[0], form.shape[1], self._tokens_of(name), rank)

    def _by_block(self) -> dict[int, list[tuple[str, Linear]]]:
        blocks: dict[int, list[tuple[str, Linear]]] = {}
        for name, linear in self._quantized():
            blocks.setdefault(int(name.split(".")[1]), []).append((name, linear))
        return blocks

    def _inputs(self, linears: list[tuple[str, Linear]]) -> list[list[Linear]]:
        """The linears of a block by the statistics they need: one set for each, or for those that share an input."""
        by_input: dict[tuple[str, ...], list[Linear]] = {}
        for name, linear in linears:
            own = name.split(".", 2)[2]
            together = next((group for group in SHARED_INPUTS if own in group), (own,))
            key = (*together, linear.format.name, str(linear.rank)) if self._recipe.share_smoothing else (own,)
            by_input.setdefault(key, []).append(linear)
        return list(by_input.values())


def foreseen_entry(recipe: Recipe, linear: Linear, bias_dtype: str | None, num_bins: int) -> LayerEntry:
    """What the checkpoint will say of a linear; bias_dtype: of its 16-bit bias, None for no bias."""
    recipe = recipe.suited_to(linear.in_features, linear.out_features, num_bins)
    deflated, has_bins = recipe.deflation and linear.rank > 0, num_bins > 1
    by_bin = recipe.centring and recipe.centring_by_bin and has_bins
    changed = "float16" if by_bin else "float32"  # as `changed_bias` makes it
    return LayerEntry(
        linear.format, ScaleRule(recipe.activation_scale_rule), linear.in_features, linear.out_features, linear.rank,
        recipe.smoothing_alpha is not None, changed if recipe.centring else bias_dtype,
        deflated, recipe.centring, recipe.rotation,
        centred_by_bin=by_bin,
        deflated_by_bin=deflated and recipe.deflation_by_bin and has_bins,
    )  # fmt: skip


def video_tokens(recipe: Recipe, patch_size: list[int]) -> int:
    """Tokens of one video of a resolved recipe; 0 where the recipe samples none."""
    if recipe.num_frames is None or recipe.height is None or recipe.width is None:
        return 0
    frames = (recipe.num_frames - 1) // FRAMES_PER_LATENT + 1
    rows, columns = recipe.height // PIXELS_PER_LATENT, recipe.width // PIXELS_PER_LATENT
    return (frames // patch_size[0]) * (rows // patch_size[1]) * (columns // patch_size[2])


def _num_bytes(form: StoredAs) -> int:
    return math.prod(form.shape) * torch.empty((), dtype=form.dtype).element_size()
