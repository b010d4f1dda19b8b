"""Tiny random LTX-2 pipelines: the real classes and configs, scaled down; the tokenizer is a
stand-in.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from tests.quantized_wan import text_models

WIDTH, AUDIO_WIDTH, TEXT_WIDTH, TEXT_LAYERS = 128, 64, 32, 2
LATENTS, AUDIO_LATENTS, MEL_BINS = 16, 8, 16


def transformer(num_layers: int = 2, **config: Any) -> LTX2VideoTransformer3DModel:
    """Make a random denoiser of two streams, LTX-2.0's; `config` makes it a later version's."""
    torch.manual_seed(0)
    audio_channels = AUDIO_LATENTS * MEL_BINS // 4
    return LTX2VideoTransformer3DModel(
        in_channels=LATENTS, out_channels=LATENTS, num_attention_heads=2, attention_head_dim=WIDTH // 2,
        cross_attention_dim=WIDTH, audio_in_channels=audio_channels, audio_out_channels=audio_channels,
        audio_num_attention_heads=2, audio_attention_head_dim=AUDIO_WIDTH // 2, audio_cross_attention_dim=AUDIO_WIDTH,
        num_layers=num_layers, caption_channels=TEXT_WIDTH, **config,
    ).eval()  # fmt: skip


LATER = {
    "gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True, "audio_cross_attn_mod": True,
    "perturbed_attn": True, "use_prompt_embeddings": False, "rope_type": "split",
}  # fmt: skip
"""What LTX-2.3 changes of its transformer."""


def autoencoder() -> AutoencoderKLLTX2Video:
    """Make an autoencoder with 32 pixels and 8 frames a latent, as the published one."""
    torch.manual_seed(1)
    return AutoencoderKLLTX2Video(
        latent_channels=LATENTS, block_out_channels=(8, 16, 32, 64), decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1), decoder_causal=False,
        spatial_compression_ratio=32, temporal_compression_ratio=8,
    ).eval()  # fmt: skip


def audio_models() -> dict[str, Any]:
    """Make an autoencoder of spectrograms, and a vocoder."""
    torch.manual_seed(2)
    autoencoder = AutoencoderKLLTX2Audio(
        base_channels=AUDIO_LATENTS * MEL_BINS // 4, ch_mult=(1, 1, 1), num_res_blocks=1,
        latent_channels=AUDIO_LATENTS, mel_bins=MEL_BINS, resolution=MEL_BINS,
    ).eval()  # fmt: skip
    vocoder = LTX2Vocoder(
        in_channels=2 * MEL_BINS, hidden_channels=32, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]],
    ).eval()  # fmt: skip
    return {"audio_vae": autoencoder, "vocoder": vocoder}


def text_encoder() -> Gemma3ForConditionalGeneration:
    """Make Gemma 3 in small."""
    torch.manual_seed(3)
    text = {
        "hidden_size": TEXT_WIDTH, "intermediate_size": 64, "num_hidden_layers": TEXT_LAYERS, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 32,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    ).eval()


def connectors(later: bool) -> LTX2TextConnectors:
    """Make the module that turns all layers' outputs into one text for each stream."""
    torch.manual_seed(4)
    widths = (WIDTH, AUDIO_WIDTH) if later else (TEXT_WIDTH, TEXT_WIDTH)
    config: dict[str, Any] = {}
    for stream, width in zip(("video", "audio"), widths, strict=True):
        config |= {
            f"{stream}_connector_num_attention_heads": 2, f"{stream}_connector_attention_head_dim": width // 2,
            f"{stream}_connector_num_layers": 1, f"{stream}_connector_num_learnable_registers": 4,
            f"{stream}_hidden_dim": width,
        }  # fmt: skip
    return LTX2TextConnectors(
        caption_channels=TEXT_WIDTH, text_proj_in_factor=TEXT_LAYERS + 1, per_modality_projections=later, **config
    ).eval()


def _pipeline(kind: Any, later: bool = False) -> Any:
    tokenizer, _ = text_models()
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096,
        shift_terminal=0.1,
    )  # fmt: skip
    return kind(
        scheduler=scheduler, vae=autoencoder(), text_encoder=text_encoder(), tokenizer=tokenizer,
        connectors=connectors(later), transformer=transformer(**(LATER if later else {})), **audio_models(),
    )  # fmt: skip


def ltx2() -> LTX2Pipeline:
    """Make a pipeline from text to video and audio."""
    return _pipeline(LTX2Pipeline)


def ltx2_with_image() -> LTX2ImageToVideoPipeline:
    """Make the same with a given first frame: its tokens are clean."""
    return _pipeline(LTX2ImageToVideoPipeline)


def ltx23() -> LTX2Pipeline:
    """Make the later version: gated attention, and a text for each stream."""
    return _pipeline(LTX2Pipeline, later=True)


PIPELINES = {build.__name__: build for build in (ltx2, ltx2_with_image, ltx23)}


def write(folder: Path, name: str) -> Path:
    """Save one of PIPELINES with sampling settings for a few small frames."""
    PIPELINES[name]().save_pretrained(folder)
    (folder / "sampling.json").write_text(
        '{"height": 64, "width": 64, "num_frames": 9, "num_steps": 4, "guidance_scale": 2.5, "flow_shift": null, '
        '"fps": 8}'
    )
    return folder
