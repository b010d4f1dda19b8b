"""Tiny random pipelines of image models that no family covers: the real classes and configs, scaled
down.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
)

from tests.quantized_wan import text_models

TEXT_WIDTH = 64
_WORDS = ("<pad>", "</s>", "<unk>", "a", "cat", "dog", "bird", "walks", "b")


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Make a stand-in of a few words."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=77
    )
    fast.chat_template = template
    return fast


def autoencoder(channels: int) -> AutoencoderKL:
    """Make FLUX's in small: eight pixels a latent."""
    torch.manual_seed(3)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels, norm_num_groups=4, layers_per_block=1,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.36,
    ).eval()  # fmt: skip


def flux() -> FluxPipeline:
    """Make double blocks, then single ones; a timestep of 0 … 1; guidance is a number that the
    model takes.
    """
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
    ).eval()  # fmt: skip
    second_tokenizer, second = text_models()
    torch.manual_seed(1)
    clip = CLIPTextConfig(
        vocab_size=len(_WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), vae=autoencoder(4),
        text_encoder=CLIPTextModel(clip).eval(), tokenizer=tokenizer(), text_encoder_2=second,
        tokenizer_2=second_tokenizer, transformer=transformer,
    )  # fmt: skip


def qwen_image() -> QwenImagePipeline:
    """Make double blocks with a modulation each; guidance by two calls, scaled by
    true_cfg_scale.
    """
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH, axes_dims_rope=(8, 12, 12),
    ).eval()  # fmt: skip
    torch.manual_seed(1)
    text = {
        "vocab_size": 160000, "hidden_size": TEXT_WIDTH, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6], "rope_type": "default"},
    }  # fmt: skip
    text["vocab_size"] = 32
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    torch.manual_seed(3)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02)
    return QwenImagePipeline(
        scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=tokenizer(), transformer=transformer
    )


def z_image() -> ZImagePipeline:
    """Make refiners of each stream, then blocks of both; lists of tensors; the timestep is the
    cleanness of latents, 0 … 1.
    """
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=128, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=TEXT_WIDTH,
        axes_dims=[8, 12, 12], axes_lens=[600, 64, 64],
    ).eval()  # fmt: skip
    for name, parameter in transformer.named_parameters():
        if "pad_token" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    torch.manual_seed(1)
    text = Qwen3Config(
        vocab_size=32, hidden_size=TEXT_WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    template = "{% for message in messages %}a {{ message.content }}{% endfor %}"  # never without a token
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=autoencoder(4), text_encoder=Qwen3Model(text).eval(),
        tokenizer=tokenizer(template), transformer=transformer,
    )  # fmt: skip


PIPELINES = {build.__name__: build for build in (flux, qwen_image, z_image)}


def write(folder: Path, name: str, **settings: Any) -> Path:
    """Save one of PIPELINES with sampling settings for a small picture."""
    PIPELINES[name]().save_pretrained(folder)
    scale = 3.5 if name == "flux" else 2.5
    (folder / "sampling.json").write_text(
        f'{{"height": 64, "width": 64, "num_frames": 1, "num_steps": 4, "guidance_scale": {scale}, '
        '"flow_shift": null, "fps": 1}'
    )
    return folder
