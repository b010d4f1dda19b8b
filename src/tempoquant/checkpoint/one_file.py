"""One safetensors file of any size, written with one tensor in memory at a time: the header comes
first, from the forms alone.

It serves programs that take a single file; `ShardWriter` holds a whole shard in memory instead. The
layout is that of safetensors: eight bytes for the header's length, the header in JSON, the tensors
without gaps.
"""

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch

from tempoquant.checkpoint.files import TORCH_DTYPES, sync
from tempoquant.checkpoint.shards import disk_errors
from tempoquant.checkpoint.tensors import StoredAs, check_form
from tempoquant.errors import CheckpointError

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_ALIGNMENT = 8
"""The first tensor begins at a multiple of this many bytes from the start of the file."""


class OneFileWriter:
    """Writes tensors, in any order, to their places in a file; its context ends with the whole file
    or with an error.

    Args:
        path: of the file, which is replaced.
        forms: dtype and shape of every tensor that will be added, by name.
        metadata: texts for the header.

    Raises:
        CheckpointError: a tensor has another form, is not in `forms`, comes twice, or is missing at
            the end.
        OutputError: the disk cannot be written.
    """

    def __init__(self, path: Path, forms: Mapping[str, StoredAs], metadata: Mapping[str, str]) -> None:
        self._path, self._forms = path, dict(forms)
        # Wide dtypes come first, so that all tensors are aligned, as in the library's own layout.
        names = sorted(forms, key=lambda name: (-forms[name].dtype.itemsize, name))
        ends = list(itertools.accumulate(math.prod(forms[name].shape) * forms[name].dtype.itemsize for name in names))
        places = dict(zip(names, zip([0, *ends], ends, strict=False), strict=True))
        header = {"__metadata__": {"format": "pt", **metadata}} | {
            name: {"dtype": _DTYPE_NAMES[forms[name].dtype], "shape": list(forms[name].shape), "data_offsets": place}
            for name, place in places.items()
        }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._head = len(text).to_bytes(8, "little") + text
        self._starts = {name: len(self._head) + start for name, (start, _) in places.items()}
        self._size = len(self._head) + (ends[-1] if ends else 0)
        self._missing = set(forms)

    def __enter__(self) -> "OneFileWriter":
        with disk_errors(self._path.parent):
            self._stream = self._path.open("wb")
            self._stream.write(self._head)
            self._stream.truncate(self._size)
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor as it is."""
        if name not in self._missing:
            known = "was added twice" if name in self._forms else f"is not one of the {len(self._forms)} announced"
            raise CheckpointError(f"tensor {name} {known}.")
        check_form(StoredAs(tensor.dtype, tuple(tensor.shape)), self._forms[name], name)
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        with disk_errors(self._path.parent):
            self._stream.seek(self._starts[name])
            self._stream.write(content.data)
        self._missing.remove(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with disk_errors(self._path.parent):
            self._stream.close()
        if error is not None:
            return
        if self._missing:
            raise CheckpointError(f"tensor {min(self._missing)} was announced and never added to {self._path.name}.")
        with disk_errors(self._path.parent):
            sync(self._path)
