"""Other people's names for the tensors of a Wan transformer: the original release's, in dots or with underscores.

ComfyUI, and most trainers of LoRAs, use the original release's names.
"""

import re

# Wan's own names, with underscores for dots, to diffusers' names. Only norm3 has weights, and it is diffusers' norm2.
_IN_BLOCK = {
    "ffn_0": "ffn.net.0.proj", "ffn_2": "ffn.net.2", "norm3": "norm2", "modulation": "scale_shift_table",
    "cross_attn_k_img": "attn2.add_k_proj", "cross_attn_v_img": "attn2.add_v_proj",
    "cross_attn_norm_k_img": "attn2.norm_added_k",
    "before_proj": "proj_in", "after_proj": "proj_out",  # VACE's hints go in and come out
} | {
    f"{wan}_{part}": f"{ours}.{name}"
    for wan, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for part, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"),
                       ("norm_k", "norm_k"))
}  # fmt: skip
_OUTSIDE = {
    "patch_embedding": "patch_embedding", "vace_patch_embedding": "vace_patch_embedding",
    "head_head": "proj_out", "head_modulation": "scale_shift_table",
    "time_projection_1": "condition_embedder.time_proj",
    "time_embedding_0": "condition_embedder.time_embedder.linear_1",
    "time_embedding_2": "condition_embedder.time_embedder.linear_2",
    "text_embedding_0": "condition_embedder.text_embedder.linear_1",
    "text_embedding_2": "condition_embedder.text_embedder.linear_2",
    "img_emb_proj_0": "condition_embedder.image_embedder.norm1",
    "img_emb_proj_1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb_proj_3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb_proj_4": "condition_embedder.image_embedder.norm2",
    "img_emb_emb_pos": "condition_embedder.image_embedder.pos_embed",  # first and last frame
}  # fmt: skip
_IN_BLOCK |= {name.replace(".", "_"): name for name in _IN_BLOCK.values()}
_OUTSIDE |= {name.replace(".", "_"): name for name in _OUTSIDE.values()}
_IMAGE_BRANCH = re.compile(
    r"blocks\.\d+\.attn2\.(add_[kv]_proj|norm_added_k)\..*|condition_embedder\.image_embedder\..*"
)


def own_name(module: str) -> str | None:
    """Return diffusers' name of a module (or parameter) of Wan; None for a name that is none."""
    flat = module.replace(".", "_")
    block = re.fullmatch(r"(blocks|vace_blocks)_([0-9]+)_(.+)", flat)
    if block is None:
        return _OUTSIDE.get(flat)
    part = _IN_BLOCK.get(block[3])
    return part and f"{block[1]}.{int(block[2])}.{part}"


def is_of_image_branch(name: str) -> bool:
    """Whether a tensor belongs to cross-attention to an image, which Wan2.1's image-to-video has and Wan2.2's lacks."""
    return _IMAGE_BRANCH.fullmatch(name) is not None
