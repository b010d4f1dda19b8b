"""The folder of one evaluation: where everything lies, what is finished, and which settings it belongs to.

    settings.json                          what a run must agree with to go on here
    manifest.jsonl                         a line for each generation that ended, well or not
    metrics.jsonl                          a line for each video that was measured
    evaluation.json                        the result
    items/ID.png                           first frames, of items that are given one
    videos/LABEL/ID-SEED.mp4               for people
    lossless/LABEL/ID-SEED.mkv             the same frames, every bit of them: what is measured
    latents/LABEL/ID-SEED.safetensors      the latent at the end of each timestep bin; written last
    calls/ID-SEED.safetensors              transformer calls of the reference, for the layer maps
    maps/LABEL.json                        layer maps
    vbench/scores.jsonl                    a line for each video and dimension that VBench scored

A generation is finished when its latents are there: they carry its manifest line, and come after all else in one
rename. A process that is killed between that rename and the manifest loses nothing.
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
"""Names that `files.whole_file` writes under."""


class Take(NamedTuple):
    """One generation: which model, item and seed."""

    label: str
    id: str
    seed: int


def file_name(text: str) -> str:
    """A text as a file name; texts that differ have names that differ."""
    safe = re.sub(r"[^A-Za-z0-9_.@-]+", "-", text).strip(".-")[:_LONGEST_NAME]
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class EvaluationFolder:
    """See the module. Use it inside `claimed`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def claimed(self, identity: Mapping[str, Any]) -> Iterator[None]:
        """Within this context the folder is this run's.

        Args:
            identity: plain values. "items" and "models", which are objects, may have other keys than those of an
                earlier run; all else has to be equal.

        Raises:
            OutputError: it belongs to other settings, to something else, or to a process that still runs.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file: give a folder with -o.")
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / ".lock", timeout=0):
                self._settle(identity)
                self._tidy()
                yield
                self._tidy()  # workers may have been killed
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
        """Remove what a killed process left half written."""
        for file in self.path.rglob(".*"):
            if _HALF_WRITTEN.fullmatch(file.name):
                file.unlink()

    def place(self, kind: str, take: Take) -> Path:
        """Where a take's file of a kind lies: "videos", "lossless" or "latents"."""
        return self.path / kind / take.label / f"{file_name(take.id)}-{take.seed}{_KINDS[kind]}"

    def image(self, id: str) -> Path:
        """Where an item's first frame lies, if it is given one."""
        return self.path / "items" / f"{file_name(id)}.png"

    def calls(self, id: str, seed: int) -> Path:
        """Where the reference's recorded calls of an item lie."""
        return self.path / "calls" / f"{file_name(id)}-{seed}.safetensors"

    def maps(self, label: str) -> Path:
        """Where a model's layer maps lie."""
        return self.path / "maps" / f"{label}.json"

    def finish(self, take: Take, latents: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> dict[str, Any]:
        """A generation is complete: its video and frames are in their places already. Gives its line, for `note`."""
        line = {**take._asdict(), **record}
        place = self.place("latents", take)
        place.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(place) as temporary:
            save_file(dict(latents), temporary, metadata={"record": json.dumps(line)})
        return line

    def note(self, line: Mapping[str, Any]) -> None:
        """A generation ended, well or not. Only the process that claimed the folder writes in its manifest: on a shared
        folder, machines that append to one file lose each other's lines."""
        self._append(MANIFEST, line)

    def adopt(self, take: Take) -> bool:
        """Note a generation whose process died before it could say that it was finished; whether it was."""
        if not all(self.place(kind, take).is_file() for kind in _KINDS):
            return False
        self.note(json.loads(_metadata(self.place("latents", take))["record"]))
        return True

    def takes(self) -> dict[Take, dict[str, Any]]:
        """The latest manifest line of every take; those of files that were taken away are left out."""
        lines = {_take_of(line): line for line in self._lines(MANIFEST)}
        noted = {self.place("latents", take) for take, line in lines.items() if not line.get("failed")}
        for file in sorted((self.path / "latents").glob("*/*.safetensors")):
            if file not in noted:  # its process was killed before it could say so
                line = json.loads(_metadata(file)["record"])
                self.note(line)
                lines[_take_of(line)] = line
        return {
            take: line
            for take, line in lines.items()
            if line.get("failed") or all(self.place(kind, take).is_file() for kind in _KINDS)
        }

    def measured(self) -> dict[Take, dict[str, Any]]:
        """The metrics of every take that was measured."""
        found: dict[Take, dict[str, Any]] = {}
        for line in self._lines(METRICS):
            found.setdefault(_take_of(line), {}).update(line["metrics"])
        return found

    def measure(self, take: Take, metrics: Mapping[str, Any]) -> None:
        """Keep what was measured."""
        self._append(METRICS, {**take._asdict(), "metrics": dict(metrics)})

    def scored(self) -> list[tuple[Take, dict[str, Any]]]:
        """Every line of VBench's scores, in the order in which they were made."""
        return [(_take_of(line), line) for line in self._lines(SCORES)]

    def score(self, take: Take, dimension: str, score: float, made: Mapping[str, str]) -> None:
        """Keep what VBench gave a video, with what it was made of."""
        (self.path / SCORES).parent.mkdir(exist_ok=True)
        self._append(SCORES, {**take._asdict(), "dimension": dimension, "score": score, **made})

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        """One line in one write, on the disk when this returns."""
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
        handle = os.open(self.path / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            before = os.fstat(handle).st_size
            if os.write(handle, line) < len(line):
                os.ftruncate(handle, before)  # or the next line would be glued to this one
                raise OutputError(f"{self.path / name} cannot grow: is the disk full? Free some, and run it again.")
            os.fsync(handle)
        finally:
            os.close(handle)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """Every whole line. The last one may be torn, where a process was killed inside the write: it goes."""
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
    """Tensors of a file of `EvaluationFolder.finish`. Raises OutputError when it is damaged."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (it is no iterable)
    except (SafetensorError, OSError) as error:
        raise OutputError(f"{file} cannot be read ({error}): remove it, and it is generated again.") from error


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return dict(tensors.metadata())
    except (SafetensorError, OSError) as error:
        raise OutputError(f"{file} cannot be read ({error}): remove it, and it is generated again.") from error


def _take_of(line: Mapping[str, Any]) -> Take:
    return Take(line["label"], line["id"], line["seed"])


def _first_difference(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """What two identities differ in, such as "benchmark" or "settings num_steps"; None for nothing."""
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
