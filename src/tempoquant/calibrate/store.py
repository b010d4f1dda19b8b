"""The sample store: recorded transformer calls on disk, read one at a time.

A folder of safetensors files and one store.json, documented in docs/checkpoint.md and written by
`StoreWriter`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from tempoquant.calibrate.arguments import OUTLINE_KEY, put_together
from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.calibrate.store_index import INDEX_NAME, SampleEntry, StoreIndex, damaged
from tempoquant.checkpoint.files import read_json, require_inside, sha256_of
from tempoquant.checkpoint.magnitude_ratios import MagnitudeRatios
from tempoquant.errors import CalibrationError, CheckpointError
from tempoquant.recipe import Recipe
from tempoquant.timesteps import NUM_TRAIN_TIMESTEPS, TimestepBins

MAX_FILE_BYTES = 2**32  # of one sample or text, over a hundred times the size of Wan2.2's
_MAX_LENGTH = 2**24  # of one dimension
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32, torch.int64, torch.bool)
_ROUNDED = {torch.bfloat16: 2**-8, torch.float16: 2**-10}  # the largest rounding error of a timestep in 16 bits


def bins_of(store: "SampleStore", recipe: Recipe, denoiser: str) -> TimestepBins:
    """Return the timestep bins of a recipe on the schedule that a store was recorded with.

    Bins that no sample reaches are joined to their neighbours. A recipe with a clip search keeps
    them all, since it needs samples of every bin.
    """
    bins = TimestepBins.from_step_fractions(store.schedule(denoiser), recipe.bin_fractions_of(denoiser))
    if recipe.clip_ratios:
        return bins
    both = recipe.statistics_branches == "both"
    seen = [entry.timestep for entry in store.entries(denoiser) if both or entry.guidance_branch == "conditional"]
    return bins.joined(seen)


class SampleStore:
    """A finished store, opened by `SampleStore.open`.

    Attributes:
        folder: its location.
        digest: hexadecimal SHA-256 of store.json, which lists the hash of every other file.
    """

    def __init__(self, folder: Path, index: StoreIndex, digest: str) -> None:
        self.folder = folder
        self.digest = digest
        self._index = index

    @classmethod
    def open(cls, folder: Path) -> "SampleStore":
        """Open a store: check store.json and the presence of its files, without reading a sample.

        Raises:
            CalibrationError: the folder is no store, of an unknown version, incomplete, or names
                files elsewhere.
        """
        file = folder / INDEX_NAME
        if not file.is_file():
            raise CalibrationError(f"{folder} holds no {INDEX_NAME}: give the folder that `tempoquant record` wrote.")
        try:
            index = StoreIndex.from_dict(read_json(require_inside(file, folder)))
            for name in (*(entry.file for entry in index.samples), *index.texts):
                require_inside(folder / name, folder)
                size = (folder / name).stat().st_size if (folder / name).is_file() else -1
                if not 0 <= size <= MAX_FILE_BYTES:
                    what = "is missing" if size < 0 else f"is larger than {MAX_FILE_BYTES} bytes"
                    raise damaged(f"{folder / name} {what}")
        except CheckpointError as error:
            raise damaged(f"{file} cannot be used ({str(error).rstrip('.')})") from error
        except CalibrationError as error:
            raise CalibrationError(f"{file}: {error}") from error
        return cls(folder, index, sha256_of(file))

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Return the origin of the samples: model, scheduler, settings, seed, prompts, LoRAs."""
        return self._index.provenance

    @property
    def prompts(self) -> list[dict[str, str]]:
        """Return the prompts' records {"id", "prompt", "image_sha256"}, see
        `tempoquant.prompts.provenance`.
        """
        return list(self.provenance["prompts"])

    @property
    def settings(self) -> dict[str, Any]:
        """Return how the samples were drawn: size, frames, steps, guidance, flow shift."""
        return dict(self.provenance["settings"])

    @property
    def denoisers(self) -> tuple[str, ...]:
        """Return the names of the denoisers that samples can belong to, the noisiest first."""
        schedule = self._index.schedule
        return tuple(sorted(schedule, key=lambda name: max(schedule[name], default=0.0), reverse=True))

    def schedule(self, denoiser: str) -> tuple[float, ...]:
        """Return all timesteps of a denoiser in the sampling loop, falling; the store may hold
        samples of only some.
        """
        return self._index.schedule.get(denoiser, ())

    def magnitude_ratios(self, denoiser: str) -> MagnitudeRatios | None:
        """Return the magnitude ratios of the recording; None if it ran no denoiser, or an older
        version recorded it.
        """
        return self._index.magnitude_ratios.get(denoiser)

    def entries(self, denoiser: str) -> tuple[SampleEntry, ...]:
        """Return the stored entries of a denoiser, without tensors: by step, then prompt, then
        guidance branch.
        """
        return tuple(entry for entry in self._index.samples if entry.denoiser == denoiser)

    def samples(self, denoiser: str) -> "StoredSamples":
        """Return the samples of a denoiser in the order of `entries`; each is read from the disk on
        access.
        """
        return StoredSamples(self, self.entries(denoiser))

    def read(self, entry: SampleEntry) -> CalibrationSample:
        """Read one sample, on the CPU, in the dtypes it was recorded in.

        Raises:
            CalibrationError: a file has changed since it was written, or holds NaN, Inf or an
                impossible tensor.
        """
        inputs = self._arguments(entry, entry.file, entry.sha256)
        if entry.texts is not None:
            inputs |= self._arguments(entry, entry.texts, self._index.texts[entry.texts])
        if "timestep" in inputs and not _is_at(inputs["timestep"], entry.timestep):
            raise damaged(f"{self.folder / entry.file} is of another timestep than {entry.timestep:g}")
        return CalibrationSample(
            entry.prompt_id, entry.denoiser, entry.timestep, entry.step_index, entry.guidance_branch, inputs
        )

    def _arguments(self, entry: SampleEntry, name: str, sha256: str) -> dict[str, Any]:
        file = self.folder / name
        try:
            content = file.read_bytes()
        except OSError as error:
            raise CalibrationError(f"{file} cannot be read ({error.strerror}): record the samples again.") from error
        if hashlib.sha256(content).hexdigest() != sha256:
            raise damaged(f"{file} is not the file that was written (SHA-256 differs)")
        try:
            # Copies, because results depend on a tensor's alignment in the file.
            tensors = {key: tensor.clone() for key, tensor in load(content).items()}
        except (SafetensorError, ValueError, KeyError) as error:
            raise damaged(f"{file} is not a whole safetensors file ({error})") from error
        for key, tensor in tensors.items():
            check_tensor(key, tensor, f"{file}, prompt {entry.prompt_id!r} at timestep {entry.timestep:g}")
        try:
            return put_together(tensors, _outline_of(content))
        except ValueError as error:
            raise damaged(f"{file} does not say what a denoiser is called with ({error})") from error


def _outline_of(content: bytes) -> Any:
    """Return the outline of the arguments that are no tensors in a safetensors file; None if all
    are tensors.
    """
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return json.loads(metadata[OUTLINE_KEY]) if OUTLINE_KEY in metadata else None


def _is_at(told: torch.Tensor, timestep: float) -> bool:
    """Return whether a timestep argument equals a timestep, 0 … 1000, 0 … 1 or 1 clean … 0, up to
    its dtype's rounding.
    """
    noisiest = told.max()
    allowed = timestep * _ROUNDED.get(told.dtype, 0.0)
    read = (noisiest, noisiest * NUM_TRAIN_TIMESTEPS, NUM_TRAIN_TIMESTEPS - told.min() * NUM_TRAIN_TIMESTEPS)
    return any(abs(float(each) - timestep) <= allowed for each in read)


class StoredSamples(Sequence[CalibrationSample]):
    """Samples of a store as a sequence without memory: each access reads one from the disk."""

    def __init__(self, store: SampleStore, entries: Sequence[SampleEntry]) -> None:
        self._store = store
        self.entries = tuple(entries)

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> CalibrationSample: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredSamples": ...
    def __getitem__(self, index: int | slice) -> "CalibrationSample | StoredSamples":
        if isinstance(index, slice):
            return StoredSamples(self._store, self.entries[index])
        return self._store.read(self.entries[index])


def check_tensor(key: str, tensor: torch.Tensor, where: str) -> None:
    """Raise CalibrationError, starting with `where`, unless a tensor can be an input of one call:
    batch 1, finite.
    """
    is_of_one_call = tensor.ndim < 3 or tensor.shape[0] == 1 or "." in key  # in a list it may be one row
    fits = tensor.ndim > 0 and is_of_one_call and 0 < min(tensor.shape) <= max(tensor.shape) <= _MAX_LENGTH
    if tensor.dtype not in _DTYPES or not fits:
        raise damaged(f"{where}: {key} is {tensor.dtype} of shape {list(tensor.shape)}, no input of one call")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CalibrationError(
            f"{where}: {key} holds NaN or Inf: the model overflows there, leave the prompt out or change the settings."
        )
