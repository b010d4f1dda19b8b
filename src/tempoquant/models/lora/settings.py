"""Settings of a LoRA outside its tensors: alpha, by PEFT; and the number of sampling steps it was
distilled for.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempoquant.errors import ModelError

_IN_HEADER = "lora_adapter_metadata"  # diffusers' save_lora_weights and save_lora_adapter
_BESIDE = "adapter_config.json"  # PEFT's save_pretrained
_FEW_STEPS = re.compile(r"(?<!\d)([1-9]|1[0-6])[ _-]?steps?(?![a-z0-9])", re.IGNORECASE)
_TITLES = ("title", "name", "description")


@dataclass(frozen=True)
class PeftConfig:
    """The part of PEFT's LoraConfig that decides the factor.

    Attributes:
        stated_in: where it was read, for messages.
    """

    stated_in: str
    lora_alpha: float
    alpha_pattern: dict[str, float]
    use_rslora: bool

    def factor(self, module: str, rank: int) -> float:
        """Compute alpha over rank, or over its root; the first pattern that matches the end of the
        module's name decides.
        """
        alphas = (a for pattern, a in self.alpha_pattern.items() if re.match(rf"(.*\.)?({pattern})$", module))
        return next(alphas, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def peft_config(file: Path, metadata: Mapping[str, str], prefix: str) -> PeftConfig | None:
    """Return the config for alpha in a file's header, or in PEFT's file beside it for PEFT's own
    names; None for none.

    Raises:
        ModelError: it is unreadable, or the adapter is of another kind.
    """
    beside = file.parent / _BESIDE
    try:
        if _IN_HEADER in metadata:
            return _read(file, _IN_HEADER, json.loads(metadata[_IN_HEADER]), prefix)
        if prefix.startswith("base_model.model.") and beside.is_file():
            return _read(file, _BESIDE, json.loads(beside.read_text(encoding="utf-8")), "")
    except (OSError, ValueError, RecursionError) as error:
        raise _no_alpha(file, _IN_HEADER if _IN_HEADER in metadata else _BESIDE, error) from error
    return None


def stated_steps(file: Path, metadata: Mapping[str, str]) -> int | None:
    """Return the sampling steps that a LoRA states it was distilled for: "4steps" in its name, its
    folder's or its title; or None.

    Numbers above 16 are taken for something else, such as steps of training.
    """
    titles = [text for key, text in metadata.items() if key.lower().endswith(_TITLES)]
    found = (_FEW_STEPS.search(text) for text in (file.name, file.absolute().parent.name, *titles))
    return next((int(match[1]) for match in found if match is not None), None)


def _read(file: Path, stated_in: str, record: Any, prefix: str) -> PeftConfig:
    try:
        component = next(name for name in (prefix, "transformer.", "") if f"{name}lora_alpha" in record)
        config = {key.removeprefix(component): value for key, value in record.items() if key.startswith(component)}
        patterns = {re.compile(p).pattern: float(alpha) for p, alpha in (config.get("alpha_pattern") or {}).items()}
        read = PeftConfig(stated_in, float(config["lora_alpha"]), patterns, bool(config.get("use_rslora")))
    except (StopIteration, ValueError, TypeError, AttributeError, re.error) as error:
        raise _no_alpha(file, stated_in, error) from error
    if not all(map(math.isfinite, (read.lora_alpha, *patterns.values()))):
        raise ModelError(f"{file}: its {stated_in} states an alpha that is not finite.")
    if config.get("use_dora"):
        raise ModelError(f"{file} is a DoRA, which is not a sum of weights: only plain LoRAs can be fused.")
    return read


def _no_alpha(file: Path, stated_in: str, error: Exception) -> ModelError:
    return ModelError(f"{file}: its {stated_in} states no alpha that can be read ({error!r}).")
