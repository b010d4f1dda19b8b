"""Laws of residency: disk holds one block of one denoiser, and whatever is held is let go of."""

import gc
import weakref

import pytest
import torch
from torch import nn

from tempoquant.errors import SettingsError
from tempoquant.hosts.diffusers.sampling import sample_latents
from tempoquant.models.wan.family import COMPONENTS
from tempoquant.models.weights import DenoiserWeights
from tempoquant.placement import streaming as residency
from tempoquant.placement.streaming import check_memory, denoisers_on_disk, encode_texts, loaded_pipeline
from tests.recorded import PROMPTS, SETTINGS, SOURCE


def in_memory(module: nn.Module) -> bool:
    return any(not parameter.is_meta for parameter in module.parameters())


def test_disk_holds_one_block_of_one_expert_at_a_time():
    most = {"blocks": 0, "experts": 0}
    with loaded_pipeline(SOURCE, "cpu", "disk", [PROMPTS[0].text, ""]) as loaded:
        denoisers = [loaded.pipeline.transformer, loaded.pipeline.transformer_2]
        blocks = [block for denoiser in denoisers for block in denoiser.blocks]
        seen = []

        def look(block: nn.Module, *_: object) -> None:
            assert in_memory(block)
            seen.append(block)
            most["blocks"] = max(most["blocks"], sum(in_memory(block) for block in blocks))
            most["experts"] = max(most["experts"], sum(in_memory(denoiser.patch_embedding) for denoiser in denoisers))

        handles = [block.attn1.register_forward_pre_hook(lambda *_, b=block: look(b)) for block in blocks]
        sample_latents(loaded.pipeline, PROMPTS[0], SETTINGS, 0, loaded.texts(PROMPTS[0].text))
        for handle in handles:
            handle.remove()
        assert len(seen) == 4 * 2 * 4  # steps, guidance, blocks of the running denoiser
        assert most == {"blocks": 1, "experts": 1}
        assert not any(in_memory(block) for block in blocks)
        assert loaded.pipeline.text_encoder is None


def test_a_block_that_fails_is_let_go_of():
    weights = {denoiser: DenoiserWeights(SOURCE, denoiser, torch.float32, "cpu") for denoiser in COMPONENTS}
    model = denoisers_on_disk(weights)["high_noise"]
    model.blocks[0].attn1.register_forward_pre_hook(lambda *_: 1 / 0)
    inputs = {
        "hidden_states": torch.zeros(1, 36, 2, 4, 4), "timestep": torch.tensor([999]),
        "encoder_hidden_states": torch.zeros(1, 512, 128),
    }  # fmt: skip
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        model(**inputs)
    assert not in_memory(model.blocks[0])


@pytest.mark.parametrize("memory", ["resident", "disk"])
def test_a_pipeline_is_gone_after_its_context(memory):
    with loaded_pipeline(SOURCE, "cpu", memory, ["a"]) as loaded:
        denoiser = weakref.ref(loaded.pipeline.transformer)
    del loaded
    gc.collect()
    assert denoiser() is None


def test_texts_encoded_alone_are_those_of_the_whole_pipeline():
    embeddings = encode_texts(SOURCE, ["a red circle", "", "a red circle"], "cpu")
    assert list(embeddings) == ["a red circle", ""]
    with loaded_pipeline(SOURCE, "cpu") as loaded:
        whole, empty = loaded.pipeline.encode_prompt("a red circle", "", max_sequence_length=512)
    torch.testing.assert_close(embeddings["a red circle"], {"prompt_embeds": whole})
    torch.testing.assert_close(embeddings[""], {"prompt_embeds": empty})


@pytest.mark.parametrize("memory", ["swap", "disk"])
def test_where_the_parts_are_changes_nothing_but_memory(memory, monkeypatch):
    """Swapping runs diffusers' hooks, here with the CPU in the GPU's place."""
    monkeypatch.setattr(residency, "check_memory", lambda *_: None)
    latents = []
    for mode in ("resident", memory):
        with loaded_pipeline(SOURCE, "cpu", mode, [PROMPTS[0].text, ""]) as loaded:
            texts = loaded.texts(PROMPTS[0].text)
            for _ in range(2):  # the second run finds what the first one left
                latents.append(sample_latents(loaded.pipeline, PROMPTS[0], SETTINGS, 0, texts))
    for each in latents[1:]:
        torch.testing.assert_close(each, latents[0])


def test_a_mode_that_cannot_be_is_refused():
    with pytest.raises(SettingsError, match="memory is one of resident, swap, disk while recording, not 'ram'"):
        check_memory("ram", "cpu")
    with pytest.raises(SettingsError, match="lean is a mode of generating: choose disk"):
        check_memory("lean", "cpu")
    with pytest.raises(SettingsError, match="choose resident or disk"):
        check_memory("swap", "cpu")
    check_memory("swap", "cuda")
