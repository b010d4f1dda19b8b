"""MiniMax-H3's modular pipeline: its components, and the packed sequence of a video, its sound and
a text.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tempoquant.errors import ModelError, SettingsError
from tempoquant.images import first_frame
from tempoquant.models.family import Config, PipelineIndex
from tempoquant.models.geometry import LatentGeometry
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.prompts import Prompt
from tempoquant.timesteps import Denoiser

PIPELINE = "MiniMaxH3ModularPipeline"
DENOISER, DENOISER_CLASS = "transformer", "MiniMaxH3Transformer3DModel"
TEXT_TOKENS = 512  # a guess for plans: texts are not padded, and have as many rows as tokens
FPS = 24
_AUDIO_A_SECOND, _AUDIO_CHANNELS = 40, 2
_CHUNK_FRAMES, _CHUNK_LATENTS, _LAST_LATENTS = 17, 5, 2  # 17 k + 5 frames are 5 k + 2 latent frames
_FEWEST_SECONDS, _MOST_SECONDS = 5, 15
_PIXELS = 16


def denoisers(index: PipelineIndex) -> tuple[Denoiser, ...]:
    """Return the denoiser of a pipeline's text-to-video task. Raises ModelError if there is none of
    the class.
    """
    if index.components.get(DENOISER) != ("diffusers", DENOISER_CLASS):
        raise ModelError(f"{index.folder} has no {DENOISER_CLASS} as {DENOISER}: fetch the model again.")
    return (Denoiser(DENOISER, DENOISER),)


@dataclass(frozen=True)
class PackedGeometry(LatentGeometry):
    """The geometry of a video whose frames come in chunks, with rows of sound beside its own."""

    def require(self, settings: SamplingSettings) -> None:
        """Raise SettingsError for a size, a length or another setting that the pipeline does not
        accept.
        """
        for name in ("height", "width"):
            if getattr(settings, name) % self.size_step:
                raise SettingsError(f"{name} is a multiple of {self.size_step}, not {getattr(settings, name)}.")
        frames = settings.num_frames
        fewest, most = _FEWEST_SECONDS * FPS, _MOST_SECONDS * FPS
        if frames % _CHUNK_FRAMES != _CHUNK_LATENTS or not fewest <= frames <= most:
            raise SettingsError(
                f"num_frames is {_CHUNK_FRAMES}k + {_CHUNK_LATENTS}, of {_FEWEST_SECONDS} to {_MOST_SECONDS} seconds "
                f"(124, 141, …, 345), not {frames}."
            )
        if settings.guidance_scale != 1:
            raise SettingsError(f"guidance_scale is 1, the guidance is in the weights, not {settings.guidance_scale}.")
        if settings.fps != FPS:
            raise SettingsError(f"fps is {FPS}, to which the sound is generated, not {settings.fps}.")
        if settings.num_steps < 2 or settings.sigmas is not None:
            raise SettingsError("num_steps is at least 2, and sigmas is null: the scheduler makes its own.")

    def latents(self, height: int, width: int, num_frames: int) -> tuple[int, int, int]:
        """Return the shape of a video's latents: frames, rows, columns."""
        chunks = (num_frames - _CHUNK_LATENTS) // _CHUNK_FRAMES
        return chunks * _CHUNK_LATENTS + _LAST_LATENTS, height // self.pixels, width // self.pixels

    def num_tokens(self, height: int, width: int, num_frames: int) -> int:
        """Return the number of rows of a video and its sound in the denoiser's blocks."""
        return super().num_tokens(height, width, num_frames) + num_audio_rows(num_frames)


def num_audio_rows(num_frames: int) -> int:
    """Return the number of rows of a video's sound, of both channels."""
    return _AUDIO_CHANNELS * round(num_frames / FPS * _AUDIO_A_SECOND)


def geometry(denoiser: Config, _autoencoder: Config) -> PackedGeometry:
    """Return the geometry of a video."""
    frames, rows, columns = denoiser["patch_size"]
    return PackedGeometry(_PIXELS, _CHUNK_FRAMES, (int(frames), int(rows), int(columns)))


def example_inputs(_index: PipelineIndex, denoiser: Config, latents: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Return the inputs of one call, on the meta device, for latents of a shape (frames, rows,
    columns).
    """
    frames, rows, columns = latents
    patch = denoiser["patch_size"]
    in_patch = patch[0] * patch[1] * patch[2]
    num_video = frames * rows * columns // in_patch
    chunks = max(frames - _LAST_LATENTS, 0) // _CHUNK_LATENTS
    num_audio = num_audio_rows(chunks * _CHUNK_FRAMES + _CHUNK_LATENTS) if frames else 0
    num_rows = num_video + num_audio + TEXT_TOKENS

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def indices(count: int) -> torch.Tensor:
        return empty(count, dtype=torch.int64)

    return {
        "hidden_states": empty(1, num_video, denoiser["in_channels"] * in_patch),
        "audio_hidden_states": empty(1, num_audio, denoiser["audio_in_channels"]),
        "encoder_hidden_states": empty(1, TEXT_TOKENS, denoiser["text_dim"], dtype=torch.bfloat16),
        "timestep": empty(2),  # of video and of sound
        "timestep_indices": indices(num_rows),
        "token_tags": indices(num_rows),
        "position_ids": empty(num_rows, 3, dtype=torch.float64),
        "video_indices": indices(num_video),
        "audio_indices": indices(num_audio),
        "text_indices": indices(TEXT_TOKENS),
    }


def arguments(_index: PipelineIndex, prompt: Prompt, settings: SamplingSettings) -> dict[str, Any]:
    """Return the pipeline's arguments beside a text: the first frame, if a prompt has an image."""
    if prompt.image is None:
        return {}
    return {"image": first_frame(prompt.image, settings.width, settings.height)}


_OUTPUTS = ("prompt_embeds", "text_token_tags")


def encoded_text(pipeline: Any, text: str, _num_tokens: int, _device: torch.device) -> dict[str, torch.Tensor]:
    """Return the pipeline's encoding of a text; nothing for an empty one, since there is no
    negative prompt.
    """
    from diffusers.modular_pipelines import PipelineState

    if not text:
        return {}
    state = PipelineState()
    state.set("prompt", text)
    _, state = pipeline._blocks.sub_blocks["text_encoder"](pipeline, state)
    return {name: state.get(name) for name in _OUTPUTS}


def shortened_encoder(_config: Config, _num_blocks: int) -> dict[str, Any]:
    """Return no change: the pipeline reads the output of every block of the text encoder, so each
    takes memory.
    """
    return {}


def call_encoder(encoder: nn.Module, embedded: torch.Tensor, mask: torch.Tensor) -> Any:
    """Call the language model of the text encoder as the pipeline does."""
    language_model: Any = encoder.get_submodule("model.language_model")
    return language_model(inputs_embeds=embedded, attention_mask=mask, use_cache=False, output_hidden_states=True)


def published(_index: PipelineIndex) -> tuple[str, SamplingSettings]:
    """Return the name of the published model, and its sampling.

    Source: diffusers' modular pipeline (canvas of 768 × 1344 pixels, 124 frames, 50 steps) and the
    shift of the scheduler that its conversion script writes.
    """
    return "MiniMax-H3", SamplingSettings(768, 1344, 124, 50, 1.0, 12.0, FPS)


def title(_index: PipelineIndex) -> str:
    """Return a pipeline's title for a model card."""
    return "MiniMax-H3 text-to-video pipeline"


def shortened(denoiser: Config, num_blocks: int) -> dict[str, Any]:
    """Return a config with at most so many blocks."""
    return {**denoiser, "num_layers": min(num_blocks, int(denoiser["num_layers"]))}


def scheduled(timesteps: torch.Tensor) -> torch.Tensor:
    """Return the scheduler's timesteps, 0 noise … 1 clean, as 0 clean … 1000 noise."""
    return timesteps * -1000.0 + 1000.0


_DENOISER = {
    "attention_head_dim": 128,
    "audio_in_channels": 32,
    "ffn_dim": 14336,
    "final_norm_eps": 1e-5,
    "freq_dim": 256,
    "hidden_size": 5376,
    "in_channels": 24,
    "norm_eps": 1e-5,
    "num_attention_heads": 56,
    "num_layers": 50,
    "num_refiner_layers": 2,
    "patch_size": [1, 2, 2],
    "qk_norm_eps": 1e-5,
    "rope_freq_dim": 16,
    "rope_theta": 10000.0,
    "text_dim": 5120,
    "time_embed_dim": 2688,
    "time_embed_hidden_dim": 5376,
}
_QWEN = {  # Qwen3-VL-32B-Instruct
    "text_config": {
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_attention_heads": 64,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0, "mrope_section": [24, 20, 20]},
    },
    "vision_config": {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 5120,
        "deepstack_visual_indexes": [8, 16, 24],
    },
}


def published_models() -> dict[str, dict[str, Any]]:
    """Return the published model by its name: its index, the configs of its models, bytes on disk.

    Sources: diffusers' scripts/convert_minimax_h3_to_diffusers.py and its classes' defaults;
    Qwen3-VL-32B-Instruct.
    """
    models: dict[str, tuple[str, str, dict[str, Any]]] = {
        DENOISER: ("diffusers", DENOISER_CLASS, _DENOISER),
        "text_encoder": ("transformers", "Qwen3VLForConditionalGeneration", _QWEN),
        "vae": ("diffusers", "AutoencoderKLMiniMaxH3", {}),
        "audio_vae": ("diffusers", "AutoencoderKLMiniMaxH3Audio", {}),
    }
    return {
        "minimax-h3": {
            "index": {"_class_name": PIPELINE, "_blocks_class_name": "MiniMaxH3Blocks"},
            "models": models,
            "disk_bytes": {},
        }
    }
