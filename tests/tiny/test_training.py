"""The training code computes what diffusers computes; only the speed differs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline

from tempoquant.tiny.sets import evaluation_items
from tempoquant.tiny.world import render
from training.architecture import build_expert, build_scheduler, build_text_encoder, build_vae
from training.checkpoints import load_checkpoint, read_average, save_checkpoint, update_average
from training.experts import MAX_TOKENS, first_frame_mask, sample_sigma
from training.latents import condition_of, embed_prompts, encode_normalised
from training.padding import padding_bias, use_padding_bias
from training.text import build_tokenizer
from training.vae import STAGES, draw_batch, stage_of, to_model
from training.whole_clip import decode_clip, encode_clip


@pytest.fixture(scope="module")
def pipeline() -> WanImageToVideoPipeline:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    return WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(len(tokenizer)).eval(),
        vae=build_vae().eval(),
        scheduler=build_scheduler(),
        transformer=build_expert().eval(),
        boundary_ratio=0.9,
    )


@pytest.mark.parametrize("num_frames", [1, 5, 17])
@torch.no_grad()
def test_the_vae_on_a_whole_clip_is_diffusers_chunked_vae(num_frames: int) -> None:
    torch.manual_seed(0)
    vae = build_vae().eval()
    for parameter in vae.parameters():  # else the temporal taps are zeros, and nothing of them is tested
        parameter.add_(0.02 * torch.randn_like(parameter))
    clip = torch.rand(1, 3, num_frames, 32, 32) * 2.0 - 1.0
    mean, log_variance = encode_clip(vae, clip)
    posterior = vae.encode(clip).latent_dist
    torch.testing.assert_close(mean, posterior.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_variance, posterior.logvar, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decode_clip(vae, mean).clamp(-1, 1), vae.decode(mean).sample, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_few_padding_tokens_with_a_bias_are_512_padding_tokens() -> None:
    torch.manual_seed(0)
    expert = build_expert().eval()
    hidden, timestep = torch.randn(2, 36, 5, 8, 8), torch.tensor([950.0, 300.0])
    num_tokens, padded_length = torch.tensor([7, 14]), torch.tensor([512, 512])
    text = torch.randn(2, 512, 128) * (torch.arange(512) < num_tokens[:, None])[..., None]
    expected = expert(hidden, timestep, text, return_dict=False)[0]
    use_padding_bias(expert).bias = padding_bias(num_tokens, MAX_TOKENS, padded_length)
    got = expert(hidden, timestep, text[:, :MAX_TOKENS], return_dict=False)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_condition_latents_and_mask_are_the_pipelines(pipeline: WanImageToVideoPipeline) -> None:
    item = evaluation_items(1)[0]
    clip = to_model(render(item.scene)[None])
    _, expected = pipeline.prepare_latents(
        pipeline.video_processor.preprocess(item.image, height=64, width=64),
        batch_size=1,
        height=64,
        width=64,
        num_frames=17,
        dtype=torch.float32,
    )
    got = torch.cat([first_frame_mask(1), encode_normalised(pipeline.vae, condition_of(clip))], dim=1)
    torch.testing.assert_close(got, expected, rtol=0.0, atol=2.0**-6)  # the training encodes in bfloat16


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["", evaluation_items(1)[0].prompt])
def test_prompt_embeddings_are_the_pipelines(pipeline: WanImageToVideoPipeline, prompt: str) -> None:
    expected, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
    got, num_tokens = embed_prompts(pipeline.tokenizer, pipeline.text_encoder, [prompt])
    torch.testing.assert_close(got[0], expected[0, :MAX_TOKENS], rtol=1e-4, atol=1e-5)
    assert not got[0, int(num_tokens) :].any()
    assert num_tokens < MAX_TOKENS


def test_the_longest_prompt_leaves_room_for_padding() -> None:
    longest = "a red circle moves left slowly and a blue square moves right quickly"
    assert len(build_tokenizer()(longest).input_ids) < MAX_TOKENS


def test_each_expert_sees_only_its_own_noise_levels() -> None:
    uniform = torch.linspace(0.0, 1.0, 1001)
    high, low = sample_sigma("high_noise", uniform), sample_sigma("low_noise", uniform)
    assert float(high.min()) == pytest.approx(0.9)
    assert float(low.max()) == pytest.approx(0.9)
    assert float(high.max()) == pytest.approx(1.0)
    assert float(low.min()) == 0.0


def test_stages_follow_each_other_and_cover_all_steps() -> None:
    total = sum(stage.num_steps for stage in STAGES)
    visited = [stage_of(step) for step in range(total)]
    shares = [share for _, share in visited]
    assert shares == sorted(shares)
    assert {stage for stage, _ in visited} == set(STAGES)
    assert shares[-1] < 1.0


def test_a_batch_depends_on_its_step_only() -> None:
    clips = np.stack([render(item.scene) for item in evaluation_items(3)])
    torch.testing.assert_close(draw_batch(clips, STAGES[1], 7), draw_batch(clips, STAGES[1], 7))
    assert not torch.equal(draw_batch(clips, STAGES[1], 7), draw_batch(clips, STAGES[1], 8))


def test_a_resumed_run_goes_on_exactly_where_it_stopped(tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Linear, dict[str, torch.Tensor], torch.optim.AdamW]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        average = {key: value.clone() for key, value in model.state_dict().items()}
        return model, average, torch.optim.AdamW(model.parameters(), lr=0.1)

    def advance(model: torch.nn.Linear, average: dict, optimizer: torch.optim.AdamW, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            update_average(average, model, 0.9)

    whole, stopped, resumed = make(), make(), make()
    advance(*whole, range(6))
    advance(*stopped, range(3))
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, *stopped, step=3)
    assert load_checkpoint(path, *resumed) == 3
    advance(*resumed, range(3, 6))
    for key, value in whole[1].items():
        torch.testing.assert_close(resumed[1][key], value, rtol=0, atol=0)
    save_checkpoint(path, *resumed, step=6)
    assert set(read_average(path)) == {"weight", "bias"}


def test_a_run_without_a_checkpoint_starts_at_step_zero(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    assert load_checkpoint(tmp_path / "none.safetensors", model, {}, optimizer) == 0
