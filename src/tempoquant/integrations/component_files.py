"""What files tell of a component before a weight is read: that it is there, whole, and as its config says."""

import functools
import importlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ConfigMixin
from safetensors import SafetensorError, safe_open
from torch import nn

from tempoquant.checkpoint import read_config
from tempoquant.checkpoint.files import CONFIG_NAME, component_forms
from tempoquant.checkpoint.reader import check_forms
from tempoquant.checkpoint.schema import QUANT_METHOD
from tempoquant.errors import CheckpointError, ModelError
from tempoquant.integrations.nunchaku_lite import is_exported

_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
_AGAIN = "fetch the model again"
_TOKENIZER_NAME = "tokenizer.json"
_POINTER = b"version https://git-lfs"
_NOT_DESCRIBED = (TypeError, ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError)


class _Parameter(NamedTuple):
    """shape: of a parameter or buffer. aliases: all its names in the model, since tied weights are stored once."""

    shape: tuple[int, ...]
    aliases: frozenset[str]


def check_component(component: Path, library: str, class_name: str, weights: bool = True) -> None:
    """Hold a component's files against each other: index, headers, config and the class that will load them.

    Args:
        library, class_name: as model_index.json names them.
        weights: False where only configs were fetched.

    Raises:
        ModelError: a file is missing, cut off or a link to nothing, or the component lacks a tensor of the model that
            its config describes, or has one of another shape.
        CheckpointError: the same of a component that is quantized.
    """
    for file in sorted(component.rglob("*")):
        if not file.exists() and (weights or file.suffix == ".json"):
            raise ModelError(f"{file} is a link to {os.readlink(file)}, which is not there: {_AGAIN}.")
    kind = getattr(importlib.import_module(library), class_name, None)
    if not isinstance(kind, type):
        raise ModelError(f"{component.name} is a {class_name}, which the {library} installed here does not have.")
    if not issubclass(kind, nn.Module):
        _check_small_files(component, kind)
        return
    config, files = read_object(component / CONFIG_NAME), _WeightFiles(component, _STEMS[library])
    if is_exported(config):
        if weights:
            check_quantized(component)
        return
    names = files.shapes() if weights else files.named()
    if names is not None:
        _check_against_model(component, kind, config, names)


def check_quantized(component: Path) -> None:
    """Hold the headers of a quantized or exported component against its config. Raises CheckpointError."""
    if is_exported(read_object(component / CONFIG_NAME)):
        from tempoquant.integrations.nunchaku_reader import ExportedComponent  # imports models of diffusers

        ExportedComponent(component)
    else:
        check_forms({name: form for name, (_, form) in component_forms(component).items()}, read_config(component))


def read_object(file: Path) -> dict[str, Any]:
    """A file's JSON object. Raises ModelError for a missing or malformed one."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{file} is missing: {_AGAIN}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not readable JSON ({error}): {_AGAIN}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} is not a JSON object: {_AGAIN}.")
    return value


def _check_small_files(component: Path, kind: Any) -> None:
    """Raise ModelError unless a scheduler, tokenizer or processor has its files, each of which can be read."""
    needed = set(getattr(kind, "vocab_files_names", {}).values())
    if hasattr(kind, "get_image_processor_dict"):
        needed = {"preprocessor_config.json", "processor_config.json"}
    if needed and not any((component / name).is_file() for name in needed):
        raise ModelError(f"{component} holds none of {', '.join(sorted(needed))}: {_AGAIN}.")
    for file in sorted(component / name for name in needed if (component / name).is_file()):
        with file.open("rb") as opened:
            start = opened.read(len(_POINTER))
        if start in (b"", _POINTER):
            raise ModelError(f"{file} is empty, or a pointer that Git LFS left in its place: {_AGAIN}.")
    for file in sorted(component.glob("*.json")):
        if file.name == _TOKENIZER_NAME:
            _check_tokenizer(file)
        else:
            read_object(file)
    if issubclass(kind, ConfigMixin):
        try:
            kind.from_config(read_object(component / kind.config_name))
        except _NOT_DESCRIBED as error:
            raise _not_described(component / kind.config_name, kind, error) from error


def _check_tokenizer(file: Path) -> None:
    """Raise ModelError unless the library that reads tokenizer.json can."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # it raises nothing narrower
        raise ModelError(f"{file} is not a tokenizer that can be read ({error}): {_AGAIN}.") from error


def _not_described(file: Path, kind: Any, error: Exception) -> ModelError:
    return ModelError(f"{file} does not describe a {kind.__name__}: {error}")


def _check_against_model(
    component: Path, kind: Any, config: dict[str, Any], stored: Mapping[str, tuple[int, ...] | None]
) -> None:
    """Compare tensors (name to shape, None where it is not known) with the model that the config describes."""
    section = config.pop("quantization_config", None)
    is_ours = isinstance(section, dict) and section.get("quant_method") == QUANT_METHOD
    if section is not None and not is_ours:
        return  # what tensors of others' formats mean is theirs to say
    try:
        described = _described(kind, json.dumps(config))
    except _NOT_DESCRIBED as error:
        raise _not_described(component / CONFIG_NAME, kind, error) from error
    if is_ours:
        described = _without_layers(component, described)
        if all(shape is not None for shape in stored.values()):
            check_quantized(component)
    refusal = CheckpointError if is_ours else ModelError
    missing = [name for name, parameter in described.items() if not parameter.aliases & stored.keys()]
    if missing:
        raise refusal(f"{component} lacks {len(missing)} weight(s), such as {missing[0]}: {_AGAIN}.")
    for name, shape in stored.items():
        if shape is not None and name in described and described[name].shape != shape:
            raise refusal(
                f"{name} in {component} is {list(shape)}, but {list(described[name].shape)} in the model that "
                f"{CONFIG_NAME} describes: {_AGAIN}."
            )


def _without_layers(component: Path, described: Mapping[str, _Parameter]) -> dict[str, _Parameter]:
    """The parameters that stayed in 16 bits. Raises CheckpointError when a 4-bit layer is none of the model's."""
    layers = read_config(component).layers
    for name, entry in layers.items():
        weight = described.get(f"{name}.weight")
        if weight is None or weight.shape != (entry.out_features, entry.in_features):
            raise CheckpointError(
                f"{component / CONFIG_NAME} has a 4-bit layer {name} of {entry.out_features} × {entry.in_features}, "
                f"which the model that it describes has not: {_AGAIN}."
            )
    return {name: each for name, each in described.items() if name.rpartition(".")[0] not in layers}


@functools.lru_cache(maxsize=16)
def _described(kind: Any, config: str) -> Mapping[str, _Parameter]:
    """Every parameter and buffer of the model that a config (JSON) describes. Raises one of `_NOT_DESCRIBED`.

    Not kept for their numbers: they are on the meta device. A command asks for the same few models again and again.
    """
    with torch.device("meta"):
        values = json.loads(config)
        is_diffusers = issubclass(kind, ConfigMixin)
        model = kind.from_config(values) if is_diffusers else kind(kind.config_class.from_dict(values))
    if is_diffusers:
        _check_statistics(model.config)
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    aliases = {name: frozenset(group) for group in names.values() for name in group}
    return {
        name: _Parameter(tuple(tensor.shape), aliases.get(name, frozenset({name})))
        for name, tensor in model.state_dict().items()
    }


def _check_statistics(config: Mapping[str, Any]) -> None:
    """Raise ValueError unless an autoencoder has a mean and a deviation of each latent channel, if it has any."""
    channels = config.get("z_dim")
    for key in ("latents_mean", "latents_std"):
        values = config.get(key)
        if channels is None or values is None:
            continue
        if not isinstance(values, list | tuple) or len(values) != channels:
            count = len(values) if isinstance(values, list | tuple) else "no list of"
            raise ValueError(f"{key} has {count} numbers for z_dim = {channels} channels; {_AGAIN}.")
        usable = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
        if not usable or (key == "latents_std" and min(values) <= 0):
            raise ValueError(f"{key} holds something other than finite numbers, above 0 for a deviation; {_AGAIN}.")


class _WeightFiles:
    """The safetensors files of a component that is loaded by diffusers or transformers: the single one, or shards."""

    def __init__(self, component: Path, stem: str) -> None:
        self._single = component / f"{stem}.safetensors"
        self._index = component / f"{stem}.safetensors.index.json"
        # Where both are there, diffusers goes by the index and transformers does not.
        single_first = stem == _STEMS["transformers"] and self._single.is_file()
        self._is_sharded = self._index.is_file() and not single_first

    def named(self) -> dict[str, None] | None:
        """The tensors that the index names; None without an index. Raises ModelError for a malformed one."""
        return dict.fromkeys(self._shard_of()) if self._is_sharded else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor, from the headers.

        Raises:
            ModelError: there are no files, a shard that the index names is missing, a file is not whole, or a shard
                lacks a tensor that the index says it holds.
        """
        if not self._is_sharded:
            if not self._single.is_file():
                raise ModelError(
                    f"{self._single.parent} has no weights, neither {self._single.name} nor {self._index.name}: "
                    f"{_AGAIN}."
                )
            return _shapes(self._single)
        shard_of, by_shard = self._shard_of(), {}
        for shard in sorted(set(shard_of.values())):
            if not (self._index.parent / shard).is_file():
                raise ModelError(f"{self._index.parent / shard} is missing, which {self._index.name} names: {_AGAIN}.")
            by_shard[shard] = _shapes(self._index.parent / shard)
        for tensor, shard in shard_of.items():
            if tensor not in by_shard[shard]:
                raise ModelError(f"{self._index} says that {shard} holds {tensor}, which it does not: {_AGAIN}.")
        return {name: shape for shapes in by_shard.values() for name, shape in shapes.items()}

    def _shard_of(self) -> dict[str, str]:
        places = read_object(self._index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise ModelError(f"{self._index} has no weight_map of tensor names to file names: {_AGAIN}.")
        for name in sorted(set(places.values())):
            if Path(name).name != name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
                raise ModelError(f"{self._index} lists {name[:80]!r}, not the name of a safetensors file beside it.")
        return places


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape, from a header that says how long its file is. Raises ModelError when the file is not."""
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file} is not a whole safetensors file ({error}): {_AGAIN}.") from error
