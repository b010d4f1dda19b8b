"""Tiny random pipelines of every Wan kind that diffusers has: the real classes and configs, scaled
down.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from tests.quantized_wan import text_models

WIDTH, TEXT_DIM, IMAGE_DIM = 128, 64, 32
LATENTS = 16


def transformer(seed: int, in_channels: int, num_layers: int = 2, **config: Any) -> WanTransformer3DModel:
    """Make a random denoiser, which predicts LATENTS channels where `config` has no
    out_channels.
    """
    torch.manual_seed(seed)
    config = {"out_channels": LATENTS, **config}
    kind = WanVACETransformer3DModel if "vace_layers" in config else WanTransformer3DModel
    return kind(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=WIDTH // 2, in_channels=in_channels,
        text_dim=TEXT_DIM, freq_dim=64, ffn_dim=2 * WIDTH, num_layers=num_layers,
        rope_max_seq_len=64, **config,
    ).eval()  # fmt: skip


def autoencoder(pixels: int = 8) -> AutoencoderKLWan:
    """Make Wan2.1's in small, or with 16 pixels a latent Wan2.2's."""
    torch.manual_seed(3)
    changes: dict[str, Any] = {}
    if pixels == 16:
        changes = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
                   "scale_factor_spatial": 16, "decoder_base_dim": 8}  # fmt: skip
    return AutoencoderKLWan(
        base_dim=8, z_dim=LATENTS, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        **changes,
    ).eval()  # fmt: skip


def image_encoder() -> dict[str, Any]:
    """Make CLIP's in small, as in Wan2.1's image-to-video."""
    torch.manual_seed(4)
    config = CLIPVisionConfig(hidden_size=IMAGE_DIM, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                              image_size=28, patch_size=14)  # fmt: skip
    size = {"height": 28, "width": 28}
    return {
        "image_encoder": CLIPVisionModel(config).eval(),
        "image_processor": CLIPImageProcessor(size=size, crop_size=size),
    }


def _pipeline(kind: Any, transformers: list[Any], pixels: int = 8, **more: Any) -> Any:
    tokenizer, text_encoder = text_models()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    second = [] if kind is WanAnimatePipeline else [None]
    names = dict(zip(("transformer", "transformer_2"), [*transformers, *second], strict=False))
    return kind(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=autoencoder(pixels), scheduler=scheduler, **names, **more
    )


def wan22_t2v() -> WanPipeline:
    """Make a pipeline with two experts and no image."""
    return _pipeline(WanPipeline, [transformer(0, LATENTS), transformer(1, LATENTS)], boundary_ratio=0.875)


def wan22_ti2v() -> WanPipeline:
    """Make a pipeline with one denoiser, a timestep for each token, and 16 pixels a latent."""
    return _pipeline(WanPipeline, [transformer(0, LATENTS)], pixels=16, expand_timesteps=True)


def wan22_ti2v_with_image() -> WanImageToVideoPipeline:
    """Make the same model with an image: the tokens of its frame are clean."""
    none = {"image_encoder": None, "image_processor": None}
    return _pipeline(WanImageToVideoPipeline, [transformer(0, LATENTS)], pixels=16, expand_timesteps=True, **none)


def wan21_t2v() -> WanPipeline:
    """Make a pipeline with one denoiser and no image."""
    return _pipeline(WanPipeline, [transformer(0, LATENTS)])


_IMAGE_BRANCH = {"image_dim": IMAGE_DIM, "added_kv_proj_dim": WIDTH}


def wan21_i2v() -> WanImageToVideoPipeline:
    """Make a pipeline with one denoiser that also attends to an image."""
    return _pipeline(WanImageToVideoPipeline, [transformer(0, 36, **_IMAGE_BRANCH)], **image_encoder())


def two_experts_with_image_encoder() -> WanImageToVideoPipeline:
    """Make Wan2.2's two experts with Wan2.1's image branch."""
    denoisers = [transformer(seed, 36, **_IMAGE_BRANCH) for seed in (0, 1)]
    return _pipeline(WanImageToVideoPipeline, denoisers, boundary_ratio=0.9, **image_encoder())


def vace() -> WanVACEPipeline:
    """Make two lists of blocks: hints from one go into the other."""
    model = transformer(0, LATENTS, num_layers=3, vace_layers=[0, 2], vace_in_channels=96)
    return _pipeline(WanVACEPipeline, [model])


def vace_with_two_experts() -> WanVACEPipeline:
    """Make the same with two denoisers."""
    denoisers = [transformer(seed, LATENTS, num_layers=3, vace_layers=[0, 2], vace_in_channels=96) for seed in (0, 1)]
    return _pipeline(WanVACEPipeline, denoisers, boundary_ratio=0.875)


_FACE = {
    "motion_encoder_size": 16, "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_style_dim": 16,
    "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16, "inject_face_latents_blocks": 2,
}  # fmt: skip


def animate() -> WanAnimatePipeline:
    """Make one denoiser that attends to an image, with an adapter to a face's motion after its
    first and third block.
    """
    torch.manual_seed(0)
    model = WanAnimateTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=WIDTH // 2, in_channels=2 * LATENTS + 4,
        latent_channels=LATENTS, out_channels=LATENTS, text_dim=TEXT_DIM, freq_dim=64, ffn_dim=2 * WIDTH, num_layers=4,
        rope_max_seq_len=64, **_IMAGE_BRANCH, **_FACE,
    ).eval()  # fmt: skip
    return _pipeline(WanAnimatePipeline, [model], **image_encoder())


PIPELINES = {
    build.__name__: build
    for build in (wan22_t2v, wan22_ti2v, wan22_ti2v_with_image, wan21_t2v, wan21_i2v,
                  two_experts_with_image_encoder, vace, vace_with_two_experts, animate)
}  # fmt: skip


def write(folder: Path, name: str) -> Path:
    """Save one of PIPELINES with sampling settings for a few small frames."""
    PIPELINES[name]().save_pretrained(folder)
    size = 64 if "ti2v" in name else 32
    (folder / "sampling.json").write_text(
        f'{{"height": {size}, "width": {size}, "num_frames": 5, "num_steps": 4, "guidance_scale": 2.5, '
        '"flow_shift": 3.0, "fps": 8}'
    )
    return folder
