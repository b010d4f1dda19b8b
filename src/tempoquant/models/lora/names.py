"""The meaning of keys in LoRA files: trainers spell the same tensors in many ways.

A key is a prefix, a module and the kind of its tensor. Prefixes have no meaning and are removed,
the same one from every key of a file. Modules have diffusers' names or those of the model's first
release, with dots or underscores: `ModelFamily.own_name` resolves them. PEFT may put the adapter's
name before `weight`.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from tempoquant.errors import ModelError
from tempoquant.models.family import ModelFamily

_WRAPPERS = (
    "base_model.model", "model", "diffusion_model", "transformer", "transformer_1", "transformer_2", "pipe", "dit",
    "unet", "module",
)  # fmt: skip
_PREFIX = re.compile(
    rf"(?:(?:{'|'.join(re.escape(name) for name in _WRAPPERS)})\.)+|lora_(?:unet|transformer|dit)__?|lycoris_"
)
_PAIR = re.compile(r"(.+?)\.(?:lora_(A|B|down|up)|lora\.(down|up))(?:\.([^.]+))?\.(weight|bias)")
_HALVES = {"A": "down", "down": "down", "B": "up", "up": "up"}
_ALONE = {".alpha": "alpha", ".diff": "diff", ".diff_b": "diff_b"}
_OTHER_KINDS = {
    "lokr_": "LoKr", "hada_": "LoHa", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "oft_": "OFT",
    "lora_mid": "LoCon with a core tensor",
}  # fmt: skip


def prefix_of(file: Path, keys: Iterable[str]) -> str:
    """Return the prefix that all keys of a file have; "" for none.

    Raises:
        ModelError: the file holds no LoRA, or none of the kind that can be added; its keys have
            several prefixes.
    """
    keys = list(keys)
    for mark, kind in _OTHER_KINDS.items():
        if found := next((key for key in keys if mark in key), None):
            raise ModelError(f"{file} is a {kind} ({found[:120]}), which cannot be fused: only plain LoRAs can.")
    ours = [key for key in keys if _stored(key) is not None]
    if not ours:
        raise ModelError(f"{file} holds no LoRA: none of its {len(keys)} key(s) has a name that LoRAs have.")
    prefixes = {prefix_in(key): key for key in ours}
    if len(prefixes) > 1:
        raise ModelError(
            f"{file} holds LoRAs of several models ({' and '.join(sorted(prefixes.values())[:2])}): give a "
            "file of each denoiser."
        )
    return next(iter(prefixes))


def understand(file: Path, keys: Iterable[str], prefix: str, family: ModelFamily) -> dict[str, dict[str, str]]:
    """Return the content of a file: module (or parameter) of the denoiser, in diffusers' names, to
    the kind of tensor, to key.

    The kinds are "down" and "up" (of shapes (rank, in) and (out, rank)), "up_bias", "alpha", "diff"
    and "diff_b".

    Raises:
        ModelError: a key is unknown, or has the same meaning as another one.
    """
    modules: dict[str, dict[str, str]] = {}
    adapters: set[str] = set()
    for key in keys:
        found = _stored(key)
        module = None if found is None or not key.startswith(prefix) else family.own_name(found[0][len(prefix) :])
        if found is None or module is None:
            raise ModelError(
                f"{file} holds {key[:120]}, which is not understood: a key must begin with {prefix or 'a module'} as "
                "others here do, name a part of the model, and hold half of a LoRA pair, an alpha, a diff, diff_b or "
                "diff_m."
            )
        if modules.setdefault(module, {}).setdefault(found[1], key) != key:
            raise ModelError(f"{file} states the same twice, as {modules[module][found[1]]} and as {key}.")
        adapters |= {found[2]} - {""}
    if len(adapters) > 1:
        raise ModelError(f"{file} holds several adapters ({', '.join(sorted(adapters))}): give a file of each.")
    return modules


def prefix_in(key: str) -> str:
    """Return the prefix before a key's module; "" for none."""
    found = _PREFIX.match(key)
    return "" if found is None else found[0]


def _stored(key: str) -> tuple[str, str, str] | None:
    """Return prefix and module, the kind of tensor, and the adapter's name or ""; None for a key
    that no LoRA has.
    """
    if pair := _PAIR.fullmatch(key):
        module, half, what = pair[1], _HALVES[pair[2] or pair[3]], pair[5]
        stored = half if what == "weight" else f"{half}_bias"
        return None if stored == "down_bias" else (module, stored, pair[4] or "")
    key = re.sub(r"\.diff_m$", ".modulation.diff", key)  # LightX2V's short form
    suffix = next((suffix for suffix in _ALONE if key.endswith(suffix)), None)
    return None if suffix is None else (key.removesuffix(suffix), _ALONE[suffix], "")
