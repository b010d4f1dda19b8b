"""The hidden states of all samples after each block: on disk, so that a run can resume, and in RAM
up to a budget.

Both give the next block exactly the bytes that a resumed run would read.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tempoquant.checkpoint.files import sync
from tempoquant.errors import CalibrationError, OutputError

# The system caches newly written files in free memory; a copy of our own would only take that
# memory.
DEFAULT_RAM_BYTES = 0
_FILE_BYTES = 64 * 2**20
"""Small states share a file up to this size, since each file costs a wait for the disk."""


class HiddenStates:
    """Hidden states of all samples before block `index`, and those before the next block, which are
    being made.

    Args:
        folder: of this denoiser's hidden states; holds one folder for each boundary between blocks.
        ram_bytes: how much is also kept in RAM, half of it for each of the two; everything beyond
            is read from its files, a sample at a time.
    """

    def __init__(self, folder: Path, ram_bytes: int = DEFAULT_RAM_BYTES) -> None:
        self._folder, self._ram_bytes = folder, ram_bytes
        self._in_ram: dict[tuple[int, int], list[torch.Tensor]] = {}
        self._unwritten: dict[str, torch.Tensor] = {}
        self._files: dict[tuple[int, int], Path] = {}

    def exist_before(self, block: int) -> bool:
        """Return whether all states before a block exist."""
        return self._boundary(block).is_dir()

    def read(self, block: int, sample: int) -> list[torch.Tensor]:
        """Return one sample's hidden states before a block, on the CPU. Raises CalibrationError if
        the file is damaged.
        """
        if (block, sample) in self._in_ram:
            return self._in_ram[block, sample]
        try:
            with safe_open(self._file_of(block, sample), framework="pt", device="cpu") as tensors:
                # Copies have the alignment of tensors in RAM: alignment changes the last bits of
                # results.
                keys = sorted((key for key in tensors.keys() if _sample_of(key) == sample), key=_position_of)  # noqa: SIM118
                return [tensors.get_tensor(key).clone() for key in keys]
        except (SafetensorError, OSError, ValueError) as error:
            raise CalibrationError(
                f"hidden states in {self._boundary(block)} cannot be read ({error}): remove {self._folder.parent}, and "
                "the run starts over."
            ) from error

    def write(self, block: int, sample: int, states: Sequence[torch.Tensor]) -> None:
        """Store one sample's hidden states before a block. Raises OutputError if the disk is
        full.
        """
        states = [each.detach().cpu().contiguous() for each in states]
        self._unwritten |= {f"{sample}.{position}": each for position, each in enumerate(states)}
        if sum(each.nbytes for each in self._unwritten.values()) >= _FILE_BYTES:
            self._write_file(block)
        held = sum(_num_bytes(each) for (boundary, _), each in self._in_ram.items() if boundary == block)
        if held + _num_bytes(states) <= self._ram_bytes / 2:
            self._in_ram[block, sample] = states

    def commit(self, block: int) -> None:
        """Mark the states before a block as complete, safe against a power cut: all samples are
        written.
        """
        if self._unwritten:
            self._write_file(block)
        partial = self._boundary(block).with_suffix(".partial")
        try:
            sync(partial)
            partial.replace(self._boundary(block))
            sync(self._folder)
        except OSError as error:
            raise OutputError(
                f"hidden states cannot be written to {self._folder} ({error}): free some space."
            ) from error

    def keep_only(self, block: int) -> None:
        """Remove every boundary but the one before a block, and all unfinished writes."""
        self._in_ram = {key: states for key, states in self._in_ram.items() if key[0] == block}
        self._files = {key: file for key, file in self._files.items() if key[0] == block}
        self._unwritten = {}
        for entry in self._folder.glob("*") if self._folder.is_dir() else ():
            if entry != self._boundary(block):
                shutil.rmtree(entry)

    def _write_file(self, block: int) -> None:
        partial = self._boundary(block).with_suffix(".partial")
        try:
            partial.mkdir(parents=True, exist_ok=True)
            file = partial / f"{len(list(partial.iterdir())):05d}.safetensors"
            save_file(self._unwritten, file)
            sync(file)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"hidden states cannot be written to {partial} ({error}): free some space.") from error
        self._unwritten = {}

    def _file_of(self, block: int, sample: int) -> Path:
        """Return the file of a boundary that holds a sample. Raises OSError if none does."""
        if (block, sample) not in self._files:
            for file in sorted(self._boundary(block).iterdir()):
                with safe_open(file, framework="pt", device="cpu") as tensors:
                    self._files |= {(block, _sample_of(key)): file for key in tensors.keys()}  # noqa: SIM118 (not a dict)
        if (block, sample) not in self._files:
            raise OSError(f"sample {sample} is in none of its files")
        return self._files[block, sample]

    def _boundary(self, block: int) -> Path:
        return self._folder / f"{block:04d}"


def _sample_of(key: str) -> int:
    return int(key.partition(".")[0])


def _position_of(key: str) -> int:
    """Return the position among a sample's tensors that a key names."""
    return int(key.partition(".")[2])


def _num_bytes(states: Sequence[torch.Tensor]) -> int:
    return sum(each.nbytes for each in states)
