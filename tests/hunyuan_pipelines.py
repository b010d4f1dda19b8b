"""Tiny random HunyuanVideo-1.5 pipelines: the real classes and configs, scaled down. Two things are
not the real ones: the tokenizer of Qwen, in whose place one of a character a token answers the same
calls, and, within `short_texts`, how many tokens a text and an image have, which the pipelines'
constructors fix at 1,985.
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

WIDTH, TEXT_DIM, BYT5_DIM, IMAGE_DIM, LATENTS = 128, 64, 32, 32, 8
SIZE = 32  # pixels a side; image-to-video chooses it for a square image and this `target_size`
_TOKENS = {
    "tokenizer_max_length": 16, "prompt_template_encode_start_idx": 4, "tokenizer_2_max_length": 8,
    "vision_num_semantic_tokens": 9,
}  # fmt: skip
_TEMPLATE = "{{ 'user' + messages[-1]['content'] }}"


@contextlib.contextmanager
def short_texts() -> Iterator[None]:
    """Limit texts and images to the tokens of _TOKENS in the pipelines' constructors, within this
    context.
    """
    kinds = (HunyuanVideo15Pipeline, HunyuanVideo15ImageToVideoPipeline)
    own = [kind.__init__ for kind in kinds]

    def shortening(init: Any) -> Any:
        @functools.wraps(init)
        def shortened(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            vars(self).update(_TOKENS)

        return shortened

    for kind, init in zip(kinds, own, strict=True):
        kind.__init__ = shortening(init)
    try:
        yield
    finally:
        for kind, init in zip(kinds, own, strict=True):
            kind.__init__ = init


def transformer(task_type: str) -> HunyuanVideo15Transformer3DModel:
    """Make a random denoiser of two heads and blocks, with a refiner of one block."""
    torch.manual_seed(0)
    return HunyuanVideo15Transformer3DModel(
        in_channels=2 * LATENTS + 1, out_channels=LATENTS, num_attention_heads=2, attention_head_dim=WIDTH // 2,
        num_layers=2, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=TEXT_DIM, text_embed_2_dim=BYT5_DIM,
        image_embed_dim=IMAGE_DIM, rope_axes_dim=(16, 24, 24), target_size=SIZE, task_type=task_type,
    ).eval()  # fmt: skip


def character_tokenizer() -> PreTrainedTokenizerFast:
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate(("<pad>", "<unk>", *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = _TEMPLATE
    return fast


def _components(task_type: str) -> dict[str, Any]:
    torch.manual_seed(1)
    text = Qwen2_5_VLTextConfig(
        vocab_size=97, hidden_size=TEXT_DIM, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 1e6,
                                                "mrope_section": [4, 6, 6]},
    )  # fmt: skip
    glyphs = T5Config(
        vocab_size=384, d_model=BYT5_DIM, d_kv=16, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return {
        "tokenizer": character_tokenizer(),
        "text_encoder": Qwen2_5_VLTextModel(text).eval(),
        "tokenizer_2": ByT5Tokenizer(),
        "text_encoder_2": T5EncoderModel(glyphs).eval(),
        "transformer": transformer(task_type),
        "vae": AutoencoderKLHunyuanVideo15(
            latent_channels=LATENTS, block_out_channels=(8, 16, 32, 32, 32), layers_per_block=1
        ).eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
    }


def text_to_video() -> HunyuanVideo15Pipeline:
    """Make a pipeline with two text encoders and no image."""
    return HunyuanVideo15Pipeline(**_components("t2v"))


def image_to_video() -> HunyuanVideo15ImageToVideoPipeline:
    """Make the same model with an image encoder of nine patches."""
    parts = _components("i2v")
    torch.manual_seed(2)
    config = SiglipVisionConfig(hidden_size=IMAGE_DIM, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                image_size=6, patch_size=2)  # fmt: skip
    processor = SiglipImageProcessor(size={"height": 6, "width": 6})
    return HunyuanVideo15ImageToVideoPipeline(
        **parts, image_encoder=SiglipVisionModel(config).eval(), feature_extractor=processor
    )


PIPELINES = {build.__name__: build for build in (text_to_video, image_to_video)}


def write(folder: Path, name: str) -> Path:
    """Save one of PIPELINES with sampling settings for a few small frames."""
    PIPELINES[name]().save_pretrained(folder)
    (folder / "sampling.json").write_text(
        f'{{"height": {SIZE}, "width": {SIZE}, "num_frames": 5, "num_steps": 4, "guidance_scale": 2.5, '
        '"flow_shift": 3.0, "fps": 8}'
    )
    return folder
