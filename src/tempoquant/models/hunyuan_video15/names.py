"""Other names of the modules of a HunyuanVideo-1.5 transformer: the original release's.

Source: diffusers' scripts/convert_hunyuan_video1_5_to_diffusers.py. LoRAs that change blocks are
read by these names. Weights of the release cannot be: its token refiner has queries, keys and
values in one tensor, and its head has shift and scale in the other order.
"""

from tempoquant.models.block_names import by_table

_IN_BLOCK = {
    "img_mod.linear": "norm1.linear", "txt_mod.linear": "norm1_context.linear",
    "img_mlp.fc1": "ff.net.0.proj", "img_mlp.fc2": "ff.net.2",
    "txt_mlp.fc1": "ff_context.net.0.proj", "txt_mlp.fc2": "ff_context.net.2",
    "img_attn_q_norm": "attn.norm_q", "img_attn_k_norm": "attn.norm_k",
    "txt_attn_q_norm": "attn.norm_added_q", "txt_attn_k_norm": "attn.norm_added_k",
    "img_attn_q": "attn.to_q", "img_attn_k": "attn.to_k", "img_attn_v": "attn.to_v", "img_attn_proj": "attn.to_out.0",
    "txt_attn_q": "attn.add_q_proj", "txt_attn_k": "attn.add_k_proj", "txt_attn_v": "attn.add_v_proj",
    "txt_attn_proj": "attn.to_add_out",
}  # fmt: skip
own_name = by_table(
    _IN_BLOCK,
    block=r"(?:transformer|double)_blocks",
    outside="x_embedder|image_embedder|context_embedder|context_embedder_2|time_embed|cond_type_embed|norm_out|proj_out",
)
"""Return diffusers' name of a module; None for an unknown name."""
