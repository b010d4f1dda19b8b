"""The files of a component folder: their names, their location inside it, and their content.
Nothing is unpickled.
"""

import collections
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tempoquant.checkpoint.checks import damaged
from tempoquant.checkpoint.schema import MAX_JSON_BYTES
from tempoquant.checkpoint.tensors import StoredAs
from tempoquant.errors import CheckpointError

CONFIG_NAME = "config.json"
WEIGHTS_STEM = "diffusion_pytorch_model"
WEIGHTS_NAME = f"{WEIGHTS_STEM}.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TORCH_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object. Raises CheckpointError for a missing, oversized or malformed file and
    for repeated keys.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no {path}: is this the folder of a quantized component?")
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise damaged(f"{path} is larger than {MAX_JSON_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise damaged(f"{path} does not hold a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        (key, _), *_ = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {key[:80]!r} appears twice")
    return record


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def weight_files(folder: Path) -> list[Path]:
    """Return the component's safetensors files: the single one, or the shards that the index lists.

    Raises CheckpointError if there are none (or only pickles), or if one lies outside the folder.
    """
    index, single = folder / INDEX_NAME, folder / WEIGHTS_NAME
    if index.is_file():
        return [folder / name for name in sorted(set(weight_map(folder).values()))]
    if single.is_file():
        require_safe(single)
        return [single]
    pickles = [path.name for path in sorted(folder.glob("*")) if path.suffix in _PICKLES]
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code: get {WEIGHTS_NAME}."
        )
    raise CheckpointError(f"there is no {single}: is this the folder of a quantized component?")


def weight_map(folder: Path) -> dict[str, str]:
    """Return shard names by tensor name, from the index. Raises CheckpointError if a shard is
    missing or lies elsewhere.
    """
    index = folder / INDEX_NAME
    content = read_json(require_inside(index, folder))
    record = content.get("weight_map")
    if set(content) != {"metadata", "weight_map"} or not isinstance(content["metadata"], dict):
        raise damaged(f"{index} does not hold exactly metadata and weight_map")
    if not isinstance(record, dict) or not record or not all(isinstance(name, str) for name in record.values()):
        raise damaged(f"{index} has no weight_map of tensor names to file names")
    for name in sorted(set(record.values())):
        if Path(name).name != name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            raise damaged(f"{index} lists {name[:80]!r}, not the name of a safetensors file beside it")
        if not (folder / name).is_file():
            raise CheckpointError(f"{index} lists {name}, which is missing: fetch the whole folder again.")
        require_safe(folder / name)
    return record


def require_safe(path: Path) -> Path:
    """Raise CheckpointError unless `path` is a safetensors file that lies in its own folder."""
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is not a safetensors file: TempoQuant never unpickles weights.")
    return require_inside(path, path.parent)


def require_inside(path: Path, folder: Path) -> Path:
    """Raise CheckpointError for a link that leads out of the folder, except into the Hugging Face
    cache's own blobs.
    """
    try:
        root, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise damaged(f"{path} leads nowhere ({error})") from error
    allowed = [root]
    for parent in root.parents:  # <repo>/snapshots/<revision>/<component>/file links to <repo>/blobs/<hash>
        if parent.name == "snapshots":
            allowed.append(parent.parent / "blobs")
    if not any(target.is_relative_to(base) for base in allowed):
        raise CheckpointError(f"{path} leads out of its folder, to {target}: put the file itself there.")
    return path


def read_forms(files: Iterable[Path]) -> dict[str, tuple[Path, StoredAs]]:
    """Read file, dtype and shape of every tensor, from the headers alone. Raises CheckpointError
    for damage and repeats.
    """
    forms: dict[str, tuple[Path, StoredAs]] = {}
    for file in files:
        with open_weights(file) as weights:
            for name, form in forms_of(file, weights):
                if name in forms:
                    raise damaged(f"tensor {name} is in {forms[name][0].name} and in {file.name}")
                forms[name] = (file, form)
    return forms


def forms_of(file: Path, weights: Any) -> Iterator[tuple[str, StoredAs]]:
    """Yield name, dtype and shape of every tensor of an open file. Raises CheckpointError for an
    unknown dtype.
    """
    for name in weights.keys():  # noqa: SIM118 (not a dict)
        header = weights.get_slice(name)
        dtype = TORCH_DTYPES.get(header.get_dtype())
        if dtype is None:
            raise damaged(f"{file}: {name} has the unknown dtype {header.get_dtype()}")
        yield name, StoredAs(dtype, tuple(header.get_shape()))


def component_forms(folder: Path) -> dict[str, tuple[Path, StoredAs]]:
    """Run `read_forms` on a component's files. Raises CheckpointError also if the index of shards
    disagrees.
    """
    forms = read_forms(weight_files(folder))
    if (folder / INDEX_NAME).is_file() and weight_map(folder) != {name: file.name for name, (file, _) in forms.items()}:
        raise damaged(f"{folder / INDEX_NAME} does not list the tensors that the shards hold")
    return forms


class open_weights:
    """`safetensors.safe_open` as a context manager whose errors are CheckpointErrors."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> Any:
        try:
            self._weights = safe_open(require_safe(self.file), framework="pt", device="cpu")
            return self._weights.__enter__()
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.file} is not a whole safetensors file ({error}); fetch it again.") from error

    def __exit__(self, *exc_info: Any) -> None:
        self._weights.__exit__(*exc_info)


def sha256_of(file: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk, so that a rename never precedes the
    data it names.

    Windows cannot flush folders, nor files opened for reading: a power cut there may lose finished
    work.
    """
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Run `sync` on a folder and everything in it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
