"""Tiny random Wan denoisers with random layers: enough to fill every tensor that a checkpoint can
hold.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from tempoquant.checkpoint import Calibration, ComponentWriter
from tempoquant.formats import FORMATS
from tempoquant.layer import QuantizedLayer
from tempoquant.models.wan.family import COMPONENTS
from tempoquant.recipe import Recipe
from tempoquant.timesteps import TimestepBins
from tests.random_layers import BINS, random_layer

RECIPE = Recipe(name="test", rank=4, smoothing_alpha=0.5)
PROMPT = {"id": "a", "prompt": "a cat walks", "image_sha256": "0" * 64}
CALIBRATION = Calibration((PROMPT,), {"num_steps": 4, "seed": 0})
BLOCK_LINEARS = (
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
    "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2",
)  # fmt: skip


def tiny_wan(
    seed: int = 0, num_layers: int = 2, width: int = 128, dtype: torch.dtype = torch.bfloat16
) -> WanTransformer3DModel:
    """Make a random denoiser of `num_layers` blocks and two heads, in the dtypes in which diffusers
    loads one.
    """
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=width // 2, in_channels=36, out_channels=16,
        text_dim=64, freq_dim=64, ffn_dim=2 * width, num_layers=num_layers, rope_max_seq_len=64,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        keep = any(part in name.split(".") for part in WanTransformer3DModel._keep_in_fp32_modules)
        parameter.data = parameter.data.to(torch.float32 if keep else dtype)
    return model.eval().requires_grad_(False)


def inputs(batch: int = 1, timestep: Any = 900.0, seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Make arguments of one call, latents of 2 frames of 8 × 8 and 5 text tokens; `timestep` is a
    number or one per row.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 36, 2, 8, 8, generator=generator).to(dtype),
        "timestep": torch.as_tensor(timestep, dtype=torch.float32).expand(batch).clone(),
        "encoder_hidden_states": torch.randn(batch, 5, 64, generator=generator).to(dtype),
        "return_dict": False,
    }


def quantize_all(model: nn.Module, format: str = "mxfp4", **kwargs: Any) -> dict[str, QuantizedLayer]:
    """Quantize every linear of every block; `format` may be "mixed", for all of them in turn."""
    names = [f"blocks.{i}.{linear}" for i in range(len(model.blocks)) for linear in BLOCK_LINEARS]
    formats = sorted(FORMATS) if format == "mixed" else [format]
    return {
        name: random_layer(model.get_submodule(name), formats[i % len(formats)], seed=i, **kwargs)
        for i, name in enumerate(names)
    }


def write_component(
    folder: Path,
    model: nn.Module,
    layers: dict[str, QuantizedLayer],
    bins: TimestepBins = BINS,
    denoiser: str = "high_noise",
    **kwargs: Any,
) -> Path:
    """Write a quantized component as `tempoquant.quantize` does: the layers, then the 16-bit
    rest.
    """
    with ComponentWriter(folder, denoiser=denoiser, bins=bins, recipe=RECIPE, **kwargs) as writer:
        for name, layer in layers.items():
            writer.add_layer(name, layer)
        for name, tensor in model.state_dict().items():
            if name.rpartition(".")[0] not in layers:
                writer.add_tensor(name, tensor)
        writer.finish(model_config(model), calibration=CALIBRATION, notes=("blocks.0.ffn.net.2: Hessian in float64",))
    return folder


def load(folder: Path, dtype: torch.dtype | None = torch.bfloat16, **kwargs: Any) -> Any:
    """Load the denoiser of a component folder, by plain diffusers."""
    return WanTransformer3DModel.from_pretrained(folder, dtype=dtype, **kwargs)


@torch.no_grad()
def run(model: Any, dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> torch.Tensor:
    """Return the output of one call; see `inputs`."""
    return model(**inputs(dtype=dtype, **kwargs))[0]


def model_config(model: Any) -> dict[str, Any]:
    """Return config.json of a model as save_pretrained writes it, without its origin."""
    config = json.loads(model.to_json_string())
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "quantization_config")}


def text_models() -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel]:
    """Make a tokenizer of a few words, and a random text encoder."""
    vocabulary = {token: i for i, token in enumerate(("<pad>", "</s>", "<unk>", "a", "cat", "walks"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    torch.manual_seed(0)
    text = UMT5Config(
        vocab_size=len(vocabulary), d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return fast, UMT5EncoderModel(text).eval()


def tiny_pipeline() -> WanImageToVideoPipeline:
    """Make a random two-expert image-to-video pipeline of one block each; its frames are 16 × 16 at
    least.
    """
    tokenizer, text_encoder = text_models()
    return WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=AutoencoderKLWan(
            base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ).eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        transformer=tiny_wan(0, num_layers=1),
        transformer_2=tiny_wan(1, num_layers=1),
        boundary_ratio=0.9,
        image_encoder=None,
        image_processor=None,
    )


def write_pipeline(folder: Path, format: str = "mixed", **kwargs: Any) -> Path:
    """Write a complete pipeline folder with all denoisers quantized."""
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder)
    for denoiser, name in zip(COMPONENTS, ("transformer", "transformer_2"), strict=True):
        model = getattr(pipe, name)
        shutil.rmtree(folder / name)
        write_component(folder / name, model, quantize_all(model, format, **kwargs), denoiser=denoiser)
    return folder


@torch.no_grad()
def generate(pipe: WanImageToVideoPipeline, seed: int = 0) -> torch.Tensor:
    """Generate latents of two steps, one for each denoiser, with guidance."""
    image = Image.new("RGB", (16, 16), (200, 100, 50))
    return pipe(
        image, "a cat walks", negative_prompt="", height=16, width=16, num_frames=5, num_inference_steps=2,
        guidance_scale=2.0, generator=torch.Generator().manual_seed(seed), output_type="latent", max_sequence_length=8,
    ).frames  # fmt: skip
