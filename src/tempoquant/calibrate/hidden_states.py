"""What lies between two blocks: the hidden states of all samples, on disk so that a run can resume, and in RAM too
while they fit a budget. Either way the next block gets exactly what a resumed run would read."""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tempoquant.checkpoint.files import sync
from tempoquant.errors import CalibrationError, OutputError

DEFAULT_RAM_BYTES = 2 * 2**30
_KEY = "hidden_states"


class HiddenStates:
    """Hidden states of `num_samples` samples before block `index`, and those before the next, which are being made.

    Args:
        folder: of this expert's hidden states; holds one folder for each boundary between blocks.
        num_samples: how many samples there are.
        ram_bytes: up to this much is also kept in RAM, half of it for each of the two; what is beyond is read back from
            its files, a sample at a time.
    """

    def __init__(self, folder: Path, num_samples: int, ram_bytes: int = DEFAULT_RAM_BYTES) -> None:
        self._folder, self._num_samples, self._ram_bytes = folder, num_samples, ram_bytes
        self._in_ram: dict[Path, torch.Tensor] = {}

    def exist_before(self, block: int) -> bool:
        """Whether the states before a block are all there."""
        return self._boundary(block).is_dir()

    def read(self, block: int, sample: int) -> torch.Tensor:
        """One sample's hidden states before a block, on the CPU. Raises CalibrationError when the file is damaged."""
        file = self._boundary(block) / _name(sample)
        if file in self._in_ram:
            return self._in_ram[file]
        try:
            with safe_open(file, framework="pt", device="cpu") as tensors:
                return tensors.get_tensor(_KEY).clone()  # as aligned as what is in RAM: alignment moves last bits
        except (SafetensorError, OSError, ValueError) as error:
            raise CalibrationError(
                f"{file} cannot be read ({error}): remove {self._folder.parent}, and the run starts over."
            ) from error

    def write(self, block: int, sample: int, states: torch.Tensor) -> None:
        """Take in one sample's hidden states before a block. Raises OutputError when the disk is full."""
        states = states.detach().cpu().contiguous()
        partial = self._boundary(block).with_suffix(".partial")
        try:
            partial.mkdir(parents=True, exist_ok=True)
            save_file({_KEY: states}, partial / _name(sample))
            sync(partial / _name(sample))
        except (OSError, SafetensorError) as error:
            raise OutputError(f"hidden states cannot be written to {partial} ({error}): free some space.") from error
        boundary = self._boundary(block)
        held = sum(each.nbytes for file, each in self._in_ram.items() if file.parent == boundary)
        if held + states.nbytes <= self._ram_bytes / 2:
            self._in_ram[boundary / _name(sample)] = states

    def commit(self, block: int) -> None:
        """All samples before a block are written: let them count, also after a power cut."""
        partial = self._boundary(block).with_suffix(".partial")
        try:
            sync(partial)
            partial.rename(self._boundary(block))
            sync(self._folder)
        except OSError as error:
            raise OutputError(
                f"hidden states cannot be written to {self._folder} ({error}): free some space."
            ) from error

    def forget_but(self, block: int) -> None:
        """Remove every boundary but the one before a block, and whatever was left half made."""
        keep = self._boundary(block)
        self._in_ram = {file: states for file, states in self._in_ram.items() if file.parent == keep}
        for entry in self._folder.glob("*") if self._folder.is_dir() else ():
            if entry != keep:
                shutil.rmtree(entry)

    def _boundary(self, block: int) -> Path:
        return self._folder / f"{block:04d}"


def _name(sample: int) -> str:
    return f"{sample:05d}.safetensors"
