"""Laws of memory modes: the same video, parts away as promised, a plain pipeline afterwards."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import tempoquant
from tempoquant.errors import SettingsError, UnsupportedError
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.hosts.diffusers.sampling import generate_video
from tempoquant.models.hooks import is_watched, unobtrusive
from tempoquant.models.wan import chunked_blocks
from tempoquant.models.wan.family import COMPONENTS
from tempoquant.placement import host_copies
from tempoquant.placement.lifted_verbs import DENOISER_VERBS, PIPELINE_VERBS
from tempoquant.placement.memory_modes import set_memory_mode
from tests.quantized_wan import generate, write_pipeline
from tests.recorded import PROMPTS, SETTINGS, SOURCE

MODES = ("resident", "swap", "lean")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline() -> WanImageToVideoPipeline:
    return load_pipeline(SOURCE, "cpu")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline") / "quantized", centred_by_bin=True)


@pytest.fixture
def plain(pipeline) -> Iterator[WanImageToVideoPipeline]:
    yield pipeline
    if (mode := getattr(pipeline, "_tempoquant_memory_mode", None)) is not None:
        mode.remove()
    assert hooked(pipeline) == []


def hooked(pipeline: WanImageToVideoPipeline) -> list[str]:
    """Return modules that do more than their class."""
    return [
        f"{component}.{name}"
        for component in ("text_encoder", "vae", "transformer", "transformer_2")
        for name, module in getattr(pipeline, component).named_modules()
        if "forward" in module.__dict__ or hasattr(module, "_hf_hook")
        or any("BinClock" not in str(hook)
               for hooks in (module._forward_pre_hooks, module._forward_hooks) for hook in hooks.values())
    ]  # fmt: skip


@pytest.fixture
def copying(monkeypatch) -> None:
    """Let the CPU play a GPU: every copy to it is a new tensor, distinguishable from the host's."""
    monkeypatch.setattr(host_copies, "to_device", lambda host, _device: host.clone())


class Places:
    """The tensors of a model that are where they were before anything was brought."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = [(tensor, tensor.data_ptr()) for tensor in model.parameters()]

    def num_away(self) -> int:
        """Count tensors that are copies, on the "device"."""
        return sum(tensor.data_ptr() != before for tensor, before in self._tensors)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_changes_no_bit_of_the_video(plain, mode):
    """The bundled model's 8 tokens are one chunk, and its frames one tile: the same products in the
    same order.
    """
    before = generate_video(plain, PROMPTS[0], SETTINGS, 0)
    in_force = set_memory_mode(plain, mode, "cpu")
    for _ in range(2):  # the second run finds what the first one left
        assert (generate_video(plain, PROMPTS[0], SETTINGS, 0) == before).all()
    in_force.remove()
    assert hooked(plain) == []
    assert (generate_video(plain, PROMPTS[0], SETTINGS, 0) == before).all()


@pytest.mark.parametrize("mode", MODES)
def test_quantized_experts_give_the_same_latents(quantized, mode):
    pipeline = WanImageToVideoPipeline.from_pretrained(quantized, dtype=torch.bfloat16)
    before = generate(pipeline)
    in_force = tempoquant.set_memory_mode(pipeline, mode, "cpu")
    blocks = [*pipeline.transformer.blocks, *pipeline.transformer_2.blocks]
    assert all(chunked_blocks._is_plain(block) and not is_watched(block) for block in blocks), "no chunks, in silence"
    assert torch.equal(generate(pipeline), before)
    in_force.remove()
    assert hooked(pipeline) == []
    assert torch.equal(generate(pipeline), before)


@pytest.mark.parametrize("mode", MODES)
def test_the_text_encoder_is_on_the_device_one_block_at_a_time_and_its_embedding_never(plain, copying, mode):
    encoder = plain.text_encoder
    set_memory_mode(plain, mode, "cpu")
    blocks = [Places(block) for block in encoder.encoder.block]
    whole, embedding = Places(encoder), Places(encoder.get_input_embeddings())
    seen = []

    def look(index: int) -> None:
        seen.append([index, *(i for i, block in enumerate(blocks) if block.num_away())])
        assert embedding.num_away() == 0

    handles = [
        block.layer[0].register_forward_pre_hook(lambda *_, index=index: look(index))
        for index, block in enumerate(encoder.encoder.block)
    ]
    generate_video(plain, PROMPTS[0], SETTINGS, 0)
    for handle in handles:
        handle.remove()
    assert seen == 2 * [[index, index] for index in range(len(blocks))]  # the prompt, and the empty one
    assert whole.num_away() == 0


def test_whatever_looks_up_rows_of_the_embedding_does_so_on_the_host(plain):
    """The encoder shares one weight among several modules, and calls another one than it gives
    out.
    """
    encoder = plain.text_encoder
    called = []
    handles = [
        module.register_forward_hook(lambda module, *_: called.append(module))
        for module in encoder.modules()
        if getattr(module, "weight", None) is encoder.get_input_embeddings().weight
    ]
    plain.encode_prompt("a", max_sequence_length=8, do_classifier_free_guidance=False)
    for handle in handles:
        handle.remove()
    set_memory_mode(plain, "resident", "cpu")
    assert called and all(module._forward_pre_hooks and module._forward_hooks for module in called)


def test_all_tensors_of_the_expert_that_runs_are_on_the_device(plain, copying):
    set_memory_mode(plain, "swap", "cpu")
    model = plain.transformer
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.data_ptr() for tensor in tensors]
    seen = []

    def look() -> None:
        seen.append(all(tensor.data_ptr() != place for tensor, place in zip(tensors, before, strict=True)))

    handle = model.blocks[-1].norm3.register_forward_pre_hook(lambda *_: look())
    generate_video(plain, PROMPTS[0], SETTINGS, 0)
    handle.remove()
    assert seen == [True, True, True, False]  # in the last call earlier blocks have left


def test_experts_take_turns_and_never_take_more_room_than_one(plain, copying):
    swap = set_memory_mode(plain, "swap", "cpu").swap
    num_parts = 1 + len(plain.transformer.blocks)
    calls = []

    def look(denoiser: str) -> None:
        there = {each: sum(swap.on_device(each)) for each in COMPONENTS}
        assert sum(there.values()) <= num_parts
        calls.append((denoiser, there[denoiser]))

    handles = [
        block.register_forward_pre_hook(lambda *_, denoiser=denoiser: look(denoiser))
        for denoiser, model in (("high_noise", plain.transformer), ("low_noise", plain.transformer_2))
        for block in model.blocks
    ]
    generate_video(plain, PROMPTS[0], SETTINGS, 0)
    for handle in handles:
        handle.remove()
    whole, leaving = (num_parts,) * (num_parts - 1), tuple(range(num_parts, 1, -1))
    of_each = [tuple(number for each, number in calls if each == denoiser) for denoiser in COMPONENTS]
    assert of_each == 2 * [3 * whole + leaving]  # two steps of two calls; blocks leave during the last one
    assert [sum(swap.on_device(denoiser)) for denoiser in COMPONENTS] == [
        0,
        0,
    ]  # the autoencoder had the device to itself


def test_the_next_expert_is_there_when_the_first_one_ends(plain, copying):
    swap = set_memory_mode(plain, "swap", "cpu").swap
    found = []
    handles = [plain.transformer_2.register_forward_pre_hook(lambda *_: found.append(all(swap.on_device("low_noise"))))]
    handles += [plain.transformer.register_forward_hook(lambda *_: found.append(swap.on_device("high_noise")[1]))]
    # Runs before the mode's own hook would bring what is missing, so this is what the exchange has
    # brought.
    plain.transformer_2._forward_pre_hooks.move_to_end(handles[0].id, last=False)
    generate_video(plain, PROMPTS[0], SETTINGS, 0)
    for handle in handles:
        handle.remove()
    assert found == [True, True, True, False, True, True, True, True]  # four calls of each


@pytest.mark.parametrize("mode", MODES)
def test_a_call_that_fails_spoils_nothing(plain, copying, mode):
    before = generate_video(plain, PROMPTS[0], SETTINGS, 0)
    set_memory_mode(plain, mode, "cpu")
    for component in ("transformer", "transformer_2"):
        fail = unobtrusive(lambda *_: 1 / 0)
        handle = getattr(plain, component).blocks[1].ffn.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            generate_video(plain, PROMPTS[0], SETTINGS, 0)
        handle.remove()
        after = generate_video(plain, PROMPTS[0], SETTINGS, 0)
        # Copies are aligned otherwise than weights mapped from files, which moves a sum's last bit:
        # one level of 255.
        assert abs(after.astype(int) - before.astype(int)).max() <= 1


def lora(rows: int = 128) -> dict[str, torch.Tensor]:
    """Write a LoRA of one 4-bit layer and one 16-bit layer of the quantized denoisers; other `rows`
    do not fit them.
    """
    generator = torch.Generator().manual_seed(0)
    modules = {"blocks.0.attn1.to_q": (rows, 128), "proj_out": (64, 128)}
    return {
        f"transformer.{name}.lora_{half}.weight": torch.randn(*shape, generator=generator)
        for name, (out, width) in modules.items() for half, shape in (("A", (2, width)), ("B", (out, 2)))
    }  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_a_lora_goes_into_a_mode_and_out_of_it(quantized, copying, mode):
    pipeline = WanImageToVideoPipeline.from_pretrained(quantized, dtype=torch.bfloat16)
    before = generate(pipeline)
    for name in ("transformer", "transformer_2"):
        pipeline.load_lora_weights(lora(), adapter_name="x", load_into_transformer_2=name == "transformer_2")
    adapted = generate(pipeline)
    assert not torch.equal(adapted, before)
    set_memory_mode(pipeline, mode, "cpu")
    assert torch.equal(generate(pipeline), adapted), "loaded first, the mode set afterwards"
    pipeline.unload_lora_weights()
    assert torch.equal(generate(pipeline), before) and hasattr(pipeline.vae, "_hf_hook")
    pipeline.load_lora_weights(lora(), adapter_name="x")
    pipeline.transformer_2.load_lora_adapter(lora(), adapter_name="x")
    assert torch.equal(generate(pipeline), adapted) and hasattr(pipeline.vae, "_hf_hook")
    pipeline.set_adapters(["x"], [0.0])
    assert torch.equal(generate(pipeline), before)
    with pytest.raises(UnsupportedError, match="keep LoRA adapters loaded"):
        pipeline.fuse_lora(components=["transformer"])
    pipeline.delete_adapters("x")
    with pytest.raises(RuntimeError, match="size mismatch"):
        pipeline.load_lora_weights(lora(rows=64), adapter_name="y")
    assert torch.equal(generate(pipeline), before) and hasattr(pipeline.vae, "_hf_hook")
    set_memory_mode(pipeline, mode, "cpu").remove()
    assert not {*PIPELINE_VERBS} & {*vars(pipeline)} and not {*DENOISER_VERBS} & {*vars(pipeline.transformer)}


@pytest.mark.parametrize("mode", ("swap", "lean"))
def test_other_weights_that_nobody_spoke_of_are_refused_until_the_mode_is_set_again(quantized, mode):
    pipeline = WanImageToVideoPipeline.from_pretrained(quantized, dtype=torch.bfloat16)
    set_memory_mode(pipeline, mode, "cpu")
    inject_adapter_in_model(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]), pipeline.transformer)
    with pytest.raises(UnsupportedError, match="set the mode again after loading"):
        generate(pipeline)
    set_memory_mode(pipeline, "resident", "cpu").remove()
    expected = generate(pipeline)
    set_memory_mode(pipeline, mode, "cpu")
    assert torch.equal(generate(pipeline), expected)


def test_setting_a_mode_takes_the_one_before_off(plain):
    set_memory_mode(plain, "swap", "cpu")
    set_memory_mode(plain, "lean", "cpu")
    set_memory_mode(plain, "resident", "cpu").remove()
    assert hooked(plain) == []


def test_the_autoencoder_gets_its_own_tiles_back(plain):
    before = (plain.vae.use_tiling, plain.vae.tile_sample_min_height, plain.vae.tile_sample_stride_width)
    in_force = set_memory_mode(plain, "resident", "cpu")
    assert plain.vae.use_tiling
    in_force.remove()
    assert (plain.vae.use_tiling, plain.vae.tile_sample_min_height, plain.vae.tile_sample_stride_width) == before


def test_what_cannot_be_placed_is_refused_and_left_alone(plain):
    with pytest.raises(SettingsError, match="memory is one of resident, swap, lean, disk, not 'ram'"):
        set_memory_mode(plain, "ram", "cpu")
    with pytest.raises(
        UnsupportedError, match=r"no model family covers a Linear: supported are .*WanImageToVideoPipeline"
    ):
        set_memory_mode(nn.Linear(1, 1), "swap", "cpu")
    plain.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1
    )
    with pytest.raises(UnsupportedError, match="other hooks place"):
        set_memory_mode(plain, "swap", "cpu")
    plain.transformer._diffusers_hook.remove_hook("group_offloading", recurse=True)
    plain.transformer._diffusers_hook.remove_hook("layer_execution_tracker", recurse=True)
    for module in plain.transformer.modules():
        module.__dict__.pop("forward", None)
