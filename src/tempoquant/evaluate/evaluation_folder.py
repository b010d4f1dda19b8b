"""The folder of one evaluation: its layout, its finished work, and the settings that it belongs to.

    settings.json                          what a run must agree with to resume here
    manifest.jsonl                         a line for each generation that ended, well or not
    metrics.jsonl                          a line for each video that was measured
    evaluation.json                        the result
    items/ID.png                           first frames, of items that are given one
    videos/LABEL/ID-SEED.mp4               for people
    lossless/LABEL/ID-SEED.mkv             the same frames, every bit of them: measured
    latents/LABEL/ID-SEED.safetensors      the latent at the end of each timestep bin; written last
    calls/ID-SEED.safetensors              transformer calls of the reference, for the layer maps
    maps/LABEL.json                        layer maps
    vbench/scores.jsonl                    a line for each video and dimension that VBench scored

A generation is finished once its latents exist: they carry its manifest line, and come after all
else in one rename. A process that is killed between that rename and the manifest loses nothing.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tempoquant.errors import OutputError
from tempoquant.evaluate.files import whole_file, write_text

SETTINGS, MANIFEST, METRICS, EVALUATION = "settings.json", "manifest.jsonl", "metrics.jsonl", "evaluation.json"
SCORES = "vbench/scores.jsonl"
_KINDS = {"videos": ".mp4", "lossless": ".mkv", "latents": ".safetensors"}
_MAY_GROW = ("items", "models")
_LONGEST_NAME = 80
_HALF_WRITTEN = re.compile(r"\..+-[a-z0-9_]{8}\.(json|jsonl|png|mp4|mkv|safetensors)")
"""The temporary names that `files.whole_file` writes under."""


class Take(NamedTuple):
    """One generation: its model, item and seed."""

    label: str
    id: str
    seed: int


def file_name(text: str) -> str:
    """Convert a text to a file name; different texts have different names."""
    safe = re.sub(r"[^A-Za-z0-9_.@-]+", "-", text).strip(".-")[:_LONGEST_NAME]
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class EvaluationFolder:
    """The folder of one evaluation, see the module. Use it inside `claimed`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def claimed(self, identity: Mapping[str, Any]) -> Iterator[None]:
        """Claim the folder for this run within this context.

        Args:
            identity: plain values. "items" and "models", which are objects, may have other keys
                than those of an earlier run; everything else must be equal.

        Raises:
            OutputError: it belongs to other settings, to something else, or to a process that still
                runs.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file: give a folder with -o.")
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / ".lock", timeout=0):
                self._settle(identity)
                self._tidy()
                yield
                self._tidy()  # a killed worker may have left files
        except Timeout:
            raise OutputError(
                f"another evaluation is writing to {self.path}: wait for it, or choose another."
            ) from None

    def _settle(self, identity: Mapping[str, Any]) -> None:
        file = self.path / SETTINGS
        if not file.is_file():
            if any(not entry.name.startswith(".") for entry in self.path.iterdir()):
                raise OutputError(f"{self.path} holds something that is no evaluation: choose another folder.")
            write_text(file, _json(identity))
            return
        wanted, found = json.loads(_json(identity)), _read_json(file)
        if (differing := _first_difference(wanted, found)) is not None:
            raise OutputError(
                f"{self.path} belongs to an evaluation that differs in {differing}: repeat its settings, or choose "
                "another folder."
            )
        grown = {key: {**found[key], **wanted[key]} for key in _MAY_GROW}
        write_text(file, _json({**wanted, **grown}))

    def _tidy(self) -> None:
        """Remove files that a killed process left half written."""
        for file in self.path.rglob(".*"):
            if _HALF_WRITTEN.fullmatch(file.name):
                file.unlink()

    def place(self, kind: str, take: Take) -> Path:
        """Return the place of a take's file of a kind: "videos", "lossless" or "latents"."""
        return self.path / kind / take.label / f"{file_name(take.id)}-{take.seed}{_KINDS[kind]}"

    def image(self, id: str) -> Path:
        """Return the place of an item's first frame, if it is given one."""
        return self.path / "items" / f"{file_name(id)}.png"

    def calls(self, id: str, seed: int) -> Path:
        """Return the place of the reference's recorded calls of an item."""
        return self.path / "calls" / f"{file_name(id)}-{seed}.safetensors"

    def maps(self, label: str) -> Path:
        """Return the place of a model's layer maps."""
        return self.path / "maps" / f"{label}.json"

    def finish(self, take: Take, latents: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> dict[str, Any]:
        """Finish a generation whose video and frames are in their places; return its line, for
        `note`.
        """
        line = {**take._asdict(), **record}
        place = self.place("latents", take)
        place.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(place) as temporary:
            save_file(dict(latents), temporary, metadata={"record": json.dumps(line)})
        return line

    def note(self, line: Mapping[str, Any]) -> None:
        """Note a generation that ended, well or not.

        Only the process that claimed the folder writes in its manifest: on a shared folder,
        machines that append to one file lose each other's lines.
        """
        self._append(MANIFEST, line)

    def adopt(self, take: Take) -> bool:
        """Note a generation whose process died before it could report the end; return whether it
        was finished.
        """
        if not all(self.place(kind, take).is_file() for kind in _KINDS):
            return False
        self.note(json.loads(_metadata(self.place("latents", take))["record"]))
        return True

    def takes(self) -> dict[Take, dict[str, Any]]:
        """Return the latest manifest line of every take; takes with removed files are left out."""
        lines = {_take_of(line): line for line in self._lines(MANIFEST)}
        noted = {self.place("latents", take) for take, line in lines.items() if not line.get("failed")}
        for file in sorted((self.path / "latents").glob("*/*.safetensors")):
            if file not in noted:  # its process was killed before the note
                line = json.loads(_metadata(file)["record"])
                self.note(line)
                lines[_take_of(line)] = line
        return {
            take: line
            for take, line in lines.items()
            if line.get("failed") or all(self.place(kind, take).is_file() for kind in _KINDS)
        }

    def measured(self) -> dict[Take, dict[str, Any]]:
        """Return the metrics of every take that was measured."""
        found: dict[Take, dict[str, Any]] = {}
        for line in self._lines(METRICS):
            found.setdefault(_take_of(line), {}).update(line["metrics"])
        return found

    def measure(self, take: Take, metrics: Mapping[str, Any]) -> None:
        """Store the metrics of a take."""
        self._append(METRICS, {**take._asdict(), "metrics": dict(metrics)})

    def scored(self) -> list[tuple[Take, dict[str, Any]]]:
        """Return every line of VBench's scores, in the order in which they were made."""
        return [(_take_of(line), line) for line in self._lines(SCORES)]

    def score(self, take: Take, dimension: str, score: float, made: Mapping[str, str]) -> None:
        """Store VBench's score of a video, with the digests of its inputs."""
        (self.path / SCORES).parent.mkdir(exist_ok=True)
        self._append(SCORES, {**take._asdict(), "dimension": dimension, "score": score, **made})

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        """Append one line in one write; it is on disk on return."""
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)  # which only Windows has
        handle = os.open(self.path / name, flags, 0o666)
        try:
            before = os.fstat(handle).st_size
            if os.write(handle, line) < len(line):
                os.ftruncate(handle, before)  # or the next line would be glued to this one
                raise OutputError(f"{self.path / name} cannot grow: is the disk full? Free some, and run it again.")
            os.fsync(handle)
        finally:
            os.close(handle)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """Return every whole line. The last one may be torn if a process was killed inside the
        write; it is removed.
        """
        file = self.path / name
        if not file.is_file():
            return []
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(file, len(whole))
        try:
            return [json.loads(line) for line in whole.decode().split("\n") if line]
        except ValueError as error:
            raise OutputError(f"{file} is damaged ({error}): remove the line.") from error


def read_latents(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file of `EvaluationFolder.finish`. Raises OutputError if it is
    damaged.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (it is no iterable)
    except (SafetensorError, OSError) as error:
        raise OutputError(
            f"{file} cannot be read ({error}): remove it, and the same command generates it again."
        ) from error


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return dict(tensors.metadata())
    except (SafetensorError, OSError) as error:
        raise OutputError(
            f"{file} cannot be read ({error}): remove it, and the same command generates it again."
        ) from error


def _take_of(line: Mapping[str, Any]) -> Take:
    return Take(line["label"], line["id"], line["seed"])


def _first_difference(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """Return the first difference between two identities, such as "benchmark" or "settings
    num_steps"; None for none.
    """
    for key in sorted(wanted.keys() | found.keys()):
        ours, theirs = wanted.get(key), found.get(key)
        if not isinstance(ours, dict) or not isinstance(theirs, dict):
            if ours != theirs:
                return key
            continue
        names = ours.keys() & theirs.keys() if key in _MAY_GROW else ours.keys() | theirs.keys()
        for name in sorted(names):
            if ours.get(name) != theirs.get(name):
                return f"{key} {name}"
    return None


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{file} is damaged ({error}): choose another folder.") from error
