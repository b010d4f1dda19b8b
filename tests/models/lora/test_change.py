"""A LoRA's change of a weight is bounded, which is checked before any work."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tempoquant.errors import ModelError
from tempoquant.models.lora.lora import Lora
from tempoquant.models.wan.family import WAN

Q = "diffusion_model.blocks.0.self_attn.q"


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def test_what_no_weight_stands_is_refused_before_any_work(tmp_path: Path) -> None:
    pair = {f"{Q}.lora_A.weight": torch.eye(4, 128), f"{Q}.lora_B.weight": torch.eye(128, 4) * 1e3}
    Lora.load(write(tmp_path, pair), WAN, -65.0)
    huge_alpha = pair | {f"{Q}.alpha": torch.tensor(1e30)}
    huge_diff = {f"{Q}.diff": torch.full((128, 128), 7e4)}
    for tensors, strength in ((pair, 66.0), (huge_alpha, 1.0), (huge_diff, 1.0)):
        with pytest.raises(ModelError, match=r"adds .* to a weight in blocks.0.attn1.to_q.weight, more than float16"):
            Lora.load(write(tmp_path, tensors), WAN, strength)
    for strength in (101.0, -1e38):
        with pytest.raises(ModelError, match="give a number from -100 to 100 that is not 0"):
            Lora.load(write(tmp_path, pair), WAN, strength)


def test_the_product_decides_where_its_bound_does_not(tmp_path: Path) -> None:
    up, down = torch.zeros(128, 2), torch.zeros(2, 128)
    up[0, 0], down[1, 0] = 1e4, 1e4  # of norms 1e4 each, and product 0
    Lora.load(write(tmp_path, {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}), WAN)
