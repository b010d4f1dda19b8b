"""Files of single Wan denoisers in other layouts: the original release's names, prefixes, 8-bit
weights.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
_TO_WAN = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "attn1": "self_attn", "attn2": "cross_attn", "to_out.0": "o", "to_q": "q", "to_k": "k", "to_v": "v",
    "add_k_proj": "k_img", "add_v_proj": "v_img", "norm_added_k": "norm_k_img",
    "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "proj_in": "before_proj",
}  # fmt: skip


def wan_name(name: str) -> str:
    """Return the original release's name of a tensor by diffusers' name."""
    if name == "scale_shift_table":
        return "head.modulation"
    if name.startswith("proj_out."):
        return name.replace("proj_out", "head.head")
    in_block = re.match(r"(vace_)?blocks\.\d+\.", name)
    if in_block is not None:
        name = name.replace("scale_shift_table", "modulation").replace("proj_out", "after_proj")
        name = re.sub(r"\.norm2\.", ".norm3.", name)
    for ours, wan in _TO_WAN.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}(?=\.|$)", rf"\1{wan}", name)
    return name


def state_of(folder: Path, component: str = "transformer") -> Tensors:
    """Return a component's tensors."""
    return {
        name: tensor
        for file in (folder / component).glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }  # fmt: skip


def write_single(file: Path, state: Tensors, prefix: str = "", **extra: torch.Tensor) -> Path:
    """Write one file with Wan's own names behind a prefix."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({**{prefix + wan_name(name): tensor.clone() for name, tensor in state.items()}, **extra}, file)
    return file


def is_scaled(name: str, tensor: torch.Tensor) -> bool:
    """Return whether fp8 files hold a tensor in 8 bits: the weights of linears."""
    return tensor.dim() == 2 and name.endswith(".weight")


def write_fp8(
    file: Path, state: Tensors, scales: str | None = "scale_weight", dtype: Any = torch.float8_e4m3fn
) -> Path:
    """Write an fp8_scaled file, or with `scales` None one that was merely cast."""
    tensors: Tensors = {} if scales is None else {"scaled_fp8": torch.zeros(2, dtype=dtype)}
    for name, tensor in state.items():
        own = wan_name(name)
        if not is_scaled(name, tensor):
            tensors[own] = tensor.to(torch.float16)
        elif scales is None:
            tensors[own] = tensor.to(dtype)
        else:
            scale = tensor.abs().max().float() / torch.finfo(dtype).max
            tensors[own] = (tensor.float() / scale).to(dtype)
            tensors[own.replace(".weight", f".{scales}")] = scale
            tensors[own.replace(".weight", ".scale_input")] = torch.ones(())
    save_file(tensors, file)
    return file


def as_bytes(values: dict[str, Any]) -> torch.Tensor:
    """Return a layer's comfy_quant."""
    return torch.tensor([*json.dumps(values).encode()], dtype=torch.uint8)
