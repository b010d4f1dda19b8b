"""The safetensors files of one component: a single one, or shards and their index; and the content
of their headers.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from safetensors import SafetensorError, safe_open

from tempoquant.checkpoint.files import forms_of
from tempoquant.checkpoint.tensors import StoredAs
from tempoquant.errors import CheckpointError, ModelError
from tempoquant.models.small_files import read_object

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""The stem of weight files by library."""


def stem_of(library: str) -> str:
    """Return a library's stem of weight files, or that of the library that a pipeline's own module
    belongs to.
    """
    return STEMS[library.partition(".")[0]]


_VARIANTS = ("fp32", "bf16", "fp16")
"""Infixes of files that a publisher saved in another dtype; the first that exists is read."""

_AGAIN = "fetch the model again"

Forms: TypeAlias = Mapping[str, tuple[Path, StoredAs]]
"""The file, dtype and shape of each tensor by its name."""


class WeightFiles:
    """The safetensors files of a component of diffusers or transformers: the single one, or shards.

    Attributes:
        variant: such as "fp16" if only files of that name exist; None for plain names.
        index: of the shards, if there are shards.
    """

    def __init__(self, component: Path, stem: str) -> None:
        self.variant = next((name for name in (None, *_VARIANTS) if _are_there(component, stem, name)), None)
        self._single, self.index = _names(component, stem, self.variant)
        # If both exist, diffusers follows the index and transformers does not.
        single_first = stem == STEMS["transformers"] and self._single.is_file()
        self._is_sharded = self.index.is_file() and not single_first

    def files(self) -> tuple[Path, ...]:
        """Return the weight files; none if there are none. Raises ModelError for a malformed index,
        or a missing shard.
        """
        if not self._is_sharded:
            return (self._single,) if self._single.is_file() else ()
        files = tuple(self.index.parent / shard for shard in sorted(set(self._shard_of().values())))
        for file in files:
            if not file.is_file():
                raise ModelError(f"{file} is missing, which {self.index.name} names: {_AGAIN}.")
        return files

    def named(self) -> dict[str, None] | None:
        """Return the tensors that the index names; None without an index. Raises ModelError for a
        malformed one.
        """
        return dict.fromkeys(self._shard_of()) if self._is_sharded else None

    def forms(self) -> Forms:
        """Return every tensor, from the headers. Raises ModelError as `Component.forms`."""
        files = self.files()
        if not files:
            raise ModelError(
                f"{self._single.parent} has no weights, neither {self._single.name} nor {self.index.name}: {_AGAIN}."
            )
        by_shard = {file.name: _forms_in(file) for file in files}
        for tensor, shard in self._shard_of().items() if self._is_sharded else ():
            if tensor not in by_shard[shard]:
                raise ModelError(f"{self.index} says that {shard} holds {tensor}, which it does not: {_AGAIN}.")
        return {name: form for forms in by_shard.values() for name, form in forms.items()}

    def _shard_of(self) -> dict[str, str]:
        places = read_object(self.index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise ModelError(f"{self.index} has no weight_map of tensor names to file names: {_AGAIN}.")
        for name in sorted(set(places.values())):
            if Path(name).name != name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
                raise ModelError(f"{self.index} lists {name[:80]!r}, not the name of a safetensors file beside it.")
        return places


def forms_in_all(files: Iterable[Path]) -> Forms:
    """Return every tensor of several files. Raises ModelError if one is not whole, or two hold a
    tensor of one name.
    """
    forms: dict[str, tuple[Path, StoredAs]] = {}
    for file in files:
        for name, form in _forms_in(file).items():
            if name in forms:
                raise ModelError(f"{forms[name][0]} and {file} both hold {name}: give the files of one model alone.")
            forms[name] = form
    return forms


def make_plain(component: Path, library: str) -> None:
    """Rename the files of a copied component from a variant's names to plain ones, which loaders
    look for.
    """
    stem = stem_of(library)
    variant = WeightFiles(component, stem).variant
    if variant is None:
        return
    for named, plain in zip(_names(component, stem, variant), _names(component, stem, None), strict=True):
        if named.is_file():
            named.rename(plain)  # the shards keep their names, which the index tells


def _names(component: Path, stem: str, variant: str | None) -> tuple[Path, Path]:
    """Return a component's single file, and the index of its shards."""
    part = "" if variant is None else f".{variant}"
    return component / f"{stem}{part}.safetensors", component / f"{stem}.safetensors.index{part}.json"


def _are_there(component: Path, stem: str, variant: str | None) -> bool:
    return any(file.is_file() for file in _names(component, stem, variant))


def _forms_in(file: Path) -> Forms:
    """Return every tensor of a file, from a header that matches the file's length. Raises
    ModelError otherwise.
    """
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            return {name: (file, form) for name, form in forms_of(file, tensors)}
    except CheckpointError as error:  # a dtype of quantized models only
        what = str(error).partition(". ")[0]
        raise ModelError(f"{what}: start from weights in bfloat16, float16, float32 or float8.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file} is not a whole safetensors file ({error}): {_AGAIN}.") from error
