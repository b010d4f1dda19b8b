"""Loads pipelines with diffusers: whole ones, 16-bit, quantized or exported."""

from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from torch import nn

from tempoquant.device import compute_dtype, default_device
from tempoquant.errors import ModelError
from tempoquant.hosts.nunchaku.config import is_exported
from tempoquant.hosts.nunchaku.reader import ExportedComponent
from tempoquant.models.component_files import Component
from tempoquant.models.source import SourceModel
from tempoquant.models.weights import DenoiserWeights
from tempoquant.models.with_experts import ModelName

_LOADING_ERRORS = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError,
    ImportError,  # of a package that another quantizer needs
)  # fmt: skip


def open_pipeline(model: ModelName) -> SourceModel:
    """Open a model as `SourceModel.open` does, and check exported components too.

    Raises ModelError, also for a denoiser that somebody else quantized, and CheckpointError.
    """
    source = SourceModel.open(model)
    for name in source.denoiser_components:
        component = source.components[name]
        if is_exported(component.config):
            ExportedComponent(component.folder)
        elif not component.is_ours:
            component.require_16_bit()
    return source


def load_pipeline(source: SourceModel, device: str | None = None, dtype: torch.dtype | None = None) -> Any:
    """Load a pipeline, 16-bit, quantized, or exported; the autoencoder in float32, as published.

    A source's LoRAs are in the weights.

    An export computes what its target's kernels compute, in plain PyTorch (`hosts/nunchaku/linear.py`), on every
    device.

    Raises:
        ModelError: the pipeline lacks a weight, or does not load.
        CheckpointError: a quantized component is damaged.
    """
    device = device or default_device()
    dtype = dtype or compute_dtype(device)
    exported = {
        name: ExportedComponent(source.components[name].folder).load(dtype)
        for name in source.denoiser_components
        if is_exported(source.components[name].config)
    }
    read_here = {
        each.component: DenoiserWeights(source, each.name, dtype, "cpu").whole_model()
        for each in source.denoisers
        if source.components[each.component].is_read_here or each.name in source.loras
    }
    dtypes = {"default": dtype, source.family.autoencoder: torch.float32}
    return from_pretrained(source, dtypes, **exported, **read_here).to(device)


def from_pretrained(source: SourceModel, dtype: Any, **components: nn.Module | None) -> Any:
    """Load a pipeline to the CPU in which some components are given, or left out as None; the others are loaded.

    Args:
        dtype: as diffusers takes it.

    Raises:
        ModelError: one does not load, or lacks a weight.
    """
    kind = pipeline_class(source)
    for name, component in source.components.items():
        if name not in components and component.has_weights and component.variant is not None:
            own = dtype.get(name, dtype["default"]) if isinstance(dtype, dict) else dtype
            components[name] = load_component(component, own)
    try:
        pipeline = kind.from_pretrained(
            source.folder, dtype=dtype, use_safetensors=True, local_files_only=True, **components
        )
    except _LOADING_ERRORS as error:
        raise ModelError(f"{source.folder} does not load as a {kind.__name__}: {error}") from error
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name not in components:
            require_complete(component, source.components[name])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_component(component: Component, dtype: Any) -> Any:
    """Load one model of a pipeline to the CPU, from the files of the variant that is there.

    Args:
        dtype: a torch dtype, or "auto" for the one it is stored in.

    Raises:
        ModelError: it does not load, or lacks a weight.
    """
    kind: Any = component.kind
    try:
        model = kind.from_pretrained(
            component.folder, dtype=dtype, variant=component.variant, use_safetensors=True, local_files_only=True
        )
    except _LOADING_ERRORS as error:
        raise ModelError(f"{component.folder} does not load as a {component.class_name}: {error}") from error
    require_complete(model, component)
    return model


def pipeline_class(source: SourceModel) -> Any:
    """Return the diffusers class of a pipeline. Raises ModelError when the diffusers installed here has none."""
    name = source.index.class_name
    if (kind := getattr(diffusers, name, None)) is None:
        raise ModelError(f"{source.folder} is a {name}, which the diffusers installed here does not have: upgrade it.")
    return kind


def require_complete(model: nn.Module, component: Component) -> None:
    """Raise ModelError when the files lack a weight: diffusers only warns, and transformers makes up random values."""
    stored = component.forms
    state = model.state_dict()
    shared = {tensor.data_ptr() for name, tensor in state.items() if name in stored}  # tied weights are stored once
    missing = [n for n, t in state.items() if n not in stored and (t.is_meta or t.data_ptr() not in shared)]
    if missing:
        raise ModelError(
            f"{component.folder} lacks {len(missing)} weight(s), such as {missing[0]}: fetch the model again."
        )
