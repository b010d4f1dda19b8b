"""The five parts of the bundled pipeline, with random weights. Wan2.2-I2V-A14B's classes, at small
sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

BOUNDARY_RATIO = 0.9
FLOW_SHIFT = 5.0
NUM_TRAIN_TIMESTEPS = 1000
TEXT_WIDTH = 128
EXPERTS = {"high_noise": "transformer", "low_noise": "transformer_2"}
"""This project's expert names to the pipeline's component names."""


def build_vae() -> AutoencoderKLWan:
    """Build the VAE of 2.6 million parameters; strides 4 in time, 8 in space, 16 latent channels,
    as Wan's.
    """
    vae = AutoencoderKLWan(
        base_dim=16, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    _start_frame_by_frame(vae)
    return vae


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """Build the text encoder of half a million parameters; hidden states of width 128."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


class Variant(NamedTuple):
    """The differences between two trained pairs of experts; VAE and text encoder are the same.

    Attributes:
        num_heads: of 64 channels each.
        num_layers: blocks of an expert.
        seed: added to the seeds of training.
    """

    num_heads: int
    num_layers: int
    seed: int


VARIANTS = {"tiny": Variant(4, 4, 0), "other": Variant(5, 3, 100)}
"""The shipped variant, and one that no quantizer was tuned on."""


def build_expert(variant: Variant = VARIANTS["tiny"]) -> WanTransformer3DModel:
    """Build an expert; for `tiny` 4.8 million parameters: 4 blocks of width 256, 4 heads of 64."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=variant.num_heads,
        attention_head_dim=64,
        in_channels=36,
        out_channels=16,
        text_dim=TEXT_WIDTH,
        freq_dim=256,
        ffn_dim=256 * variant.num_heads,
        num_layers=variant.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        image_dim=None,
        added_kv_proj_dim=None,
        rope_max_seq_len=1024,
    )


def build_scheduler() -> UniPCMultistepScheduler:
    """Build the sampler that the pipeline ships with; the training noise levels follow its
    shift.
    """
    return UniPCMultistepScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=FLOW_SHIFT,
    )


@torch.no_grad()
def _start_frame_by_frame(vae: AutoencoderKLWan) -> None:
    """Let the random VAE treat frames separately and repeat them in time, so that learning on
    frames serves clips.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv3d) and module.kernel_size == (3, 3, 3):
            module.weight[:, :, :-1] = 0.0
        elif isinstance(module, nn.Conv3d) and module.kernel_size == (3, 1, 1):
            channels = module.in_channels
            copies = module.out_channels // channels
            module.weight *= 0.2
            module.weight[:, :, -1, 0, 0] += torch.eye(channels).repeat(copies, 1)
            module.bias.zero_()
