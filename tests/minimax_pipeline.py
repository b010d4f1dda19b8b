"""A tiny random MiniMax-H3: the real modular pipeline and classes, scaled down. In the place of
Qwen's tokenizer stands one of a character a token, and in the place of its processor, which needs
torchvision, CLIP's with the image processor that needs none. Asked which tokens are an image's, it
says none: their places are counted as a text's.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLMiniMaxH3,
    AutoencoderKLMiniMaxH3Audio,
    MiniMaxH3ModularPipeline,
    MiniMaxH3Scheduler,
    MiniMaxH3Transformer3DModel,
)
from transformers import CLIPProcessor, Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests.hunyuan_pipelines import character_tokenizer

WIDTH, TEXT_DIM = 128, 32
_VISION_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
SIZE, NUM_FRAMES = 32, 124  # the shortest that the pipeline makes


def transformer(seed: int = 0) -> MiniMaxH3Transformer3DModel:
    """Make a random denoiser of two heads and blocks, with a refiner of one block."""
    torch.manual_seed(seed)
    return MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=WIDTH // 2, hidden_size=WIDTH, num_layers=2, num_refiner_layers=1,
        ffn_dim=WIDTH, text_dim=TEXT_DIM, freq_dim=16, time_embed_hidden_dim=64, time_embed_dim=WIDTH, rope_freq_dim=8,
    ).eval()  # fmt: skip


def _text_encoder() -> Qwen3VLForConditionalGeneration:
    text = {
        "vocab_size": 97 + len(_VISION_TOKENS),
        "hidden_size": TEXT_DIM, "intermediate_size": 32, "num_hidden_layers": 51, "head_dim": 16,
        "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_DIM,
        "patch_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    torch.manual_seed(1)
    start, image, end = range(97, 97 + len(_VISION_TOKENS))
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, vision_start_token_id=start, image_token_id=image,
        vision_end_token_id=end,
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(config).eval()


def pipeline() -> MiniMaxH3ModularPipeline:
    """Make both autoencoders, both schedulers, and the denoisers of both kinds of tasks."""
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(list(_VISION_TOKENS), special_tokens=True)
    torch.manual_seed(2)
    made = MiniMaxH3ModularPipeline()
    made.update_components(
        text_encoder=_text_encoder(),
        tokenizer=tokenizer,
        processor=CLIPProcessor(
            image_processor=Qwen2VLImageProcessorPil(
                patch_size=2, size={"shortest_edge": SIZE**2 // 4, "longest_edge": SIZE**2 // 4}
            ),
            tokenizer=tokenizer,
        ),
        transformer=transformer(),
        transformer_ref=transformer(1),
        vae=AutoencoderKLMiniMaxH3(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, spatial_downsample_factors=(2, 2, 2, 2),
            temporal_downsample_factors=(1, 2, 2, 1), norm_num_groups=4, decoder_num_layers=1,
            decoder_num_attention_heads=2, decoder_attention_head_dim=32,
        ).eval(),
        audio_vae=AutoencoderKLMiniMaxH3Audio(
            encoder_dim=4, latent_dim=64, decoder_dim=128, num_attention_heads=2, resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1,),), latents_mean=[0.0] * 32, latents_std=[1.0] * 32,
        ).eval(),
        scheduler=MiniMaxH3Scheduler(shift=12.0),
        audio_scheduler=MiniMaxH3Scheduler(shift=3.0),
    )  # fmt: skip
    return made


def write(folder: Path) -> Path:
    """Save it with sampling settings for as few frames as it makes."""
    pipeline().save_pretrained(str(folder), overwrite_modular_index=True)
    (folder / "sampling.json").write_text(
        f'{{"height": {SIZE}, "width": {SIZE}, "num_frames": {NUM_FRAMES}, "num_steps": 5, "guidance_scale": 1.0, '
        '"flow_shift": 12.0, "fps": 24}'
    )
    return folder
