"""Writing of a sample store prompt by prompt, so that an interrupted recording resumes at the next
prompt.

The same samples give the same bytes: no clock, host or path is stored, and interruptions leave no
trace.
"""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from safetensors.torch import save

from tempoquant.calibrate.arguments import OUTLINE_KEY, take_apart
from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.calibrate.store import SampleStore, check_tensor
from tempoquant.calibrate.store_index import (
    BRANCHES,
    INDEX_NAME,
    SAMPLES_FOLDER,
    TEXTS_FOLDER,
    SampleEntry,
    StoreIndex,
)
from tempoquant.checkpoint.files import read_json, sha256_of
from tempoquant.checkpoint.magnitude_ratios import MagnitudeRatios
from tempoquant.errors import CalibrationError, CheckpointError, OutputError

_ENTRIES = "entries"  # of finished prompts, while others are not finished
_RATIOS = "magnitude_ratios"

RatiosOfPrompt = Mapping[str, Mapping[str, Sequence[float]]]
"""Denoiser to guidance branch to the magnitude ratios of one prompt's first steps, see
`MagnitudeRatios`.
"""


class StoreWriter:
    """Writes a store into a folder, and continues the work of an earlier writer there.

    Several writers may share one folder, each with other prompts; one of them finishes the store.

    Args:
        folder: created if need be. Only the files that `finish` leaves in it are a store.
        shared_inputs: names of inputs that are the same in all calls of a prompt and branch (the
            texts): stored once.

    Raises:
        OutputError: from every method, if the folder cannot be written.
    """

    def __init__(self, folder: Path, shared_inputs: Set[str]) -> None:
        self.folder = folder
        self._shared = shared_inputs
        self._entries: list[SampleEntry] = []
        self._texts: dict[str, str] = {}
        with _writing(folder):
            for name in (SAMPLES_FOLDER, TEXTS_FOLDER, _ENTRIES):
                (folder / name).mkdir(parents=True, exist_ok=True)

    def add(self, prompt_index: int, sample: CalibrationSample) -> None:
        """Write one sample. It counts once its prompt is committed.

        Raises:
            CalibrationError: an input holds NaN or Inf; it names the prompt and the timestep.
        """
        for key, tensor in take_apart(sample.inputs)[0].items():
            check_tensor(key, tensor, f"prompt {sample.prompt_id!r} at timestep {sample.timestep:g}")
        own = {key: value for key, value in sample.inputs.items() if key not in self._shared}
        shared = {key: value for key, value in sample.inputs.items() if key in self._shared}
        name = f"{prompt_index:04d}-{sample.step_index:03d}-{sample.guidance_branch}"
        file = f"{SAMPLES_FOLDER}/{name}.safetensors"
        content = _serialized(own)
        entry = SampleEntry(
            file=file,
            denoiser=sample.denoiser,
            prompt_id=sample.prompt_id,
            timestep=sample.timestep,
            step_index=sample.step_index,
            guidance_branch=sample.guidance_branch,
            texts=self._add_texts(shared) if shared else None,
            sha256=hashlib.sha256(content).hexdigest(),
        )
        self._write(file, content)
        self._entries.append(entry)

    def _add_texts(self, arguments: Mapping[str, Any]) -> str:
        content = _serialized(arguments)
        digest = hashlib.sha256(content).hexdigest()
        file = f"{TEXTS_FOLDER}/{digest[:16]}.safetensors"
        if file not in self._texts:
            self._write(file, content)
            self._texts[file] = digest
        return file

    def commit(self, prompt_index: int, magnitude_ratios: RatiosOfPrompt | None = None) -> None:
        """Commit a prompt whose samples are all added: from here on, an interruption does not lose
        them.
        """
        texts = {entry.texts: self._texts[entry.texts] for entry in self._entries if entry.texts is not None}
        record: dict[str, Any] = {"samples": [entry.to_dict() for entry in self._entries], "texts": texts}
        record[_RATIOS] = dict(magnitude_ratios or {})
        self._write(self._entry_name(prompt_index), json.dumps(record, indent=1, sort_keys=True).encode())
        self._entries = []

    def committed(self, prompt_index: int) -> list[SampleEntry] | None:
        """Return the stored entries of a prompt; None if it is not committed, or its files have
        changed.
        """
        try:
            record = read_json(self.folder / self._entry_name(prompt_index))
            entries = [SampleEntry.from_dict(entry) for entry in record["samples"]]
            hashes = {entry.file: entry.sha256 for entry in entries} | record["texts"]
            whole = all(sha256_of(self.folder / name) == digest for name, digest in hashes.items())
        except (CalibrationError, CheckpointError, OSError, KeyError, TypeError):
            return None
        self._texts.update(record["texts"] if whole else {})
        return entries if whole else None

    def finish(
        self, provenance: Mapping[str, Any], schedule: Mapping[str, Sequence[float]], prompts: Iterable[int]
    ) -> SampleStore:
        """Turn the folder into a store of the committed `prompts`, and remove everything that
        belongs to no sample of theirs.

        Raises:
            CalibrationError: one of them is not committed, or the result would be no valid store.
        """
        keyed, ratios = [], []
        for prompt_index in prompts:
            entries = self.committed(prompt_index)
            if entries is None:
                raise CalibrationError(f"prompt {prompt_index} of {self.folder} is not recorded: record it again.")
            ratios.append(read_json(self.folder / self._entry_name(prompt_index)).get(_RATIOS, {}))
            keyed += [((e.step_index, prompt_index, BRANCHES.index(e.guidance_branch)), e) for e in entries]
        keyed.sort(key=lambda pair: pair[0])  # steps fall, so those of high noise come first
        samples = tuple(entry for _, entry in keyed)
        texts = {entry.texts: self._texts[entry.texts] for entry in samples if entry.texts is not None}
        falling = {name: tuple(timesteps) for name, timesteps in schedule.items()}
        index = StoreIndex(provenance, falling, samples, texts, _mean_ratios(ratios, falling))
        StoreIndex.from_dict(json.loads(index.to_json()))
        kept = {entry.file for entry in samples} | set(texts)
        with _writing(self.folder):
            for name in (SAMPLES_FOLDER, TEXTS_FOLDER):
                for file in (self.folder / name).iterdir():
                    if f"{name}/{file.name}" not in kept:
                        file.unlink()
            self._write(INDEX_NAME, index.to_json().encode())
        self.tidy()
        return SampleStore.open(self.folder)

    def tidy(self) -> None:
        """Remove the files that only an unfinished store needs."""
        with _writing(self.folder):
            shutil.rmtree(self.folder / _ENTRIES, ignore_errors=True)
            for partial in self.folder.glob("*.partial"):  # an index half written at a kill
                partial.unlink()

    @staticmethod
    def _entry_name(prompt_index: int) -> str:
        return f"{_ENTRIES}/{prompt_index:04d}.json"

    def _write(self, name: str, content: bytes) -> None:
        """Write a file that is either absent or whole, also after a power cut, and also if two
        workers write the same text.
        """
        file = self.folder / name
        partial = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.partial")
        with _writing(self.folder):
            with partial.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(file)


def _mean_ratios(
    prompts: Sequence[RatiosOfPrompt], schedule: Mapping[str, Sequence[float]]
) -> dict[str, MagnitudeRatios]:
    means = {
        name: MagnitudeRatios.mean_of((prompt.get(name, {}) for prompt in prompts), timesteps)
        for name, timesteps in schedule.items()
    }
    return {name: mean for name, mean in means.items() if mean is not None}


def _serialized(arguments: Mapping[str, Any]) -> bytes:
    tensors, outline = take_apart(arguments)
    metadata = None if outline is None else {OUTLINE_KEY: json.dumps(outline, sort_keys=True)}
    # Copies, since one tensor may have two names, which a file cannot hold.
    return save({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, metadata)


class _writing:
    """A context that turns file system errors into OutputErrors with a remedy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "free some space and repeat the command" if full else "make it writable and repeat the command"
            raise OutputError(
                f"{self.folder} cannot be written ({error.strerror or error}): {remedy}; prompts that are finished "
                "are kept."
            ) from error
