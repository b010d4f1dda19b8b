"""The memory mode disk of generating: pipelines that are loaded without their denoisers'
weights.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tempoquant.device import compute_dtype
from tempoquant.errors import UnsupportedError
from tempoquant.hosts.diffusers.pipeline import from_pretrained
from tempoquant.hosts.diffusers.quantized_weights import QuantizedWeights
from tempoquant.models.source import SourceModel
from tempoquant.models.weights import DenoiserWeights
from tempoquant.placement.disk_denoisers import PartsOnDisk, typed_model
from tempoquant.placement.modes import Memory

_ON_DISK, _DEVICE = "_tempoquant_weights_on_disk", "_tempoquant_device_of_weights"


def require_readable(source: SourceModel, mode: Memory = "disk") -> None:
    """Raise UnsupportedError for "disk" where it cannot read a denoiser, before anything is
    loaded.
    """
    for denoiser in source.denoisers if mode == "disk" else ():
        component = source.components[denoiser.component]
        if component.is_quantized and not component.is_ours:
            raise UnsupportedError(
                f"--memory disk reads TempoQuant's checkpoints and 16-bit models, and {denoiser.name} is quantized "
                f"by {component.quantized_by}: choose lean."
            )


def without_weights(source: SourceModel, device: str) -> Any:
    """Return a pipeline whose denoisers' weights stay in their files.

    Raises:
        UnsupportedError: as `require_readable`.
        ModelError, CheckpointError: it does not load, or a checkpoint is damaged.
    """
    require_readable(source)
    dtype, weights = compute_dtype(device), {}
    for denoiser in source.denoisers:
        is_quantized = source.components[denoiser.component].is_quantized
        kind: Any = QuantizedWeights if is_quantized else DenoiserWeights
        weights[denoiser.name] = kind(source, denoiser.name, dtype, device)
    models = {source.denoiser(name).component: typed_model(each) for name, each in weights.items()}
    dtypes = {"default": dtype, source.family.autoencoder: torch.float32}
    pipeline = from_pretrained(source, dtypes, **models)
    setattr(pipeline, _ON_DISK, weights)
    setattr(pipeline, _DEVICE, torch.device(device))
    return pipeline


def weights_on_disk(pipeline: Any) -> Mapping[str, PartsOnDisk]:
    """Return the weights of a pipeline that `without_weights` loaded, by denoiser."""
    found: Mapping[str, PartsOnDisk] = getattr(pipeline, _ON_DISK)
    return found


def refuse_other_than_loaded(pipeline: Any, mode: Memory, device: torch.device) -> None:
    """Raise UnsupportedError for "disk" where weights are in memory, or are read to another device,
    and for another mode where they are not in memory.
    """
    if mode == "disk" and not hasattr(pipeline, _ON_DISK):
        raise UnsupportedError(
            "the memory mode disk is for pipelines that are loaded in it, without their denoisers' weights: "
            'tempoquant.load_pipeline(folder, "disk").'
        )
    if mode != "disk" and hasattr(pipeline, _ON_DISK):
        raise UnsupportedError(
            "this pipeline was loaded in the memory mode disk, and its denoisers have no weights in memory: load it "
            f"anew for {mode}."
        )
    if mode == "disk" and not _are_same(getattr(pipeline, _DEVICE), device):
        raise UnsupportedError(
            f"this pipeline was loaded in the memory mode disk for {getattr(pipeline, _DEVICE)}, where its denoisers' "
            f"weights are read to: load it anew for {device}."
        )


def _are_same(one: torch.device, other: torch.device) -> bool:
    """Return whether two devices are one: without an index, the current one of its type."""
    if one.type != other.type or one.index == other.index:
        return one == other
    return torch.empty(0, device=one).device == torch.empty(0, device=other).device


@contextlib.contextmanager
def refusing_changes() -> Iterator[None]:
    """Refuse changes that other modes would be lifted for, in the mode "disk"."""
    raise UnsupportedError(
        "in the memory mode disk weights are read from their files before each call: they can have no adapters and not "
        "be compiled. Load the pipeline in swap or lean, or fuse LoRAs before quantizing (quantize --lora)."
    )
    yield
