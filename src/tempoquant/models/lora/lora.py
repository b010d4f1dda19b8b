"""LoRA files, added to a denoiser's 16-bit weights one tensor at a time, while those are read from
disk.

Diffusers silently drops some differences (of norms, of modulations, of a bias without a weight).
Here everything in a file is added, or the file is refused.
"""

import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tempoquant.checkpoint.files import open_weights, sha256_of
from tempoquant.errors import CheckpointError, ModelError
from tempoquant.models.family import ModelFamily
from tempoquant.models.lora.change import Change, require_moderate
from tempoquant.models.lora.denoisers import share_of
from tempoquant.models.lora.names import prefix_of, understand
from tempoquant.models.lora.settings import PeftConfig, peft_config, stated_steps
from tempoquant.timesteps import Denoiser

_logger = logging.getLogger(__name__)

_FLOATS = {"F16", "BF16", "F32", "F64"}
_INTEGERS = {"I16", "I32", "I64"}

MAX_STRENGTH = 100.0
"""The largest strength of either sign. Useful strengths are around 1, and sliders reach a few tens;
more is a mistake.
"""


@dataclass(frozen=True)
class Lora:
    """One LoRA file, ready to be added to weights one at a time.

    It holds the names of its changes, by the denoiser's tensor name, and reads the values from
    `file` when they are needed.

    Attributes:
        sha256: of the file.
        may_lack: whether a denoiser of this family may lack a tensor that others of it have.
        num_steps: of the sampler it was distilled for, if its name states it.
        strength: the factor of its change.
        others: names of other denoisers whose LoRAs the file also holds.
    """

    file: Path
    sha256: str
    changes: Mapping[str, tuple[Change, ...]] = field(repr=False)
    may_lack: Callable[[str], bool] = field(repr=False)
    num_steps: int | None = None
    strength: float = 1.0
    others: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the file's name without its folder, for notes."""
        return self.file.name

    @classmethod
    def load(
        cls,
        file: Path,
        family: ModelFamily,
        strength: float = 1.0,
        denoisers: Sequence[Denoiser] = (),
        name: str = "",
    ) -> "Lora":
        """Read a file's names and factors, and look at every value once.

        Args:
            family: of the model that it is for.
            denoisers: of the model, whose LoRAs a file may hold together; none for a file of one
                denoiser.
            name: the denoiser whose LoRA to read.

        Raises:
            ModelError: the file is missing, pickled or truncated; it holds no LoRA, or other
                denoisers' alone, an unknown key, NaN or Inf; a pair is incomplete, or its ranks
                differ; its alpha is stated twice, or not a number; the strength is 0, not finite or
                beyond `MAX_STRENGTH`; or its change exceeds float16.
        """
        if not file.is_file():
            raise ModelError(f"there is no LoRA file {file}.")
        if not 0 < abs(strength) <= MAX_STRENGTH:
            raise ModelError(
                f"{file.name} with strength {strength:g}: give a number from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g} "
                "that is not 0."
            )
        try:
            with open_weights(file) as weights:
                share = share_of(file, sorted(weights.keys()), denoisers, name)
                changes = _read_changes(file, share.keys, weights, family)
                _require_finite(file, weights)
                require_moderate(file, weights, changes, strength)
                num_steps = stated_steps(file, weights.metadata() or {})
            return cls(file, sha256_of(file), changes, family.may_lack, num_steps, strength, share.others)
        except (CheckpointError, SafetensorError, OSError) as error:
            raise ModelError(f"the LoRA cannot be read: {error}") from error

    def check_fits(self, forms: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ModelError unless every tensor that the LoRA changes is in `forms` (name to shape),
        in its shape.

        Only tensors that `may_lack` names may be missing, which is logged.
        """
        missing = sorted(self.changes.keys() - forms.keys())
        foreign = [name for name in missing if not self.may_lack(name)]
        if foreign or len(missing) == len(self.changes):
            raise ModelError(
                f"{self.name} changes {len(missing)} tensor(s) that the denoiser does not have, such as "
                f"{(foreign or missing)[0]}: it is a LoRA for another model."
            )
        if missing:
            _logger.warning(
                "%s also changes %d tensors that other models of the family have and this one lacks, such as %s: they "
                "are left out",
                self.name,
                len(missing),
                missing[0],
            )
        for name in self.changes:
            if name in forms:
                self._require_shape(name, tuple(forms[name]))

    def fuse(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Run `LoraSum.fuse` for this one alone."""
        return LoraSum((self,)).fuse(name, tensor)

    def add_to(self, name: str, total: torch.Tensor) -> torch.Tensor:
        """Add the LoRA's change to a tensor's value, float32. Raises ModelError for other shapes or
        a changed file.
        """
        self._require_shape(name, tuple(total.shape))
        try:
            with open_weights(self.file) as weights:
                for change in self.changes[name]:
                    total = total + self.strength * change.delta(weights, total.device)
        except (CheckpointError, SafetensorError) as error:
            raise ModelError(f"{self.file} was changed after it was loaded: {error}") from error
        return total

    def _require_shape(self, name: str, shape: tuple[int, ...]) -> None:
        for change in self.changes[name]:
            if change.shape != shape:
                raise ModelError(
                    f"{self.name} changes {name} as a tensor of shape {_times(change.shape)}, but the denoiser's has "
                    f"{_times(shape)}: it is a LoRA for another model."
                )


@dataclass(frozen=True)
class LoraSum:
    """The LoRA files of one denoiser, each with its strength. Call `check_fits` before `fuse`: it
    sees all tensors.
    """

    loras: Sequence[Lora]

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of the one file; of several, or with a strength other than 1, of a
        line "SHA-256 strength" for each.
        """
        if len(self.loras) == 1 and self.loras[0].strength == 1:
            return self.loras[0].sha256
        lines = "".join(f"{lora.sha256} {lora.strength!r}\n" for lora in self.loras)
        return hashlib.sha256(lines.encode()).hexdigest()

    @property
    def notes(self) -> tuple[str, ...]:
        """Return a checkpoint's note about each file."""
        return tuple(
            f"the LoRA {lora.name} (SHA-256 {lora.sha256}) is in the weights"
            + ("" if lora.strength == 1 else f" with strength {lora.strength:g}")
            for lora in self.loras
        )

    @property
    def num_steps(self) -> set[int]:
        """Return the numbers of steps that the LoRAs state they were distilled for."""
        return {lora.num_steps for lora in self.loras if lora.num_steps is not None}

    def check_fits(self, forms: Mapping[str, tuple[int, ...]]) -> None:
        """Run `Lora.check_fits` for each LoRA."""
        for lora in self.loras:
            lora.check_fits(forms)

    @torch.no_grad()
    def fuse(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return `tensor` plus the LoRAs' changes: summed in float32, in the tensor's dtype, shape
        and device.

        `name` is the tensor's in the diffusers denoiser, such as blocks.3.attn1.to_q.weight. A
        tensor that no LoRA changes is returned itself.

        Raises:
            ModelError: the shapes do not fit, the sum overflows the dtype, or a file has changed
                since it was loaded.
        """
        concerned = [lora for lora in self.loras if name in lora.changes]
        if not concerned:
            return tensor
        total = tensor.float()
        for lora in concerned:
            total = lora.add_to(name, total)
        fused = total.to(tensor.dtype)
        if not bool(torch.isfinite(fused).all()):
            names = " and ".join(lora.name for lora in concerned)
            raise ModelError(
                f"{name} overflows {tensor.dtype} when {names} is added: give a smaller strength, or fetch the LoRA "
                "again."
            )
        return fused


def _times(shape: Iterable[int]) -> str:
    return " × ".join(map(str, shape)) or "()"


def _read_changes(file: Path, keys: Sequence[str], weights: Any, family: ModelFamily) -> dict[str, tuple[Change, ...]]:
    """Return the changes of the keys in the open file, by the denoiser's tensor name. Raises
    ModelError for unknown keys.
    """
    prefix = prefix_of(file, keys)
    modules = understand(file, keys, prefix, family)
    config = peft_config(file, weights.metadata() or {}, prefix)
    changes: dict[str, tuple[Change, ...]] = {}
    for module, found in modules.items():
        own_name = re.split(r"\.lora[_.]", next(iter(found.values()))[len(prefix) :])[0]  # which patterns match
        for name, change in _changes_of(file, (module, own_name), found, weights, config, family):
            changes[name] = (*changes.get(name, ()), change)
    return changes


def _changes_of(
    file: Path,
    names: tuple[str, str],
    found: dict[str, str],
    weights: Any,
    config: PeftConfig | None,
    family: ModelFamily,
) -> Iterator[tuple[str, Change]]:
    """Yield tensor name and change of everything in a file that belongs to one module.

    Args:
        names: the module's in diffusers, and in the file.
        found: the kind of each stored tensor to its key.
    """
    module, own_name = names
    shapes = {stored: tuple(weights.get_slice(key).get_shape()) for stored, key in found.items()}
    weight = module if family.is_parameter(module) else f"{module}.weight"
    if found.keys() & {"down", "up", "alpha", "up_bias"}:
        if not found.keys() >= {"down", "up"}:
            raise ModelError(f"{file} holds {next(iter(found.values()))} without the whole pair of down and up.")
        down, up = shapes["down"], shapes["up"]
        rank = down[0] if down else 0
        if len(down) < 2 or rank < 1 or up[1:] != (rank,) + (1,) * (len(down) - 2):
            raise ModelError(
                f"{file}: the ranks of {found['down']}, {_times(down)}, and {found['up']}, {_times(up)}, differ."
            )
        factor = _factor(file, own_name, rank, found.get("alpha"), weights, config)
        yield weight, Change((up[0], *down[1:]), found["up"], found["down"], factor)
        if "up_bias" in found:
            yield f"{module}.bias", Change(shapes["up_bias"], found["up_bias"], None, factor)
    for stored, name in (("diff", weight), ("diff_b", f"{module}.bias")):
        if stored in found:
            yield name, Change(shapes[stored], found[stored], None, 1.0)


def _factor(file: Path, module: str, rank: int, alpha: str | None, weights: Any, config: PeftConfig | None) -> float:
    """Return the factor of up · down: alpha / rank, or 1 without an alpha. `alpha` is a key."""
    if alpha is None:
        return 1.0 if config is None else config.factor(module, rank)
    if config is not None:
        raise ModelError(f"{file} states alpha twice, as {alpha} and in its {config.stated_in}.")
    value = weights.get_tensor(alpha)
    if value.numel() != 1 or not math.isfinite(value.item()):
        raise ModelError(f"{file}: {alpha} is not one finite number.")
    return float(value.item()) / rank


def _require_finite(file: Path, weights: Any) -> None:
    """Raise ModelError unless every value is a finite number (an integer only as alpha). Holds one
    tensor at a time.
    """
    for key in weights.keys():  # noqa: SIM118 (not a dict)
        dtype = weights.get_slice(key).get_dtype()
        if dtype not in (_FLOATS | _INTEGERS if key.endswith(".alpha") else _FLOATS):
            raise ModelError(f"{file}: {key} is stored as {dtype}, but a LoRA is stored in 16 bits or more.")
        if not bool(torch.isfinite(weights.get_tensor(key)).all()):
            raise ModelError(f"{file}: {key} holds NaN or Inf: fetch the file again.")
