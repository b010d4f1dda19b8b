"""A random denoiser of published shapes, of as many blocks as wanted, and calibration samples of
any length.

They serve measurements of memory and time: weights and inputs are random, with a few outlier
channels.
"""

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights

from benchmarks.scale_shapes import NUM_OUTLIERS, WAN_A14B, Shapes
from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.calibrate.store import SampleStore
from tempoquant.calibrate.store_writer import StoreWriter
from tempoquant.models.component_files import Component
from tempoquant.models.family import PipelineIndex
from tempoquant.models.source import SourceModel

SHARD_BYTES = 4_920_000_000  # of the published model's files
_WEIGHT_STD = 0.02
_STEM = "diffusion_pytorch_model"


def write_denoiser(folder: Path, num_blocks: int, shapes_of: Shapes = WAN_A14B) -> Path:
    """Write a folder whose denoiser has `num_blocks` random blocks of each list, in float32 shards
    with an index.

    One tensor is in memory at a time.
    """
    component = folder / shapes_of.denoiser.component
    component.mkdir(parents=True)
    config = {**shapes_of.config, **dict.fromkeys(shapes_of.depths, num_blocks)}
    (component / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with init_empty_weights():
        model = getattr(diffusers, shapes_of.class_name).from_config(config)
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


def source_of(folder: Path, shapes_of: Shapes = WAN_A14B) -> SourceModel:
    """Return a pipeline that has only the denoiser of `write_denoiser`; nothing else takes part."""
    name = shapes_of.denoiser.component
    component = Component(folder / name, "diffusers", shapes_of.class_name, shapes_of.family)
    index = PipelineIndex(folder, {"_class_name": shapes_of.pipeline}, {name: ("diffusers", shapes_of.class_name)})
    return SourceModel(folder, shapes_of.family, index, {name: component}, (shapes_of.denoiser,))


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
    """Write a safetensors file: the header's length, the header, then each tensor's bytes."""
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
    """Draw from N(0, 0.02), a few input channels of a matrix ten times that; norms are near 1 and
    biases small.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    tensor = torch.empty(shape).normal_(0, _WEIGHT_STD, generator=generator)
    if "norm" in name and name.endswith(".weight"):
        tensor += 1
    elif len(shape) == 2:
        tensor[:, torch.randint(shape[1], (NUM_OUTLIERS,), generator=generator)] *= 10
    return tensor


def _num_bytes(shape: tuple[int, ...]) -> int:
    return 4 * math.prod(shape)


def timesteps(num_samples: int, shapes_of: Shapes = WAN_A14B) -> list[float]:
    """Return a denoiser's timesteps, falling, one a sample."""
    lowest, highest = shapes_of.denoiser.timesteps
    step = (highest - 1 - lowest) / max(1, num_samples - 1)
    return [highest - 1 - step * number for number in range(num_samples)]


def write_samples(folder: Path, num_samples: int, num_tokens: int, shapes_of: Shapes = WAN_A14B) -> SampleStore:
    """Write a store of random calls of a denoiser, spread evenly over its timesteps, one a
    prompt.
    """
    writer = StoreWriter(folder, shapes_of.family.text_inputs)
    falling, name = timesteps(num_samples, shapes_of), shapes_of.denoiser.name
    for index, timestep in enumerate(falling):
        inputs = shapes_of.inputs(index, timestep, num_tokens)
        writer.add(index, CalibrationSample(str(index), name, timestep, index, "conditional", inputs))
        writer.commit(index)
    prompts = [{"id": str(index), "prompt": "random numbers", "image_sha256": "0" * 64} for index in range(num_samples)]
    provenance = {
        "model": {"hub_id": None, "revision": None, "fingerprint": "random"},
        "scheduler": {"class": "none", "flow_shift": None},
        "settings": {"num_steps": num_samples},
        "seed": 0,
        "compute_dtype": "float32",
        "from_latents": False,
        "prompts": prompts,
        "videos": {},
        "loras": {},
    }
    others = {"low_noise": []} if name == "high_noise" else {}
    return writer.finish(provenance, {name: falling, **others}, range(num_samples))
