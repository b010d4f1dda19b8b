"""The bundled four-step LoRAs as files: the keys of LightX2V's Wan2.2-Lightning, one file an
expert.

diffusion_model.blocks.N.self_attn.q.lora_down.weight    (rank, in), bfloat16
diffusion_model.blocks.N.self_attn.q.lora_up.weight      (out, rank), bfloat16
diffusion_model.blocks.N.self_attn.q.alpha               (), float32: adds alpha / rank · up · down
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tempoquant.tiny import lora_file
from training.architecture import EXPERTS

ORIGINAL_NAMES = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
"""The names of a block's linears in Wan's original release, by diffusers' names."""
_ADAPTER = re.compile(r"(\w+)\.blocks\.(\d+)\.(.+)\.lora_([AB])\.default\.weight")
_HALVES = {"A": "lora_down", "B": "lora_up"}


def files_of(adapters: Mapping[str, Tensor], alpha: float) -> dict[str, dict[str, Tensor]]:
    """Return the content of each expert's file, from peft's tensors under the expert's name. Raises
    ValueError for others.

    Args:
        adapters: such as "high_noise.blocks.0.attn1.to_q.lora_A.default.weight", (rank, in).
    """
    files: dict[str, dict[str, Tensor]] = {expert: {} for expert in EXPERTS}
    for name, tensor in adapters.items():
        found = _ADAPTER.fullmatch(name)
        if found is None:
            raise ValueError(f"{name} is not a LoRA of a block's linear")
        expert, block, linear, half = found.groups()
        module = f"diffusion_model.blocks.{block}.{ORIGINAL_NAMES[linear]}"
        files[expert][f"{module}.{_HALVES[half]}.weight"] = tensor.to(torch.bfloat16).contiguous()
        files[expert][f"{module}.alpha"] = torch.tensor(alpha)
    return files


def write_loras(adapters: Mapping[str, Tensor], alpha: float, folder: Path | None = None) -> None:
    """Write a file for each expert, complete or absent, in the package's place or into `folder`."""
    for expert, tensors in files_of(adapters, alpha).items():
        path = lora_file(expert) if folder is None else folder / lora_file(expert).name
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        save_file(tensors, unfinished)
        unfinished.chmod(0o644)
        os.replace(unfinished, path)
