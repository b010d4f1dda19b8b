"""Other names of the modules of a MiniMax-H3 transformer: the original release's, where one equals
one of ours.

Source: diffusers' scripts/convert_minimax_h3_to_diffusers.py. Weights of the release cannot be read
by names alone: its queries, keys and values are in one tensor, and its feed-forward net has gate
and value in the other order.
"""

from tempoquant.models.block_names import by_table

_IN_BLOCK = {
    "attn.out_proj": "attn.to_out.0", "attn.q_norm": "attn.norm_q", "attn.k_norm": "attn.norm_k", "mlp.fc2": "ff.net.2",
    "norm1": "norm1", "norm2": "norm2", "adaln_proj.linear": "adaln_proj.linear", "attn.to_q": "attn.to_q",
    "attn.to_k": "attn.to_k", "attn.to_v": "attn.to_v", "ff.net.0.proj": "ff.net.0.proj",
}  # fmt: skip
own_name = by_table(
    _IN_BLOCK,
    block=r"(?:transformer_)?blocks",
    outside="proj_in|audio_proj_in|context_embedder|time_embedder|token_refiner|norm_out|proj_out|audio_proj_out",
)
"""Return diffusers' name of a module; None for an unknown name."""
