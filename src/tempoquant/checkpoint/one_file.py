"""One safetensors file of any size, a tensor in memory at a time: its header is written first, from the forms alone.

Programs that take a single file want this; `ShardWriter` holds a whole shard in memory instead. The file's layout is
safetensors': eight bytes of the header's length, the header in JSON, the tensors without gaps.
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
"""Bytes that the tensors' first one lies a multiple of from the file's."""


class OneFileWriter:
    """Writes tensors, in any order, to their places in a file; a context that is left whole or with an error.

    Args:
        path: of the file, which is replaced.
        forms: dtype and shape of every tensor that will be added, by name.
        metadata: texts for the header.

    Raises:
        CheckpointError: a tensor has another form, is not in `forms`, comes twice, or is missing at the end.
        OutputError: the disk refuses.
    """

    def __init__(self, path: Path, forms: Mapping[str, StoredAs], metadata: Mapping[str, str]) -> None:
        self._path, self._forms = path, dict(forms)
        # Wide numbers first, so that all of them are aligned, as the library lays them out.
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
