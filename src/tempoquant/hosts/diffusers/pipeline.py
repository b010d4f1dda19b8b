"""Loading of whole pipelines with diffusers: 16-bit, quantized or exported."""

import functools
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from torch import nn

from tempoquant.device import compute_dtype, default_device
from tempoquant.errors import ModelError
from tempoquant.hosts.diffusers.modular import put_together
from tempoquant.hosts.nunchaku.config import is_exported
from tempoquant.hosts.nunchaku.reader import ExportedComponent
from tempoquant.hosts.text_encoders import is_quantized
from tempoquant.models.component_files import Component
from tempoquant.models.families import remember_family
from tempoquant.models.source import SourceModel
from tempoquant.models.text_encoders import parameter_of
from tempoquant.models.weights import DenoiserWeights
from tempoquant.models.with_experts import ModelName

_LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
    ImportError,  # of a package that another quantizer needs
)


def open_pipeline(model: ModelName) -> SourceModel:
    """Open a model as `SourceModel.open` does, and also check exported components.

    Raises ModelError, also for a denoiser that another program quantized, and CheckpointError.
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

    An export reproduces its target's kernels in plain PyTorch (`hosts/nunchaku/linear.py`), on
    every device.

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
    """Load a pipeline to the CPU with some components given, or left out as None; the others are
    loaded.

    Args:
        dtype: as diffusers takes it.

    Raises:
        ModelError: one does not load, or lacks a weight.
    """
    kind = pipeline_class(source)
    for name, component in source.components.items():
        is_elsewhere = component.folder.parent != source.folder
        if name in components or not component.has_weights:
            continue
        if component.variant is not None or is_elsewhere or _place_of(component):
            components[name] = load_component(component, _own_dtype(name, dtype))
    if source.index.is_modular:
        loaded = {name: _loaded(each, dtype) for name, each in source.components.items() if name not in components}
        pipeline = put_together(source, kind, {**loaded, **components})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
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
    remember_family(pipeline, source.family)
    return pipeline


def _own_dtype(name: str, dtype: Any) -> Any:
    """Return a component's dtype from diffusers' argument: one for all, or some by name and a
    default.
    """
    return dtype.get(name, dtype["default"]) if isinstance(dtype, dict) else dtype


def _loaded(component: Component, dtype: Any) -> Any:
    """Load a component on the CPU, a model or not. Raises ModelError if it does not load."""
    if component.has_weights:
        return load_component(component, _own_dtype(component.folder.name, dtype))
    kind: Any = component.kind
    try:
        return kind.from_pretrained(component.folder, local_files_only=True)
    except _LOADING_ERRORS as error:
        raise ModelError(f"{component.folder} does not load as a {component.class_name}: {error}") from error


def load_component(component: Component, dtype: Any) -> Any:
    """Load one model of a pipeline to the CPU, from the files of the existing variant.

    Args:
        dtype: a torch dtype, or "auto" for the stored one.

    Raises:
        ModelError: it does not load, or lacks a weight.
    """
    kind: Any = component.kind
    try:
        model = kind.from_pretrained(
            component.folder,
            dtype=dtype,
            variant=component.variant,
            use_safetensors=True,
            local_files_only=True,
            **_place_of(component),
        )
    except _LOADING_ERRORS as error:
        raise ModelError(f"{component.folder} does not load as a {component.class_name}: {error}") from error
    require_complete(model, component)
    return model


def _place_of(component: Component) -> dict[str, Any]:
    """Return transformers' argument for loading to the CPU where it would take the current GPU
    unasked: for what bitsandbytes quantized.
    """
    takes_gpu = component.library == "transformers" and component.quantized_by == "bitsandbytes"
    return {"device_map": {"": "cpu"}} if takes_gpu else {}


def pipeline_class(source: SourceModel) -> Any:
    """Return the diffusers class of a pipeline. Raises ModelError if the installed diffusers has
    none.
    """
    name = source.index.class_name
    if (kind := getattr(diffusers, name, None)) is None:
        raise ModelError(f"{source.folder} is a {name}, which the diffusers installed here does not have: upgrade it.")
    return kind


@functools.cache
def told_its_device(kind: type) -> type:
    """Return a pipeline class with the attribute `stated_device`: its compute device, or None for
    that of its models.
    """

    def execution_device(self: Any) -> torch.device:
        return self.stated_device or kind._execution_device.fget(self)  # type: ignore[attr-defined]

    return type(kind.__name__, (kind,), {"stated_device": None, "_execution_device": property(execution_device)})


def require_complete(model: nn.Module, component: Component) -> None:
    """Raise ModelError if the files lack a weight: diffusers only warns, and transformers fills in
    random values.
    """
    stored = {parameter_of(name) for name in component.forms} if is_quantized(model) else set(component.forms)
    state = dict(model.named_parameters()) if is_quantized(model) else model.state_dict()
    shared = {tensor.data_ptr() for name, tensor in state.items() if name in stored}  # tied weights are stored once
    missing = [n for n, t in state.items() if n not in stored and (t.is_meta or t.data_ptr() not in shared)]
    if missing:
        raise ModelError(
            f"{component.folder} lacks {len(missing)} weight(s), such as {missing[0]}: fetch the model again."
        )
