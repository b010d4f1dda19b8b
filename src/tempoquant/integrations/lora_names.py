"""What the keys of LoRA files mean: trainers spell the same tensors of Wan in many ways.

A key is a prefix, a module and what is stored of it. Prefixes say nothing and are taken off, the same one from every
key of a file. Modules have diffusers' names or Wan's own, in dots or with underscores for dots. PEFT may put the
adapter's name before `weight`.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from tempoquant.errors import ModelError

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
_IN_BLOCK |= {name.replace(".", "_"): name for name in _IN_BLOCK.values()}
_OUTSIDE |= {name.replace(".", "_"): name for name in _OUTSIDE.values()}
_IMAGE_BRANCH = re.compile(
    r"blocks\.\d+\.attn2\.(add_[kv]_proj|norm_added_k)\..*|condition_embedder\.image_embedder\..*"
)


def prefix_of(file: Path, keys: Iterable[str]) -> str:
    """The prefix that all keys of a file have; "" for none.

    Raises:
        ModelError: the file holds no LoRA, or none of the kind that can be added; its keys have several prefixes.
    """
    keys = list(keys)
    for mark, kind in _OTHER_KINDS.items():
        if found := next((key for key in keys if mark in key), None):
            raise ModelError(f"{file} is a {kind} ({found[:120]}), which cannot be fused: only plain LoRAs can.")
    ours = [key for key in keys if _stored(key) is not None]
    if not ours:
        raise ModelError(f"{file} holds no LoRA of Wan: none of its {len(keys)} key(s) has a name that LoRAs have.")
    prefixes = {_prefix(key): key for key in ours}
    if len(prefixes) > 1:
        raise ModelError(
            f"{file} holds LoRAs of several models or experts ({' and '.join(sorted(prefixes.values())[:2])}): give a "
            "file of each expert."
        )
    return next(iter(prefixes))


def understand(file: Path, keys: Iterable[str], prefix: str) -> dict[str, dict[str, str]]:
    """Everything a file holds: module (or parameter) of the expert, in diffusers' names, to what is stored to key.

    Stored are "down" and "up" (of shapes (rank, in) and (out, rank)), "up_bias", "alpha", "diff" and "diff_b".

    Raises:
        ModelError: a key is not understood, or says what another one says.
    """
    modules: dict[str, dict[str, str]] = {}
    adapters: set[str] = set()
    for key in keys:
        found = _stored(key)
        module = None if found is None or not key.startswith(prefix) else _diffusers_name(found[0][len(prefix) :])
        if found is None or module is None:
            raise ModelError(
                f"{file} holds {key[:120]}, which is not understood: a key must begin with {prefix or 'a module'} as "
                "others here do, name a part of Wan, and hold half of a LoRA pair, an alpha, a diff, diff_b or diff_m."
            )
        if modules.setdefault(module, {}).setdefault(found[1], key) != key:
            raise ModelError(f"{file} states the same twice, as {modules[module][found[1]]} and as {key}.")
        adapters |= {found[2]} - {""}
    if len(adapters) > 1:
        raise ModelError(f"{file} holds several adapters ({', '.join(sorted(adapters))}): give a file of each.")
    return modules


def is_of_image_branch(name: str) -> bool:
    """Whether a tensor belongs to cross-attention to an image, which Wan2.1's image-to-video has and Wan2.2's lacks."""
    return _IMAGE_BRANCH.fullmatch(name) is not None


def _prefix(key: str) -> str:
    found = _PREFIX.match(key)
    return "" if found is None else found[0]


def _stored(key: str) -> tuple[str, str, str] | None:
    """Prefix and module, what is stored of it, and the adapter's name or ""; None for what no LoRA holds."""
    if pair := _PAIR.fullmatch(key):
        module, half, what = pair[1], _HALVES[pair[2] or pair[3]], pair[5]
        stored = half if what == "weight" else f"{half}_bias"
        return None if stored == "down_bias" else (module, stored, pair[4] or "")
    key = re.sub(r"\.diff_m$", ".modulation.diff", key)  # LightX2V's short form
    suffix = next((suffix for suffix in _ALONE if key.endswith(suffix)), None)
    return None if suffix is None else (key.removesuffix(suffix), _ALONE[suffix], "")


def _diffusers_name(module: str) -> str | None:
    """Diffusers' name of a module (or parameter) of Wan; None if it is none."""
    flat = module.replace(".", "_")
    block = re.fullmatch(r"blocks_([0-9]+)_(.+)", flat)
    if block is None:
        return _OUTSIDE.get(flat)
    part = _IN_BLOCK.get(block[2])
    return part and f"blocks.{int(block[1])}.{part}"
