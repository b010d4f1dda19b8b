"""Names of LTX-2's modules in the original release, and in LoRAs made for it.

Source of the correspondences: diffusers' scripts/convert_ltx2_to_diffusers.py.
"""

import re

_TABLES = (
    "scale_shift_table", "audio_scale_shift_table", "prompt_scale_shift_table", "audio_prompt_scale_shift_table",
    "video_a2v_cross_attn_scale_shift_table", "audio_a2v_cross_attn_scale_shift_table",
)  # fmt: skip
BARE_PARAMETERS = frozenset({*_TABLES, "keyframes_abs_pos_embedding"})

_ATTENTIONS = "attn1|attn2|audio_attn1|audio_attn2|audio_to_video_attn|video_to_audio_attn"
_IN_BLOCK = re.compile(
    rf"({_ATTENTIONS})\.(to_q|to_k|to_v|to_out\.0|to_gate_logits|norm_q|norm_k)"
    rf"|(audio_)?ff\.net\.(0\.proj|2)|{'|'.join(_TABLES)}"
)
_EMBEDDINGS = (
    "time_embed", "audio_time_embed", "prompt_adaln", "audio_prompt_adaln", "av_cross_attn_video_scale_shift",
    "av_cross_attn_audio_scale_shift", "av_cross_attn_video_a2v_gate", "av_cross_attn_audio_v2a_gate",
)  # fmt: skip
_OUTSIDE = re.compile(
    rf"({'|'.join(_EMBEDDINGS)})\.(linear|emb\.timestep_embedder\.linear_[12])"
    r"|(audio_)?caption_projection\.linear_[12]|(audio_)?proj_(in|out)"
    r"|(audio_)?scale_shift_table|keyframes_abs_pos_embedding"
)
_RENAMED = (
    ("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
    ("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
    ("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
    ("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
    ("prompt_adaln_single", "prompt_adaln"),
    ("adaln_single", "time_embed"),
    ("patchify_proj", "proj_in"),
    ("scale_shift_table_a2v_ca_video", "video_a2v_cross_attn_scale_shift_table"),
    ("scale_shift_table_a2v_ca_audio", "audio_a2v_cross_attn_scale_shift_table"),
    ("q_norm", "norm_q"),
    ("k_norm", "norm_k"),
)


def own_name(module: str) -> str | None:
    """Return diffusers' name of a module (or parameter) of LTX-2; None for an unknown name."""
    for theirs, ours in _RENAMED:
        module = module.replace(theirs, ours)
    block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
    if block is not None:
        return module if _IN_BLOCK.fullmatch(block[2]) else None
    return module if _OUTSIDE.fullmatch(module) else None
