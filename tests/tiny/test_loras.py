"""The bundled four-step LoRAs: files as LightX2V writes them, small, that every reader understands
alike.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from safetensors.torch import load_file

from tempoquant.models.lora.lora import Lora
from tempoquant.models.wan.family import WAN
from tempoquant.tiny import LORA_NAME, lora_file, weights_folder
from training.distill import ALPHA, RANK
from training.lora_files import ORIGINAL_NAMES, files_of

EXPERTS = {"high_noise": "transformer", "low_noise": "transformer_2"}
SIZES = {"q": (256, 256), "k": (256, 256), "v": (256, 256), "o": (256, 256), "0": (1024, 256), "2": (256, 1024)}


@pytest.mark.parametrize("expert", EXPERTS)
def test_the_keys_and_shapes_are_those_of_lightning_loras_for_every_linear_of_every_block(expert: str) -> None:
    tensors = load_file(lora_file(expert))
    wanted = {}
    for block in range(4):
        for name in ORIGINAL_NAMES.values():
            rows, columns = SIZES[name.rpartition(".")[2]]
            module = f"diffusion_model.blocks.{block}.{name}"
            wanted[f"{module}.lora_down.weight"] = (torch.bfloat16, (RANK, columns))
            wanted[f"{module}.lora_up.weight"] = (torch.bfloat16, (rows, RANK))
            wanted[f"{module}.alpha"] = (torch.float32, ())
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == wanted
    assert RANK <= 16 and all(tensor == ALPHA for name, tensor in tensors.items() if name.endswith("alpha"))
    assert all(tensor.isfinite().all() and tensor.any() for tensor in tensors.values())


def test_the_files_are_small_and_their_hashes_are_those_of_the_log_of_training() -> None:
    files = [lora_file(expert) for expert in EXPERTS]
    assert sum(file.stat().st_size for file in files) < 2e6
    log = Path(__file__).parents[2] / "training" / "logs" / "distill.jsonl"
    last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    assert last["sha256"] == {expert: Lora.load(lora_file(expert), WAN).sha256 for expert in EXPERTS}


@pytest.mark.parametrize("expert", EXPERTS)
def test_a_file_says_for_how_many_steps_it_is(expert: str) -> None:
    assert LORA_NAME == "tiny-4steps" and Lora.load(lora_file(expert), WAN).num_steps == 4


@torch.no_grad()
def test_diffusers_reads_the_files_as_we_do() -> None:
    """Fused by diffusers in float32, each weight is what `Lora.fuse` makes of it."""
    pipeline = WanImageToVideoPipeline.from_pretrained(weights_folder(), dtype=torch.float32)
    before = {
        component: {name: tensor.clone() for name, tensor in getattr(pipeline, component).state_dict().items()}
        for component in EXPERTS.values()
    }
    for expert, component in EXPERTS.items():
        file, second = lora_file(expert), component == "transformer_2"
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="x", load_into_transformer_2=second)
    pipeline.fuse_lora(components=list(EXPERTS.values()))
    pipeline.unload_lora_weights()
    for expert, component in EXPERTS.items():
        lora = Lora.load(lora_file(expert), WAN)
        for name, tensor in getattr(pipeline, component).state_dict().items():
            torch.testing.assert_close(tensor, lora.fuse(name, before[component][name]), rtol=0, atol=1e-5)
        assert len(lora.changes) == 4 * len(ORIGINAL_NAMES)


def test_what_is_not_a_lora_of_a_blocks_linear_is_refused() -> None:
    with pytest.raises(ValueError, match="proj_out"):
        files_of({"high_noise.proj_out.lora_A.default.weight": torch.zeros(1, 1)}, ALPHA)
