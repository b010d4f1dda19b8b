"""The files of a component, checked before a weight is read."""

import dataclasses
import functools
import importlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from tempoquant.checkpoint import read_config
from tempoquant.checkpoint.files import CONFIG_NAME
from tempoquant.checkpoint.reader import check_forms
from tempoquant.checkpoint.schema import QUANT_METHOD, ComponentConfig
from tempoquant.errors import CheckpointError, ModelError
from tempoquant.models.described import Parameter, described_by
from tempoquant.models.family import ModelFamily
from tempoquant.models.small_files import NOT_DESCRIBED, check_small_files, not_described, read_object
from tempoquant.models.stored_tensors import Meaning, StoredTensor, meaning_of, tensors_of
from tempoquant.models.transformers_names import as_transformers_loads
from tempoquant.models.weight_files import Forms, WeightFiles, forms_in_all, stem_of

_AGAIN = "fetch the model again"


@dataclass(frozen=True, eq=False)
class Component:
    """One component of a pipeline on disk. Its files are read when they are first needed, and once.

    Attributes:
        folder: its location.
        library, class_name: as model_index.json names them.
        family: of a denoiser, whose tensors may have other names; None for other components.
        given: files of its weights in place of the folder's, which then gives only config.json.
    """

    folder: Path
    library: str
    class_name: str
    family: ModelFamily | None = None
    given: tuple[Path, ...] = ()

    @functools.cached_property
    def kind(self) -> type:
        """Return the class that loads it. Raises ModelError if the library lacks it."""
        found = getattr(importlib.import_module(self.library), self.class_name, None)
        if not isinstance(found, type):
            raise ModelError(
                f"{self.folder.name} is a {self.class_name}, which the {self.library} installed here does not have."
            )
        return found

    @property
    def has_weights(self) -> bool:
        """Return whether it is a model, and no scheduler, tokenizer or processor."""
        return issubclass(self.kind, nn.Module)

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """Return its config.json. Raises ModelError if it is missing or malformed."""
        return read_object(self.folder / CONFIG_NAME)

    @property
    def is_quantized(self) -> bool:
        """Return whether its config has a quantization_config, of any program."""
        return "quantization_config" in self.config

    @property
    def is_ours(self) -> bool:
        """Return whether TempoQuant quantized it."""
        section = self.config.get("quantization_config")
        return isinstance(section, dict) and section.get("quant_method") == QUANT_METHOD

    @functools.cached_property
    def quantization(self) -> ComponentConfig:
        """Return the quantization config that TempoQuant wrote.

        Raises CheckpointError if there is none or it is damaged, ModelError for another program's.
        """
        if not self.is_ours:
            self.require_16_bit()
        return read_config(self.folder)

    @property
    def quantized_by(self) -> str | None:
        """Return the quantizer's name in its config; None if it is not quantized."""
        section = self.config.get("quantization_config")
        if not self.is_quantized:
            return None
        return "TempoQuant" if self.is_ours else str(section.get("quant_method") if isinstance(section, dict) else None)

    def require_16_bit(self) -> None:
        """Raise ModelError for a component that is quantized."""
        if (method := self.quantized_by) is not None:
            by = "" if self.is_ours else f" (by {method})"
            raise ModelError(f"{self.folder} is already quantized{by}: start from the 16-bit model.")

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """Return the files of its weights. Raises ModelError as `WeightFiles.files`."""
        return self.given or WeightFiles(self.folder, stem_of(self.library)).files()

    @property
    def variant(self) -> str | None:
        """Return a variant such as "fp16" if all weight files have that name; else None."""
        return None if self.given else WeightFiles(self.folder, stem_of(self.library)).variant

    @functools.cached_property
    def forms(self) -> Forms:
        """Return every tensor as it is read, by the model's names, from the headers of its files.

        Raises:
            ModelError: there are no files, a shard that the index names is missing, a file is not
                whole or holds an unknown tensor, or a shard lacks a tensor that the index lists in
                it.
        """
        if not self._may_be_renamed:
            return self._stored
        return {name: (tensor.place.file, tensor.form) for name, tensor in self.tensors.items()}

    @functools.cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Return a 16-bit denoiser's tensors by the model's names. Raises ModelError as `forms`."""
        return tensors_of(self._stored, self._meaning)

    @functools.cached_property
    def _stored(self) -> Forms:
        forms = forms_in_all(self.given) if self.given else WeightFiles(self.folder, stem_of(self.library)).forms()
        if self.library != "transformers":
            return forms
        new_names = as_transformers_loads(forms, self.kind, self.config)
        return {new_names[name]: form for name, form in forms.items()}

    @functools.cached_property
    def _meaning(self) -> Meaning:
        return self._understood(self._stored)

    @property
    def _may_be_renamed(self) -> bool:
        return self.family is not None and not self.is_quantized

    def _understood(self, keys: Iterable[str]) -> Meaning:
        """Return the meaning of keys, without obsolete ones. Raises ModelError for unknown keys."""
        assert self.family is not None  # only denoisers' keys are looked at
        found = meaning_of(keys, self.family)
        left: list[str] = getattr(self.kind, "_keys_to_ignore_on_load_unexpected", None) or []
        unknown = [key for key in found.unknown if not any(re.search(pattern, key) for pattern in left)]
        if unknown and (self.given or found.is_renamed):
            what = (
                "a LoRA's, which --lora takes"
                if "lora_" in unknown[0]
                else f"not known as a part of a {self.class_name}"
            )
            raise ModelError(f"{self.place} holds {unknown[0][:120]}, which is {what}.")
        return dataclasses.replace(found, tensors={**found.tensors, **{key: key for key in unknown}})

    @property
    def is_read_here(self) -> bool:
        """Return whether only TempoQuant reads its names or its 8-bit weights right."""
        if not self._may_be_renamed:
            return False
        return bool(self.given) or self._meaning.is_renamed or self.has_8_bits

    @property
    def has_8_bits(self) -> bool:
        """Return whether weights of a denoiser are stored in 8 bits."""
        return self._may_be_renamed and any(tensor.is_8_bit for tensor in self.tensors.values())

    @property
    def notes(self) -> tuple[str, ...]:
        """Return the notes for a checkpoint made of a denoiser about the origin of its weights."""
        notes = [f"the weights are those of {', '.join(file.name for file in self.given)}"] if self.given else []
        if self.has_8_bits:
            eight = [tensor for tensor in self.tensors.values() if tensor.is_8_bit]
            scaled = sum(tensor.scale is not None for tensor in eight)
            notes.append(f"from 8-bit weights: {len(eight)} tensors were float8, {scaled} of them with scales")
        return tuple(notes)

    @property
    def place(self) -> str:
        """Return the location of its weights, for messages."""
        if len(self.given) == 1:
            return str(self.given[0])
        return str(self.given[0].parent if self.given else self.folder)

    def files(self) -> dict[str, Path]:
        """Return its files by names that tell their places, without file managers' files."""
        if self.given:
            given = {f"{self.folder.name}/{file.name}": file for file in self.given}
            return {f"{self.folder.name}/{CONFIG_NAME}": self.folder / CONFIG_NAME, **given}
        return {
            file.relative_to(self.folder.parent).as_posix(): file
            for file in sorted(self.folder.rglob("*"))
            if file.is_file() and not file.name.startswith(".")
        }

    @functools.cached_property
    def disk_bytes(self) -> int | None:
        """Return the bytes of the weights: by their index, else of the files; None without both.

        The index comes first: the hub's cache may hold only some of its shards.
        """
        if self.given:
            return sum(file.stat().st_size for file in self.given)
        index = WeightFiles(self.folder, stem_of(self.library)).index
        size = read_object(index).get("metadata", {}).get("total_size") if index.is_file() else None
        if isinstance(size, int):
            return size
        files = self.weight_files
        return sum(file.stat().st_size for file in files) if files else None

    def without_weights(self) -> Any:
        """Return the model on the meta device. Raises ModelError if its config describes none."""
        kind: Any = self.kind
        try:
            with init_empty_weights():
                return kind.from_config(dict(self.config))
        except NOT_DESCRIBED as error:
            raise not_described(self.folder / CONFIG_NAME, kind, error) from error

    def check(self, weights: bool = True) -> None:
        """Compare its files with each other: index, headers, config and class.

        Tensors in other programs' formats are not interpreted: of those only the config is read.

        Args:
            weights: False if only configs were fetched.

        Raises:
            ModelError: a file is missing, cut off or a link to nothing, or the component lacks a
                tensor of the model that its config describes, or has one of another shape.
            CheckpointError: the same of a component that TempoQuant quantized.
        """
        for file in () if self.given else sorted(self.folder.rglob("*")):
            if not file.exists() and (weights or file.suffix == ".json"):
                raise ModelError(f"{file} is a link to {os.readlink(file)}, which is not there: {_AGAIN}.")
        if not self.has_weights:
            check_small_files(self.folder, self.kind)
        elif self.is_ours or not self.is_quantized:
            names = _shapes(self.forms) if weights or self.given else self._named()
            if names is not None:
                self._check_against_model(names)

    def _named(self) -> Mapping[str, None] | None:
        """Return tensors by the model's names; an index without its files is enough."""
        keys = WeightFiles(self.folder, stem_of(self.library)).named()
        if keys is not None and self.library == "transformers":
            keys = dict.fromkeys(as_transformers_loads(keys, self.kind, self.config).values())
        return keys if keys is None or not self._may_be_renamed else dict.fromkeys(self._understood(keys).tensors)

    def _check_against_model(self, stored: Mapping[str, tuple[int, ...] | None]) -> None:
        """Compare tensors (name to shape, None for unknown) with the model of the config."""
        config = {key: value for key, value in self.config.items() if key != "quantization_config"}
        try:
            described = described_by(self.kind, json.dumps(config))
        except NOT_DESCRIBED as error:
            raise not_described(self.folder / CONFIG_NAME, self.kind, error) from error
        if self.is_ours:
            described = _without_layers(self, described)
            if all(shape is not None for shape in stored.values()):
                check_forms({name: form for name, (_, form) in self.forms.items()}, self.quantization)
        refusal = CheckpointError if self.is_ours else ModelError
        remedy = f"give files of the model that {self.folder / CONFIG_NAME} describes" if self.given else _AGAIN
        missing = [name for name, parameter in described.items() if not parameter.aliases & stored.keys()]
        if missing:
            raise refusal(f"{self.place} lacks {len(missing)} weight(s), such as {missing[0]}: {remedy}.")
        for name, shape in stored.items():
            if name not in described:
                if self.given:
                    raise refusal(f"{self.place} holds {name}, which its model lacks: {remedy}.")
            elif shape is not None and described[name].shape != shape:
                raise refusal(
                    f"{name} in {self.place} is {list(shape)}, but {list(described[name].shape)} in the model that "
                    f"{self.folder / CONFIG_NAME if self.given else CONFIG_NAME} describes: {remedy}."
                )


def _without_layers(component: Component, described: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Return the parameters in 16 bits. Raises CheckpointError for an unknown 4-bit layer."""
    layers = component.quantization.layers
    for name, entry in layers.items():
        weight = described.get(f"{name}.weight")
        if weight is None or weight.shape != (entry.out_features, entry.in_features):
            raise CheckpointError(
                f"{component.folder / CONFIG_NAME} has a 4-bit layer {name} of {entry.out_features} × "
                f"{entry.in_features}, which the model that it describes lacks: {_AGAIN}."
            )
    return {name: each for name, each in described.items() if name.rpartition(".")[0] not in layers}


def _shapes(forms: Forms) -> dict[str, tuple[int, ...]]:
    return {name: form.shape for name, (_, form) in forms.items()}
