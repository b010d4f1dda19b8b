"""The single file that `export --to comfyui` writes: a denoiser's tensors as stored, by ComfyUI's
names.

The loader's facts are in the header's metadata, under `tempoquant`, as JSON: `version` of this
layout; the `timesteps` from and to which the denoiser runs; its `config`, which is the component's
config.json, quantization included.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tempoquant.checkpoint.checks import check_keys, damaged, require
from tempoquant.checkpoint.files import open_weights
from tempoquant.checkpoint.schema import ComponentConfig
from tempoquant.errors import CheckpointError
from tempoquant.timesteps import NUM_TRAIN_TIMESTEPS

KEY = "tempoquant"
VERSION = 1
QUANTIZATION = "quantization_config"


class Header(NamedTuple):
    """An exported file's description of itself.

    Attributes:
        config: the component's config.json without its quantization.
        quantization: that, checked.
        timesteps: the lowest and the highest of the denoiser's range.
    """

    config: Mapping[str, Any]
    quantization: ComponentConfig
    timesteps: tuple[float, float]


def metadata_of(header: Header) -> dict[str, str]:
    """Return the metadata of a file: the inverse of `read_header`, hashes of other files left
    out.
    """
    config = {**header.config, QUANTIZATION: header.quantization.to_dict(with_hashes=False)}
    record = {"version": VERSION, "timesteps": list(header.timesteps), "config": config}
    return {KEY: json.dumps(record, sort_keys=True)}


def is_exported_file(file: Path) -> bool:
    """Return whether a safetensors file is an export for ComfyUI, of any version. Raises
    CheckpointError for a damaged one.
    """
    with open_weights(file) as weights:
        return KEY in (weights.metadata() or {})


def read_header(file: Path) -> Header:
    """Read an exported file's header. Raises CheckpointError for another program's file, and for
    one damaged or newer.
    """
    with open_weights(file) as weights:
        text = (weights.metadata() or {}).get(KEY)
    if text is None:
        raise CheckpointError(
            f"{file} was not written by `tempoquant export --to comfyui`: load it with ComfyUI's own Load Diffusion "
            "Model, or quantize its model and export that."
        )
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(f"{file} holds metadata that is not JSON ({error})") from error
    return _parse(record, str(file))


def _parse(record: Any, where: str) -> Header:
    version = record.get("version") if isinstance(record, dict) else None
    if type(version) is int and version > VERSION:
        raise CheckpointError(
            f"{where} is an export of version {version}, newer than the {VERSION} this TempoQuant reads: upgrade "
            "tempoquant."
        )
    try:
        check_keys(record, {"version", "timesteps", "config"})
        require(type(version) is int and version > 0, "version", "is a whole number above 0", version)
        times, config = record["timesteps"], record["config"]
        is_range = isinstance(times, list) and len(times) == 2 and all(type(t) in (int, float) for t in times)
        require(is_range, "timesteps", "is a pair of numbers", times)
        low, high = times
        require(0 <= low < high <= NUM_TRAIN_TIMESTEPS, "timesteps", f"ascend in 0 … {NUM_TRAIN_TIMESTEPS}", times)
        require(isinstance(config, dict) and QUANTIZATION in config, "config", f"holds a {QUANTIZATION}", config)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    quantization = ComponentConfig.from_dict(config[QUANTIZATION], f"{QUANTIZATION} in {where}")
    return Header({key: value for key, value in config.items() if key != QUANTIZATION}, quantization, (low, high))
