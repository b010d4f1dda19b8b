"""Read a CTranslate2 model.bin, whose own library runs models and hands out no weights.

Little-endian: version, name of the specification, its revision, variables, aliases. A string is its
length with the final zero (uint16), then the bytes; a variable is its name, number of dimensions
(uint8), dimensions (uint32), dtype (uint8), number of bytes (uint32), bytes; an alias is two names.
Counts are uint32.
"""

import math
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tempoquant.errors import ModelError

VERSION = 6
DTYPES = {0: np.dtype("<f4"), 1: np.dtype("i1"), 2: np.dtype("<i2"), 3: np.dtype("<i4"), 4: np.dtype("<f2")}


class Variables(NamedTuple):
    """The content of the file: the kind of model, such as "WhisperSpec", and every tensor by name,
    aliases too.
    """

    specification: str
    tensors: dict[str, torch.Tensor]


class _Reader:
    """A position in the file's bytes that advances with every read."""

    def __init__(self, file: Path) -> None:
        self.file, self.data, self.place = file, file.read_bytes(), 0

    def take(self, num_bytes: int) -> bytes:
        end = self.place + num_bytes
        if end > len(self.data):
            raise ModelError(
                f"{self.file} is cut off: it has {len(self.data)} bytes, and what begins at byte {self.place} takes "
                f"{num_bytes}; fetch it again."
            )
        taken, self.place = self.data[self.place : end], end
        return taken

    def number(self, layout: str) -> int:
        [value] = struct.unpack(layout, self.take(struct.calcsize(layout)))
        return value

    def text(self) -> str:
        try:
            return self.take(self.number("<H")).removesuffix(b"\0").decode()
        except UnicodeDecodeError as error:
            raise ModelError(
                f"{self.file} holds a name before byte {self.place} that is not UTF-8: it is damaged; fetch it again."
            ) from error

    def variable(self) -> tuple[str, torch.Tensor]:
        name, num_dimensions = self.text(), self.number("B")
        shape = [self.number("<I") for _ in range(num_dimensions)]
        dtype_id, num_bytes = self.number("B"), self.number("<I")
        if dtype_id not in DTYPES:
            raise ModelError(f"{self.file} holds {name} in dtype {dtype_id}; those that can be read are {[*DTYPES]}.")
        dtype = DTYPES[dtype_id]
        if num_bytes != math.prod(shape) * dtype.itemsize:
            raise ModelError(
                f"{self.file} gives {name} {num_bytes} bytes, and {tuple(shape)} in {dtype.name} takes "
                f"{math.prod(shape) * dtype.itemsize}: it is damaged; fetch it again."
            )
        values = np.frombuffer(self.take(num_bytes), dtype).reshape(shape)
        return name, torch.from_numpy(values.copy())


def read_variables(file: Path) -> Variables:
    """Read every tensor, in its stored shape and dtype.

    Raises:
        ModelError: the file is cut off, damaged, goes on after its end, or has another version or
            dtype.
    """
    reader = _Reader(file)
    version = reader.number("<I")
    if version != VERSION:
        raise ModelError(f"{file} is no CTranslate2 model of version {VERSION}: its first number is {version}.")
    specification, _revision = reader.text(), reader.number("<I")
    tensors = dict(reader.variable() for _ in range(reader.number("<I")))
    for _ in range(reader.number("<I")):
        alias, name = reader.text(), reader.text()
        if name not in tensors:
            raise ModelError(f"{file} calls {alias} the same as {name}, which it does not hold; fetch it again.")
        tensors[alias] = tensors[name]
    if reader.place != len(reader.data):
        raise ModelError(f"{file} goes on after its end, byte {reader.place}: it is damaged; fetch it again.")
    return Variables(specification, tensors)
