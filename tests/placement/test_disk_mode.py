"""Laws of the memory mode disk: the same video, two blocks in memory at the most, and nothing stays
open.
"""

from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from torch import nn

import tempoquant
from tempoquant.errors import CheckpointError, SettingsError, UnsupportedError
from tempoquant.hosts.diffusers.sampling import generate_video
from tempoquant.models.source import SourceModel
from tempoquant.placement import disk_denoisers
from tempoquant.placement.memory_modes import load_in_mode, set_memory_mode
from tests.quantized_wan import generate, write_pipeline
from tests.recorded import PROMPTS, SETTINGS, SOURCE


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline") / "quantized", centred_by_bin=True)


def in_memory(module: nn.Module) -> bool:
    return any(not parameter.is_meta for parameter in module.parameters())


def mapped(folder: Path) -> list[str]:
    """Files of a folder that this process has mapped or open."""
    maps = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    opened = [str(entry.resolve()) for entry in Path("/proc/self/fd").iterdir()]
    return [name for name in {*maps, *opened} if name.startswith(str(folder.resolve()))]


def test_quantized_experts_give_the_same_latents_and_leave_no_file_open(quantized):
    before = {str(file): file.stat().st_mtime_ns for file in quantized.rglob("*")}
    resident = generate(tempoquant.load_pipeline(quantized, "resident", "cpu"))
    pipeline = tempoquant.load_pipeline(quantized, "disk", "cpu")
    for _ in range(2):  # the second run finds what the first one left
        assert torch.equal(generate(pipeline), resident)
    assert [name for name in mapped(quantized) if "transformer" in name] == []
    pipeline._tempoquant_memory_mode.remove()
    assert not any(in_memory(model) for model in (pipeline.transformer, pipeline.transformer_2))
    assert before == {str(file): file.stat().st_mtime_ns for file in quantized.rglob("*")}


def test_16_bit_experts_give_the_same_video_with_two_blocks_in_memory_and_one_expert(monkeypatch):
    """One block computes, and the next one is read. Each is read once a call, and the rest of an
    expert once.
    """
    read = []
    own = disk_denoisers._read
    monkeypatch.setattr(disk_denoisers, "_read", lambda part: read.append(part.prefix) or own(part))
    resident = load_in_mode(SOURCE, "resident", "cpu")
    expected = generate_video(resident, PROMPTS[0], SETTINGS, 0)
    pipeline = load_in_mode(SOURCE, "disk", "cpu")
    experts = [pipeline.transformer, pipeline.transformer_2]
    blocks = [block for expert in experts for block in expert.blocks]
    most = []

    def look(*_: object) -> None:
        most.append((sum(map(in_memory, blocks)), sum(in_memory(expert.patch_embedding) for expert in experts)))

    for block in blocks:
        block.attn1.register_forward_pre_hook(look)
    assert (generate_video(pipeline, PROMPTS[0], SETTINGS, 0) == expected).all()
    assert set(most) == {(1, 1)}  # what is read ahead is in no module yet
    num_calls = 4 * 2
    assert len(read) == num_calls * len(experts[0].blocks) + len(experts)
    assert not any(map(in_memory, blocks))


def test_a_block_that_was_read_ahead_is_the_next_one_and_the_only_one(monkeypatch):
    pipeline = load_in_mode(SOURCE, "disk", "cpu")
    held = []
    own = disk_denoisers.DiskDenoisers._read
    monkeypatch.setattr(
        disk_denoisers.DiskDenoisers, "_read",
        lambda self, part: held.append(self._next and self._next[0].prefix == part.prefix) or own(self, part),
    )  # fmt: skip
    generate_video(pipeline, PROMPTS[0], SETTINGS, 0)
    of_a_call = [None, *[True] * (len(pipeline.transformer.blocks) - 1)]
    assert held == 4 * 2 * of_a_call


def test_a_damaged_block_is_refused_when_it_is_first_read(quantized, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(quantized, tmp_path / "damaged")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith(".clip_ratio"))
    tensors[name] = torch.full_like(tensors[name].view(torch.float32), float("nan")).view(tensors[name].dtype)
    save_file(tensors, file)
    pipeline = tempoquant.load_pipeline(folder, "disk", "cpu")
    with pytest.raises(CheckpointError, match="clip_ratio"):
        generate(pipeline)


def test_what_needs_weights_in_memory_is_refused_by_name(quantized):
    plain = WanImageToVideoPipeline.from_pretrained(quantized, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match=r"load_pipeline\(folder, \"disk\"\)"):
        set_memory_mode(plain, "disk", "cpu")
    pipeline = tempoquant.load_pipeline(quantized, "disk", "cpu")
    with pytest.raises(UnsupportedError, match="load it anew for swap"):
        set_memory_mode(pipeline, "swap", "cpu")
    with pytest.raises(UnsupportedError, match=r"disk for cpu, where .*: load it anew for cuda:1"):
        set_memory_mode(pipeline, "disk", "cuda:1")
    set_memory_mode(pipeline, "disk", "cpu")  # which is in force after the refusals
    for change in (pipeline.transformer.compile_repeated_blocks, lambda: pipeline.load_lora_weights("a")):
        with pytest.raises(UnsupportedError, match="they can have no adapters and not be compiled"):
            change()
    with pytest.raises(UnsupportedError, match="--compile and --memory disk cannot be combined"):
        tempoquant.accelerate(pipeline, compile=True)
    with pytest.raises(SettingsError, match="memory is one of resident, swap, lean, disk, not 'ram'"):
        tempoquant.load_pipeline(quantized, "ram", "cpu")


def test_an_adapter_that_peft_put_in_by_itself_is_refused_at_the_next_call():
    from peft import LoraConfig, inject_adapter_in_model

    pipeline = load_in_mode(SourceModel.open("tiny"), "disk", "cpu")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), pipeline.transformer)
    with pytest.raises(UnsupportedError, match="has got other weights than its files"):
        generate_video(pipeline, PROMPTS[0], SETTINGS, 0)
