"""LoRA files: added to an expert's 16-bit weights one tensor at a time, while those are read from disk.

A key is a prefix, a module and what is stored of it. Three prefixes are understood, as in diffusers: `transformer.` (or
`transformer_2.`) before diffusers' names, `diffusion_model.` before Wan's own names, and `lora_unet_` before Wan's own
names with underscores for dots. Diffusers drops some differences (of norms, of modulations, of a bias without a weight)
without a word; here everything a file holds is added, or the file is refused.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tempoquant.checkpoint.files import open_weights, sha256_of
from tempoquant.errors import CheckpointError, ModelError

_DIFFUSERS_PREFIXES = ("transformer.", "transformer_2.")
_WAN_PREFIXES = ("diffusion_model.", "lora_unet_")
_STORED = {
    ".lora_A.weight": "down", ".lora_down.weight": "down", ".lora_B.weight": "up", ".lora_up.weight": "up",
    ".lora_B.bias": "up_bias", ".alpha": "alpha", ".diff": "diff", ".diff_b": "diff_b",
}  # fmt: skip
_FLOATS = {"F16", "BF16", "F32", "F64"}
_INTEGERS = {"I16", "I32", "I64"}
_PEFT_METADATA = "lora_adapter_metadata"

# Wan's own names, with underscores for dots, to diffusers' names. Only norm3 has weights, and it is diffusers' norm2.
_IN_BLOCK = {
    "ffn_0": "ffn.net.0.proj", "ffn_2": "ffn.net.2", "norm3": "norm2", "modulation": "scale_shift_table",
    "cross_attn_k_img": "attn2.add_k_proj", "cross_attn_v_img": "attn2.add_v_proj",
    "cross_attn_norm_k_img": "attn2.norm_added_k",
} | {
    f"{wan}_{part}": f"{ours}.{name}"
    for wan, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for part, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"),
                       ("norm_k", "norm_k"))
}  # fmt: skip
_OUTSIDE = {
    "patch_embedding": "patch_embedding", "head_head": "proj_out", "head_modulation": "scale_shift_table",
    "time_projection_1": "condition_embedder.time_proj",
    "time_embedding_0": "condition_embedder.time_embedder.linear_1",
    "time_embedding_2": "condition_embedder.time_embedder.linear_2",
    "text_embedding_0": "condition_embedder.text_embedder.linear_1",
    "text_embedding_2": "condition_embedder.text_embedder.linear_2",
    "img_emb_proj_0": "condition_embedder.image_embedder.norm1",
    "img_emb_proj_1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb_proj_3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb_proj_4": "condition_embedder.image_embedder.norm2",
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """What is added to one tensor of `shape`: factor · up · down, or factor · up where there is no down.

    `up` and `down` are keys of the LoRA file, of shapes (out, rank) and (rank, in); a convolution's have further
    dimensions, which are 1 in `up`.
    """

    shape: tuple[int, ...]
    up: str
    down: str | None
    factor: float

    def delta(self, weights: Any, device: torch.device) -> torch.Tensor:
        """The difference itself, float32, of `shape`. `weights` is the open LoRA file."""
        up = weights.get_tensor(self.up).to(device, torch.float32) * self.factor
        if self.down is None:
            return up
        down = weights.get_tensor(self.down).to(device, torch.float32)
        return (up.flatten(1) @ down.flatten(1)).reshape(self.shape)


@dataclass(frozen=True)
class Lora:
    """One LoRA file, ready to be added to weights one at a time.

    Holds the names of what it changes, by the expert's tensor name, and reads the values from `file` when they are
    needed. `fuse` cannot know which tensors it will never be shown: call `check_fits` first.
    """

    file: Path
    sha256: str
    changes: Mapping[str, tuple[Change, ...]] = field(repr=False)

    @property
    def name(self) -> str:
        """The file's name without its folder, for notes."""
        return self.file.name

    @classmethod
    def load(cls, file: Path) -> "Lora":
        """Read a file's names and factors, and look at every value once.

        Raises:
            ModelError: the file is missing, pickled or truncated; it holds no LoRA, a key that is not understood, NaN
                or Inf; a pair is incomplete, or its ranks differ; its alpha is stated twice, or not a number.
        """
        if not file.is_file():
            raise ModelError(f"there is no LoRA file {file}.")
        try:
            with open_weights(file) as weights:
                changes = _read_changes(file, weights)
                _require_finite(file, weights)
            return cls(file, sha256_of(file), changes)
        except (CheckpointError, SafetensorError, OSError) as error:
            raise ModelError(f"the LoRA cannot be read: {error}") from error

    def check_fits(self, forms: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ModelError unless every tensor that the LoRA changes is in `forms` (name to shape), in its shape."""
        missing = sorted(self.changes.keys() - forms.keys())
        if missing:
            raise ModelError(
                f"{self.name} changes {len(missing)} tensor(s) that the expert does not have, such as {missing[0]}: "
                "it is a LoRA for another model."
            )
        for name in self.changes:
            self._require_shape(name, tuple(forms[name]))

    @torch.no_grad()
    def fuse(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` plus what the LoRA adds to it: summed in float32, in the tensor's dtype, shape and device.

        `name` is the tensor's in the diffusers expert, such as blocks.3.attn1.to_q.weight. A tensor that the LoRA says
        nothing about is returned itself.

        Raises:
            ModelError: the shapes do not fit, the sum overflows the dtype, or the file is no longer what was loaded.
        """
        if name not in self.changes:
            return tensor
        self._require_shape(name, tuple(tensor.shape))
        total = tensor.float()
        try:
            with open_weights(self.file) as weights:
                for change in self.changes[name]:
                    total = total + change.delta(weights, tensor.device)
        except (CheckpointError, SafetensorError) as error:
            raise ModelError(f"{self.file} was changed after it was loaded: {error}") from error
        fused = total.to(tensor.dtype)
        if not bool(torch.isfinite(fused).all()):
            raise ModelError(f"{name} overflows {tensor.dtype} when {self.name} is added: the LoRA is damaged.")
        return fused

    def _require_shape(self, name: str, shape: tuple[int, ...]) -> None:
        for change in self.changes[name]:
            if change.shape != shape:
                raise ModelError(
                    f"{self.name} changes {name} as a tensor of shape {_times(change.shape)}, but the expert's has "
                    f"{_times(shape)}: it is a LoRA for another model."
                )


def _times(shape: Iterable[int]) -> str:
    return " × ".join(map(str, shape)) or "()"


def _read_changes(file: Path, weights: Any) -> dict[str, tuple[Change, ...]]:
    """What the open file changes, by the expert's tensor name. Raises ModelError for what is not understood."""
    keys = sorted(weights.keys())
    prefix = next((p for p in _DIFFUSERS_PREFIXES + _WAN_PREFIXES if any(key.startswith(p) for key in keys)), None)
    if prefix is None or not any("lora_" in key.removeprefix(prefix) or ".diff" in key for key in keys):
        raise ModelError(f"{file} holds no LoRA of Wan: none of its {len(keys)} key(s) has a name that LoRAs have.")
    modules: dict[str, dict[str, str]] = {}
    for key in keys:
        module, stored = _understand(file, key, prefix)
        if modules.setdefault(module, {}).setdefault(stored, key) != key:
            raise ModelError(f"{file} states the same twice, as {modules[module][stored]} and as {key}.")
    config = _peft_config(file, weights.metadata() or {}, prefix)
    changes: dict[str, tuple[Change, ...]] = {}
    for module, found in modules.items():
        for name, change in _changes_of(file, module, found, weights, config):
            changes[name] = (*changes.get(name, ()), change)
    return changes


def _understand(file: Path, key: str, prefix: str) -> tuple[str, str]:
    """The expert's module (or parameter) that a key is about, and what the key stores of it: a value of `_STORED`."""
    spelled = re.sub(r"\.diff_m$", ".modulation.diff", key)  # LightX2V's short form
    suffix = next((suffix for suffix in _STORED if spelled.endswith(suffix)), None)
    if suffix is not None and spelled.startswith(prefix):
        module: str | None = spelled[len(prefix) : -len(suffix)]
        if module and prefix in _WAN_PREFIXES:
            module = _diffusers_name(module)
        if module:
            return module, _STORED[suffix]
    raise ModelError(
        f"{file} holds {key[:120]}, which is not understood: a key must begin with {prefix} as others here do, name a "
        "part of Wan, and hold half of a LoRA pair, an alpha, a diff, diff_b or diff_m (no DoRA, LoHa or LoKr)."
    )


def _diffusers_name(module: str) -> str | None:
    """Diffusers' name of a module (or parameter) that has Wan's own name, in dots or underscores; None if unknown."""
    flat = module.replace(".", "_")
    block = re.fullmatch(r"blocks_([0-9]+)_(.+)", flat)
    if block is None:
        return _OUTSIDE.get(flat)
    part = _IN_BLOCK.get(block[2])
    return part and f"blocks.{block[1]}.{part}"


def _changes_of(
    file: Path, module: str, found: dict[str, str], weights: Any, config: "_PeftConfig | None"
) -> Iterator[tuple[str, Change]]:
    """Tensor name and change of everything that a file holds of one module; `found` maps what is stored to its key."""
    shapes = {stored: tuple(weights.get_slice(key).get_shape()) for stored, key in found.items()}
    weight = module if module.endswith("scale_shift_table") else f"{module}.weight"  # a parameter, not a module
    if found.keys() & {"down", "up", "alpha", "up_bias"}:
        if not found.keys() >= {"down", "up"}:
            raise ModelError(f"{file} holds {next(iter(found.values()))} without the whole pair of down and up.")
        down, up = shapes["down"], shapes["up"]
        rank = down[0] if down else 0
        if len(down) < 2 or rank < 1 or up[1:] != (rank,) + (1,) * (len(down) - 2):
            raise ModelError(
                f"{file}: the ranks of {found['down']}, {_times(down)}, and {found['up']}, {_times(up)}, differ."
            )
        factor = _factor(file, module, rank, found.get("alpha"), weights, config)
        yield weight, Change((up[0], *down[1:]), found["up"], found["down"], factor)
        if "up_bias" in found:
            yield f"{module}.bias", Change(shapes["up_bias"], found["up_bias"], None, factor)
    for stored, name in (("diff", weight), ("diff_b", f"{module}.bias")):
        if stored in found:
            yield name, Change(shapes[stored], found[stored], None, 1.0)


@dataclass(frozen=True)
class _PeftConfig:
    """The part of PEFT's LoraConfig that decides the factor."""

    lora_alpha: float
    alpha_pattern: dict[str, float]
    use_rslora: bool

    def factor(self, module: str, rank: int) -> float:
        """Alpha over rank, or over its root; the first pattern that matches the end of the module's name decides."""
        alphas = (a for pattern, a in self.alpha_pattern.items() if re.match(rf"(.*\.)?({pattern})$", module))
        return next(alphas, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _factor(file: Path, module: str, rank: int, alpha: str | None, weights: Any, config: _PeftConfig | None) -> float:
    """What up · down is multiplied by: alpha / rank, or 1 where no alpha is stated. `alpha` is a key."""
    if alpha is None:
        return 1.0 if config is None else config.factor(module, rank)
    if config is not None:
        raise ModelError(f"{file} states alpha twice, as {alpha} and in its {_PEFT_METADATA}.")
    value = weights.get_tensor(alpha)
    if value.numel() != 1 or not math.isfinite(value.item()):
        raise ModelError(f"{file}: {alpha} is not one finite number.")
    return float(value.item()) / rank


def _peft_config(file: Path, metadata: dict[str, str], prefix: str) -> _PeftConfig | None:
    """What diffusers' save_lora_weights wrote about alpha into a file's header; None where it wrote nothing."""
    if _PEFT_METADATA not in metadata:
        return None
    component = prefix if prefix in _DIFFUSERS_PREFIXES else _DIFFUSERS_PREFIXES[0]
    try:
        record = json.loads(metadata[_PEFT_METADATA])
        config = {key.removeprefix(component): value for key, value in record.items() if key.startswith(component)}
        patterns = {re.compile(p).pattern: float(alpha) for p, alpha in (config.get("alpha_pattern") or {}).items()}
        read = _PeftConfig(float(config["lora_alpha"]), patterns, bool(config.get("use_rslora")))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, re.error) as error:
        raise ModelError(f"{file}: its {_PEFT_METADATA} states no alpha that can be read ({error!r}).") from error
    if not all(map(math.isfinite, (read.lora_alpha, *patterns.values()))):
        raise ModelError(f"{file}: its {_PEFT_METADATA} states an alpha that is not finite.")
    if config.get("use_dora"):
        raise ModelError(f"{file} is a DoRA, which is not a sum of weights: only plain LoRAs can be fused.")
    return read


def _require_finite(file: Path, weights: Any) -> None:
    """Raise ModelError unless every value is a finite number (an integer only as alpha). Holds one tensor at a time."""
    for key in weights.keys():  # noqa: SIM118 (not a dict)
        dtype = weights.get_slice(key).get_dtype()
        if dtype not in (_FLOATS | _INTEGERS if key.endswith(".alpha") else _FLOATS):
            raise ModelError(f"{file}: {key} is stored as {dtype}, but a LoRA is stored in 16 bits or more.")
        if not bool(torch.isfinite(weights.get_tensor(key)).all()):
            raise ModelError(f"{file}: {key} holds NaN or Inf: fetch the file again.")
