"""Operations of a video: against a case counted by hand, and against PyTorch's own count of the
real modules.
"""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.evaluation_operations import (
    SHARE,
    attention_operations,
    autoencoder_operations,
    linear_operations,
    published_share,
    video_cost,
    video_tokens,
)
from tempoquant.models.pipeline_configs import read_configs
from tempoquant.models.wan.pipelines import I2V_A14B
from tempoquant.models.wan.published import A14B
from tempoquant.planning.generation_memory import empty_denoiser

PUBLISHED = I2V_A14B.replace(num_frames=61)


def test_a_block_counted_by_hand():
    """10 tokens and the 512 of the text: 5120 · 5120 = 26,214,400 and 5120 · 13,824 = 70,778,880
    weights.
    """
    video = 6 * 2 * 10 * 26_214_400  # q, k, v, o of self-attention, q and o of cross-attention
    text = 2 * 2 * 512 * 26_214_400  # k and v of cross-attention
    feed_forward = 2 * 2 * 10 * 70_778_880
    assert linear_operations(10) == video + text + feed_forward
    itself = 2 * (2 * 10 * 10 * 5120)  # Q·Kᵀ and P·V
    to_text = 2 * (2 * 10 * 512 * 5120)
    assert attention_operations(10) == itself + to_text


def test_tokens_of_the_published_sizes():
    assert video_tokens(PUBLISHED) == 16 * 30 * 52 == 24_960
    assert video_tokens(I2V_A14B) == 32_760
    assert video_tokens(I2V_A14B.replace(height=720, width=1280)) == 75_600


def test_a_call_costs_what_pytorch_counts_on_the_real_modules():
    configs = read_configs(A14B)
    counts = []
    for num_blocks in (1, 2):  # their difference is one block, and nothing of what is outside
        model = empty_denoiser(configs, "high_noise", num_blocks)
        call = {
            "hidden_states": torch.empty(1, 36, 16, 60, 104, dtype=torch.bfloat16, device="meta"),
            "timestep": torch.empty(1, device="meta"),
            "encoder_hidden_states": torch.empty(1, 512, 4096, dtype=torch.bfloat16, device="meta"),
        }
        with FlopCounterMode(display=False) as counted:
            model(**call)
        counts.append(counted.get_total_flops())
    tokens = video_tokens(PUBLISHED)
    assert counts[1] - counts[0] == linear_operations(tokens) + attention_operations(tokens)
    assert counts[1] == pytest.approx(2 * (counts[1] - counts[0]), rel=2e-2)  # outside: 0.04 % of forty blocks


def test_the_autoencoder_costs_the_same_for_every_latent_frame_but_the_first():
    costs = [
        autoencoder_operations(I2V_A14B.replace(height=64, width=64, num_frames=frames)) for frames in (1, 5, 9, 13)
    ]
    encode, decode = ([getattr(cost, name) for cost in costs] for name in ("encode", "decode"))
    for values in (encode, decode):
        steps = [later - earlier for earlier, later in itertools.pairwise(values)]
        assert len(set(steps)) == 1 and steps[0] > values[0] > 0


def test_a_video_is_steps_times_branches_times_blocks():
    once = video_cost(PUBLISHED.replace(num_steps=1, guidance_scale=1.0))
    whole = video_cost(PUBLISHED)
    assert whole.linears == 80 * once.linears and whole.attention == 80 * once.attention
    assert whole.autoencoder == once.autoencoder


def test_seconds_fall_with_the_share_and_four_bits_save_time_on_linears_alone():
    whole, half = video_cost(PUBLISHED), video_cost(PUBLISHED, share=SHARE / 2)
    assert half.seconds_16bit == pytest.approx(2 * whole.seconds_16bit, rel=1e-12)
    assert 1 < whole.speedup < 1.65  # the ratio of the linears alone, docs/kernels.md


def test_the_assumed_share_agrees_with_the_published_time():
    assert published_share() == pytest.approx(SHARE, abs=0.02)
