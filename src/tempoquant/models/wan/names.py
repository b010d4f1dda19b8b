"""Other names of the tensors of a Wan transformer: the original release's, in dots or with
underscores.

ComfyUI, and most trainers of LoRAs, use the original release's names.
"""

import re

# Wan's own names to diffusers' names. Only norm3 has weights, and it is diffusers' norm2.
_ORIGINAL_IN_BLOCK = {
    "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "norm3": "norm2", "modulation": "scale_shift_table",
    "cross_attn.k_img": "attn2.add_k_proj", "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "before_proj": "proj_in", "after_proj": "proj_out",  # VACE's hints go in and come out
} | {
    f"{wan}.{part}": f"{ours}.{name}"
    for wan, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for part, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"),
                       ("norm_k", "norm_k"))
}  # fmt: skip
_ORIGINAL_OUTSIDE = {
    "patch_embedding": "patch_embedding", "vace_patch_embedding": "vace_patch_embedding",
    "head.head": "proj_out", "head.modulation": "scale_shift_table",
    "time_projection.1": "condition_embedder.time_proj",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",  # first and last frame
}  # fmt: skip


def _with_underscores(names: dict[str, str]) -> dict[str, str]:
    """Map both sides' names, with underscores for dots, to diffusers' names."""
    return {name.replace(".", "_"): ours for original, ours in names.items() for name in (original, ours)}


_IN_BLOCK, _OUTSIDE = _with_underscores(_ORIGINAL_IN_BLOCK), _with_underscores(_ORIGINAL_OUTSIDE)
_TO_ORIGINAL_IN_BLOCK = {ours: original for original, ours in _ORIGINAL_IN_BLOCK.items()}
_TO_ORIGINAL_OUTSIDE = {ours: original for original, ours in _ORIGINAL_OUTSIDE.items()}
_IMAGE_BRANCH = re.compile(
    r"blocks\.\d+\.attn2\.(add_[kv]_proj|norm_added_k)\..*|condition_embedder\.image_embedder\..*"
)


def own_name(module: str) -> str | None:
    """Return diffusers' name of a module (or parameter) of Wan; None for an unknown name."""
    flat = module.replace(".", "_")
    block = re.fullmatch(r"(blocks|vace_blocks)_([0-9]+)_(.+)", flat)
    if block is None:
        return _OUTSIDE.get(flat)
    part = _IN_BLOCK.get(block[3])
    return part and f"{block[1]}.{int(block[2])}.{part}"


def original_name(name: str) -> str | None:
    """Return the original release's name, which is ComfyUI's, of a module, a parameter or a tensor
    of a diffusers Wan.

    It is the inverse of `own_name`, for tensors such as `blocks.0.attn1.to_q.weight` too; None if
    the original release has no such name.
    """
    module, _, leaf = name.rpartition(".")
    whole = _original_module(name)
    if whole is not None or leaf not in ("weight", "bias"):
        return whole
    found = _original_module(module)
    return found and f"{found}.{leaf}"


def _original_module(name: str) -> str | None:
    block = re.fullmatch(r"((?:vace_)?blocks\.[0-9]+)\.(.+)", name)
    if block is None:
        return _TO_ORIGINAL_OUTSIDE.get(name)
    part = _TO_ORIGINAL_IN_BLOCK.get(block[2])
    return part and f"{block[1]}.{part}"


def is_of_image_branch(name: str) -> bool:
    """Return whether a tensor belongs to cross-attention to an image, which Wan2.1's image-to-video
    has and Wan2.2's lacks.
    """
    return _IMAGE_BRANCH.fullmatch(name) is not None
