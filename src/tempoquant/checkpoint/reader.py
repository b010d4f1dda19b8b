"""Lazy reading of a quantized component: a config, a layer, a tensor at a time. Unknown content is
refused.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tempoquant.checkpoint import files
from tempoquant.checkpoint.checks import damaged
from tempoquant.checkpoint.schema import ComponentConfig
from tempoquant.checkpoint.tensors import (
    OWN_KEYS,
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
    """Read the whole config.json of a component, `quantization_config` included; only its being a
    JSON object is checked.
    """
    folder = Path(folder)
    return files.read_json(files.require_inside(folder / files.CONFIG_NAME, folder))


def read_config(folder: str | Path) -> ComponentConfig:
    """Read and check the `quantization_config` of a component folder. Raises CheckpointError."""
    config = read_model_config(folder)
    if "quantization_config" not in config:
        raise CheckpointError(
            f"{Path(folder) / files.CONFIG_NAME} has no quantization_config: this component is not quantized."
        )
    return ComponentConfig.from_dict(config["quantization_config"], f"{Path(folder) / files.CONFIG_NAME}")


def read_layer(folder: str | Path, name: str) -> QuantizedLayer:
    """Read one layer and check every tensor of it. Raises CheckpointError."""
    config, forms = _open(Path(folder))
    if name not in config.layers:
        raise CheckpointError(f"{folder} has no quantized layer {name}, only {len(config.layers)} others.")
    return _read_layer(forms, name, config)


def iter_layers(folder: str | Path) -> Iterator[tuple[str, QuantizedLayer]]:
    """Yield (name, layer) of every quantized layer, by name, one in memory at a time. Raises
    CheckpointError.
    """
    config, forms = _open(Path(folder))
    for name in sorted(config.layers):
        yield name, _read_layer(forms, name, config)


def iter_rest(folder: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of every tensor outside quantized layers, by name, as stored, one in
    memory at a time.
    """
    config, forms = _open(Path(folder))
    for name in sorted(forms):
        if name.rpartition(".")[0] not in config.layers:
            yield name, _read(forms, [name])[name]


def read_tensor(folder: str | Path, name: str) -> torch.Tensor:
    """Read one tensor by its full name, as stored. Raises CheckpointError."""
    _, forms = _open(Path(folder))
    if name not in forms:
        raise CheckpointError(f"{folder} has no tensor {name}.")
    return _read(forms, [name])[name]


def check_tensors(folder: str | Path) -> None:
    """Compare every tensor of a component with its config: presence, dtypes, shapes, values. Raises
    CheckpointError.
    """
    for _ in iter_layers(folder):
        pass


def check_forms(forms: Mapping[str, StoredAs], config: ComponentConfig) -> None:
    """Compare headers with the config: every tensor of every quantized layer has its form, and
    there are no others.
    """
    found: dict[str, dict[str, StoredAs]] = {name: {} for name in config.layers}
    for tensor_name, form in forms.items():
        parts = tensor_name.split(".")
        if parts[-1] in OWN_KEYS and ".".join(parts[:-1]) not in found:
            raise damaged(f"{tensor_name} belongs to a 4-bit layer that the config does not mention")
        for i in range(1, len(parts)):
            if (layer_name := ".".join(parts[:i])) in found:
                found[layer_name][".".join(parts[i:])] = form
    for name, entry in config.layers.items():
        table = stored_as(entry, config.bins.num_bins)
        check_presence(set(found[name]), set(table), name)
        for key, form in found[name].items():
            check_form(form, table[key], f"{name}.{key}")


def verify_hashes(folder: str | Path, config: ComponentConfig | None = None) -> list[str]:
    """Compare the SHA-256 of every weight file with the config's, and return the names of the
    files.

    Args:
        config: None for that of config.json.

    Raises CheckpointError if one differs, is not listed, or if the config holds no hashes at all.
    """
    folder = Path(folder)
    config = config or read_config(folder)
    if not config.weight_sha256:
        raise CheckpointError(
            f"{folder} holds no hashes to compare its files with (diffusers' save_pretrained drops them, since it "
            "rewrites the files): `tempoquant inspect` without --verify compares the files' headers with the config."
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


def _open(folder: Path) -> tuple[ComponentConfig, dict[str, tuple[Path, StoredAs]]]:
    """Read the config, and file and form of every tensor; they agree with each other and with the
    index of shards.
    """
    config = read_config(folder)
    forms = files.component_forms(folder)
    check_forms({name: form for name, (_, form) in forms.items()}, config)
    return config, forms


def _read_layer(forms: Mapping[str, tuple[Path, StoredAs]], name: str, config: ComponentConfig) -> QuantizedLayer:
    entry, num_bins = config.layers[name], config.bins.num_bins
    keys = stored_as(entry, num_bins)
    tensors = _read(forms, [f"{name}.{key}" for key in keys])
    layer = {key: tensors[f"{name}.{key}"] for key in keys}
    check_layer(layer, entry, num_bins, name)
    return from_stored(layer, entry, config.bins)


def _read(forms: Mapping[str, tuple[Path, StoredAs]], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Read tensors by name into fresh memory: a mapped file's alignment would change the last bits
    of results.
    """
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
