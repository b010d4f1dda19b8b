"""A folder that looks like Wan2.2-I2V-A14B to programs that read only headers and configs: real
names, shapes and dtypes, and files of the real size without content. It takes kilobytes of disk on
a file system with sparse files.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from tokenizers import Tokenizer, models

from benchmarks.scale_model import SHARD_BYTES
from tempoquant.models.pipeline_configs import read_configs
from tempoquant.models.wan.published import A14B

_FLOW_SHIFT = 3.0  # stored in the published scheduler
_INDEX = {
    "_class_name": "WanImageToVideoPipeline",
    "boundary_ratio": 0.9,
    "expand_timesteps": False,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def write_hollow_pipeline(folder: Path) -> Path:
    """Write the folder: denoisers and autoencoder in float32, the text encoder in bfloat16, as they
    are published.
    """
    configs = read_configs(A14B)
    (folder / "tokenizer").mkdir(parents=True)
    _write_json(folder / "model_index.json", _INDEX)
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=_FLOW_SHIFT
    ).save_pretrained(folder / "scheduler")
    Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(folder / "tokenizer" / "tokenizer.json"))
    for name, component in configs.models.items():
        model, dtype = component.build(), torch.float32
        if name == configs.family.text_encoder:
            model.encoder.embed_tokens = None  # the same tensor as `shared`, stored once
            dtype = torch.bfloat16
        _write_component(folder / name, component.config, model, dtype)
    return folder


def _write_component(folder: Path, config: Mapping[str, Any], model: torch.nn.Module, dtype: torch.dtype) -> None:
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shards = list(_shards(shapes, dtype))
    stem = "model" if folder.name == "text_encoder" else "diffusion_pytorch_model"
    files = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(files) == 1:
        files = [f"{stem}.safetensors"]
    else:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        _write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    for file, names in zip(files, shards, strict=True):
        _write_hole(folder / file, {name: shapes[name] for name in names}, dtype)


def _shards(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * dtype.itemsize
        if names and size + num_bytes > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += num_bytes
    yield names


def _write_hole(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")
