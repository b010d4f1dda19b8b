"""VBench beside the measures of this package: requested, and checked before anything is generated.

VBench needs libraries far older than this package's. It runs in its own environment (`make
vbench-env`), as a process that reads videos and answers with numbers (`vbench/runner.py`), and is
never imported.
"""

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from tempoquant.errors import EvaluationError, SettingsError
from tempoquant.evaluate.vbench.dimensions import DEFAULT, DIMENSIONS, Weight
from tempoquant.progress import SILENT, Progress

HOW_TO_INSTALL = "`make vbench-env` makes such an environment, .venv-vbench/bin/python"
_CHUNK = 2**22


def default_cache() -> Path:
    """Return VBench's folder of weights: $VBENCH_CACHE_DIR, or ~/.cache/vbench."""
    return Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")


@dataclass(frozen=True)
class VBenchSettings:
    """The request to VBench.

    Attributes:
        python: interpreter of an environment that holds VBench.
        dimensions: VBench's names.
        cache: the folder of its weights.
    """

    python: Path
    dimensions: Sequence[str] = DEFAULT
    cache: Path = field(default_factory=default_cache)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.dimensions if name not in DIMENSIONS]:
            raise SettingsError(
                f"VBench's dimension {unknown[0]!r} cannot be scored here: choose among {', '.join(DIMENSIONS)}."
            )
        if not self.dimensions or len(set(self.dimensions)) < len(self.dimensions):
            raise SettingsError(f"give one or more different VBench dimensions, not {list(self.dimensions)}.")

    def without_images(self) -> "VBenchSettings":
        """Return the same without dimensions that compare with a given image. Raises SettingsError
        if none is left.
        """
        left = tuple(name for name in self.dimensions if not DIMENSIONS[name].of_image)
        if not left:
            raise SettingsError(
                f"{' and '.join(self.dimensions)} of VBench compare a video with the image that it begins with, and no "
                "item has one: ask for other dimensions with --vbench-dimensions."
            )
        return replace(self, dimensions=left)


@dataclass(frozen=True)
class VBench:
    """A checked environment with weights.

    Attributes:
        settings: the request.
        versions: of "vbench", "torch" and "python" there.
        device: "cuda" or "cpu".
        environment: variables of its processes.
        weights: SHA-256 of the files that a dimension reads, by dimension and path.
    """

    settings: VBenchSettings
    versions: Mapping[str, str]
    device: str
    environment: Mapping[str, str]
    weights: Mapping[str, Mapping[str, str]]

    def made_with(self, dimension: str) -> str:
        """Return a short name of the version and weights behind a score: scores of different ones
        are not mixed.
        """
        text = json.dumps([self.versions["vbench"], self.weights[dimension]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_vbench(settings: VBenchSettings, device: str, progress: Progress = SILENT) -> VBench:
    """Check that VBench can score all dimensions without downloading anything.

    Args:
        device: where videos are generated; VBench runs on that GPU if it is one and VBench's torch
            sees it.

    Raises:
        EvaluationError: the interpreter, VBench, code or weights are missing; the message lists all
            of them.
    """
    missing = {name: _missing(name, settings.cache) for name in settings.dimensions}
    # VBench downloads missing files, already when the code of some dimensions is imported.
    complete = [name for name in settings.dimensions if not missing[name]]
    environment = runner_environment(settings, device)
    found = _ask(settings, complete, environment)
    problems = [
        f"{name} cannot be imported there ({why}): {HOW_TO_INSTALL}" for name, why in found["dimensions"].items()
    ]
    runs_on = "cuda" if found["cuda"] and not device.startswith("cpu") else "cpu"
    if runs_on == "cpu":
        problems += [
            f"{name} needs a GPU and there is none: leave it out with --vbench-dimensions"
            for name in settings.dimensions
            if DIMENSIONS[name].needs_cuda
        ]
    by_place: dict[Path, tuple[Weight, list[str]]] = {}
    for name, weights in missing.items():
        for weight in weights:
            by_place.setdefault(weight.place(settings.cache), (weight, []))[1].append(name)
    problems += [
        f"{place} is not there, for {', '.join(names)}: it comes from {weight.source}"
        for place, (weight, names) in by_place.items()
    ]
    if problems:
        raise EvaluationError("VBench cannot run, and nothing was generated:\n" + "\n".join(f"- {p}" for p in problems))
    versions = {name: found[name] for name in ("vbench", "torch", "python")}
    return VBench(settings, versions, runs_on, environment, _digests(settings, progress))


def runner_command(settings: VBenchSettings, *arguments: str) -> list[str]:
    """Return the command that calls VBench. With -I, neither this package's folder nor PYTHONPATH
    hides its libraries.
    """
    # Not resolved: an environment's interpreter is a link to one that does not know the
    # environment.
    return [os.path.abspath(settings.python), "-I", str(files("tempoquant.evaluate.vbench") / "runner.py"), *arguments]


def runner_environment(settings: VBenchSettings, device: str) -> dict[str, str]:
    """Return the environment variables of that program: of a device such as "cuda:1" it sees only
    that one, since VBench knows no other name than "cuda".
    """
    visible = {}
    if number := re.match(r"cuda:(\d+)", device):
        names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        visible["CUDA_VISIBLE_DEVICES"] = names[int(number[1])] if names else number[1]
    return {
        **os.environ,
        **visible,
        "VBENCH_CACHE_DIR": str(settings.cache.resolve()),
        "HF_HUB_OFFLINE": "1",
        # VBench was written when torch.load read any pickle, and some of its weights need that
        # (amt-s.pth).
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
    }


def _ask(settings: VBenchSettings, dimensions: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Run the runner's `check` and return its answer. Raises EvaluationError if it gives none, or
    if VBench is missing.
    """
    if not (settings.python.is_file() and os.access(settings.python, os.X_OK)):
        raise EvaluationError(f"{settings.python} is no interpreter that could run VBench: {HOW_TO_INSTALL}.")
    try:
        done = subprocess.run(
            runner_command(settings, "check", *dimensions),
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        found = json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{settings.python} does not run as Python ({error}): {HOW_TO_INSTALL}.") from error
    if not isinstance(found, dict):
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise EvaluationError(f"{settings.python} does not run as Python ({reason}): {HOW_TO_INSTALL}.")
    if "why" in found:
        raise EvaluationError(f"{settings.python} cannot import VBench ({found['why']}): {HOW_TO_INSTALL}.")
    return found


def _missing(dimension: str, cache: Path) -> list[Weight]:
    return [weight for weight in DIMENSIONS[dimension].weights if not _is_there(weight.place(cache))]


def _is_there(place: Path) -> bool:
    return place.is_file() or (place.is_dir() and any(place.iterdir()))


def _digests(settings: VBenchSettings, progress: Progress) -> dict[str, dict[str, str]]:
    weights = {weight for name in settings.dimensions for weight in DIMENSIONS[name].weights}
    on_digest = progress.start("VBench: reading weights", len(weights))
    digests = {}
    for weight in weights:
        digests[weight] = sha256(weight.place(settings.cache))
        on_digest()
    return {name: {weight.path: digests[weight] for weight in DIMENSIONS[name].weights} for name in settings.dimensions}


def sha256(place: Path) -> str:
    """Return the SHA-256 of a file; of a folder, that of its files' names and digests, without
    hidden files and Python's caches.
    """
    if place.is_dir():
        inside = [file for file in sorted(place.rglob("*")) if file.is_file() and not _is_made(file.relative_to(place))]
        lines = [f"{sha256(file)}  {file.relative_to(place).as_posix()}\n" for file in inside]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    digest = hashlib.sha256()
    with place.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _is_made(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)
