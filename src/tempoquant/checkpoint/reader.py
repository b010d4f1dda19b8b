"""Reading a quantized component lazily: a config, a layer, a tensor at a time. Whatever is unknown is refused."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tempoquant.checkpoint import files
from tempoquant.checkpoint.schema import ComponentConfig, damaged
from tempoquant.checkpoint.tensors import (
    StoredAs,
    check_form,
    check_layer,
    check_presence,
    from_stored,
    stored_as,
)
from tempoquant.errors import CheckpointError
from tempoquant.layer import QuantizedLayer


def read_model_config(folder: str | Path) -> dict[str, Any]:
    """The whole config.json of a component, `quantization_config` included, unchecked but for being a JSON object."""
    folder = Path(folder)
    return files.read_json(files.require_inside(folder / files.CONFIG_NAME, folder))


def read_config(folder: str | Path) -> ComponentConfig:
    """The checked `quantization_config` of a component folder. Raises CheckpointError."""
    config = read_model_config(folder)
    if "quantization_config" not in config:
        raise CheckpointError(
            f"{Path(folder) / files.CONFIG_NAME} has no quantization_config: this component is not quantized."
        )
    return ComponentConfig.from_dict(config["quantization_config"], f"{Path(folder) / files.CONFIG_NAME}")


def read_layer(folder: str | Path, name: str) -> QuantizedLayer:
    """One layer, every tensor of it checked. Raises CheckpointError."""
    config = read_config(folder)
    if name not in config.layers:
        raise CheckpointError(f"{folder} has no quantized layer {name}; it has {len(config.layers)} others.")
    return _read_layer(_forms(Path(folder)), name, config)


def iter_layers(folder: str | Path) -> Iterator[tuple[str, QuantizedLayer]]:
    """(name, layer) of every quantized layer, by name, one in memory at a time. Raises CheckpointError."""
    config, forms = read_config(folder), _forms(Path(folder))
    for name in sorted(config.layers):
        yield name, _read_layer(forms, name, config)


def read_tensor(folder: str | Path, name: str) -> torch.Tensor:
    """One tensor by its full name, as stored. Raises CheckpointError."""
    forms = _forms(Path(folder))
    if name not in forms:
        raise CheckpointError(f"{folder} has no tensor {name}.")
    return _read(forms, [name])[name]


def check_tensors(folder: str | Path) -> None:
    """Compare every tensor of a component with its config: presence, dtypes, shapes, values. Raises CheckpointError."""
    config = read_config(folder)
    forms = _forms(Path(folder))
    check_forms({name: form for name, (_, form) in forms.items()}, config)
    for name in config.layers:
        _read_layer(forms, name, config)


def check_forms(forms: Mapping[str, StoredAs], config: ComponentConfig) -> None:
    """Compare the headers with the config: every tensor of every quantized layer, and none besides."""
    found: dict[str, dict[str, StoredAs]] = {name: {} for name in config.layers}
    for tensor_name, form in forms.items():
        layer_name, _, key = tensor_name.rpartition(".")
        if layer_name in found:
            found[layer_name][key] = form
    for name, entry in config.layers.items():
        table = stored_as(entry, config.bins.num_bins)
        check_presence(set(found[name]), set(table), name)
        for key, form in found[name].items():
            check_form(form, table[key], f"{name}.{key}")


def verify_hashes(folder: str | Path) -> list[str]:
    """Compare the SHA-256 of every weight file with the config's; returns the names of the files that agree.

    Raises CheckpointError when one differs, is not listed, or when the config holds no hashes at all.
    """
    folder = Path(folder)
    config = read_config(folder)
    if not config.weight_sha256:
        raise CheckpointError(
            f"{folder} holds no hashes (diffusers' save_pretrained drops them, since it rewrites the files): "
            "check_tensors is what can be checked."
        )
    names = {file.name for file in files.weight_files(folder)}
    if names != set(config.weight_sha256):
        odd = sorted(names ^ set(config.weight_sha256))[0]
        raise CheckpointError(
            f"{folder}: {odd} is either missing or not listed in weight_sha256; fetch the folder again."
        )
    for name in sorted(names):
        if files.sha256_of(folder / name) != config.weight_sha256[name]:
            raise CheckpointError(
                f"{folder / name} is not the file that was written (SHA-256 differs): fetch it again."
            )
    return sorted(names)


def _forms(folder: Path) -> dict[str, tuple[Path, StoredAs]]:
    """File and form of every tensor. A sharded component's index must tell the same."""
    forms = files.read_forms(files.weight_files(folder))
    if (folder / files.INDEX_NAME).is_file():
        listed = files.weight_map(folder)
        if listed != {name: file.name for name, (file, _) in forms.items()}:
            raise damaged(f"{folder / files.INDEX_NAME} does not list the tensors that the shards hold")
    return forms


def _read_layer(forms: Mapping[str, tuple[Path, StoredAs]], name: str, config: ComponentConfig) -> QuantizedLayer:
    entry, num_bins = config.layers[name], config.bins.num_bins
    table = stored_as(entry, num_bins)
    present = {tensor.removeprefix(f"{name}."): tensor for tensor in forms if tensor.rpartition(".")[0] == name}
    check_presence(set(present), set(table), name)
    for key, tensor in present.items():
        check_form(forms[tensor][1], table[key], f"{name}.{key}")  # before any byte is read
    tensors = _read(forms, present.values())
    layer = {key: tensors[tensor] for key, tensor in present.items()}
    check_layer(layer, entry, num_bins, name)
    return from_stored(layer, entry, config.bins)


def _read(forms: Mapping[str, tuple[Path, StoredAs]], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Tensors by name, in memory of their own: a mapped file's alignment would change the last bits of results."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(forms[name][0], []).append(name)
    tensors = {}
    for file, names_in_file in by_file.items():
        with files.open_weights(file) as weights:
            try:
                tensors.update({name: weights.get_tensor(name).clone() for name in names_in_file})
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} cannot be read ({error}); fetch it again.") from error
    return tensors
