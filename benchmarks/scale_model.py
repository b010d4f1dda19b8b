"""A random denoiser of Wan2.2-I2V-A14B's shapes, of as many blocks as wanted, and calibration samples of any length.

What is measured with them is memory and time: weights and inputs are random, with a few outlier channels.
"""

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel

from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.calibrate.store import SampleStore
from tempoquant.calibrate.store_writer import StoreWriter
from tempoquant.models.component_files import Component
from tempoquant.models.family import PipelineIndex
from tempoquant.models.source import SourceModel
from tempoquant.models.wan.family import COMPONENTS, WAN
from tempoquant.models.wan.pipelines import IMAGE_TO_VIDEO
from tempoquant.timesteps import NUM_TRAIN_TIMESTEPS, Denoiser

CONFIG: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel", "added_kv_proj_dim": None, "attention_head_dim": 128,
    "cross_attn_norm": True, "eps": 1e-6, "ffn_dim": 13824, "freq_dim": 256, "image_dim": None, "in_channels": 36,
    "num_attention_heads": 40, "num_layers": 40, "out_channels": 16, "patch_size": [1, 2, 2],
    "pos_embed_seq_len": None, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024, "text_dim": 4096,
}  # fmt: skip
NUM_TEXT_TOKENS = 512
BOUNDARY_RATIO = 0.9
SHARD_BYTES = 4_920_000_000  # of the published model's files
_WEIGHT_STD = 0.02
_NUM_OUTLIERS = 4
_STEM = "diffusion_pytorch_model"


def write_denoiser(folder: Path, num_blocks: int, config: dict[str, Any] | None = None) -> Path:
    """Write a folder whose high-noise denoiser has `num_blocks` random blocks, in float32 shards with an index.

    One tensor is in memory at a time.

    Args:
        config: of the transformer, A14B's if left out.
    """
    component = folder / COMPONENTS["high_noise"]
    component.mkdir(parents=True)
    config = {**(config or CONFIG), "num_layers": num_blocks}
    (component / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with init_empty_weights():
        model = WanTransformer3DModel.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shards = list(_shards(shapes))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"{_STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(component / file, {name: shapes[name] for name in names})
        weight_map.update(dict.fromkeys(names, file))
    total = sum(_num_bytes(shape) for shape in shapes.values())
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (component / f"{_STEM}.safetensors.index.json").write_text(index, encoding="utf-8")
    return folder


def source_of(folder: Path) -> SourceModel:
    """Return a pipeline of which only the denoiser that `write_denoiser` wrote is there: no more takes part."""
    component = Component(folder / COMPONENTS["high_noise"], "diffusers", "WanTransformer3DModel")
    name = component.folder.name
    denoiser = Denoiser("high_noise", name, (BOUNDARY_RATIO * NUM_TRAIN_TIMESTEPS, float(NUM_TRAIN_TIMESTEPS)))
    index = PipelineIndex(folder, {"_class_name": IMAGE_TO_VIDEO}, {name: (component.library, component.class_name)})
    return SourceModel(folder, WAN, index, {name: component}, (denoiser,))


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + _num_bytes(shape) > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += _num_bytes(shape)
    yield names


def _write_shard(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file: the header's length, the header, then each tensor's bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + _num_bytes(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            stream.write(_random_weight(name, shape).numpy().data)


def _random_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """N(0, 0.02), a few input channels of a matrix ten times that; norms are near 1 and biases small."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    tensor = torch.empty(shape).normal_(0, _WEIGHT_STD, generator=generator)
    if "norm" in name and name.endswith(".weight"):
        tensor += 1
    elif len(shape) == 2:
        tensor[:, torch.randint(shape[1], (_NUM_OUTLIERS,), generator=generator)] *= 10
    return tensor


def _num_bytes(shape: tuple[int, ...]) -> int:
    return 4 * math.prod(shape)


def latent_shape(num_tokens: int) -> tuple[int, int, int]:
    """Frames, height and width of latents that make so many tokens: for 32,760 those of 81 frames of 480 × 832.

    Raises ValueError when no latents of several rows of tokens do.
    """
    for frames in (21, 16, 8, 4, 2, 1):
        if num_tokens % frames:
            continue
        area = num_tokens // frames
        near = [30] if area % 30 == 0 and area >= 900 else range(1, math.isqrt(area) + 1)
        rows = max(divisor for divisor in near if area % divisor == 0)
        if rows > 1:
            return frames, 2 * rows, 2 * (area // rows)
    raise ValueError(f"no latents make {num_tokens} tokens: take a multiple of 16.")


def timesteps(num_samples: int) -> list[float]:
    """Of the high-noise denoiser, falling, one a sample."""
    lowest = BOUNDARY_RATIO * NUM_TRAIN_TIMESTEPS
    step = (NUM_TRAIN_TIMESTEPS - 1 - lowest) / max(1, num_samples - 1)
    return [NUM_TRAIN_TIMESTEPS - 1 - step * number for number in range(num_samples)]


def write_samples(folder: Path, num_samples: int, num_tokens: int) -> SampleStore:
    """Write a store of random calls of the high-noise denoiser, spread evenly over its timesteps, one a prompt."""
    writer = StoreWriter(folder, {"encoder_hidden_states"})
    falling = timesteps(num_samples)
    for index, timestep in enumerate(falling):
        inputs = random_inputs(index, timestep, num_tokens)
        writer.add(index, CalibrationSample(str(index), "high_noise", timestep, index, "conditional", inputs))
        writer.commit(index)
    prompts = [{"id": str(index), "prompt": "random numbers", "image_sha256": "0" * 64} for index in range(num_samples)]
    provenance = {
        "model": {"hub_id": None, "revision": None, "fingerprint": "random"},
        "scheduler": {"class": "none", "flow_shift": None}, "settings": {"num_steps": num_samples}, "seed": 0,
        "compute_dtype": "float32", "from_latents": False, "prompts": prompts, "videos": {}, "loras": {},
    }  # fmt: skip
    schedule = {"high_noise": falling, "low_noise": []}
    return writer.finish(provenance, schedule, range(num_samples))


def random_inputs(seed: int, timestep: float, num_tokens: int) -> dict[str, torch.Tensor]:
    """Of one call: noise for the latents, their mask and their condition; a text with a few outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    text = 0.1 * torch.randn(1, NUM_TEXT_TOKENS, CONFIG["text_dim"], generator=generator)
    text[..., :_NUM_OUTLIERS] *= 30
    latents = torch.randn(1, CONFIG["in_channels"], *latent_shape(num_tokens), generator=generator)
    return {"hidden_states": latents, "timestep": torch.tensor([timestep]), "encoder_hidden_states": text}
