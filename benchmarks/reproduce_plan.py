"""The commands of `python -m benchmarks.reproduce`: the published protocol, and its counterpart for
a laptop.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from tempoquant.models.pipeline_folder import BUNDLED_MODELS
from tempoquant.placement.modes import WHILE_RECORDING, Memory

PUBLISHED_MODEL = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
REFERENCE_RECIPE, OUR_RECIPE, FLOOR = "paper", "ours", "rtn"
"""The folders of the quantized models, which are also their labels in the evaluation."""


@dataclass(frozen=True)
class Protocol:
    """The sampling of videos, and the number of items.

    Attributes:
        sampling: options of `record` and `evaluate`.
        seed: of every generation.
        num_calibrated: items that calibrate, and are not evaluated.
        limit: items that are evaluated; None for all.
        recipes: options of `quantize` by folder.
    """

    sampling: tuple[str, ...]
    seed: int
    num_calibrated: int
    limit: int | None
    recipes: dict[str, tuple[str, ...]]


PUBLISHED = Protocol(
    ("--size", "480x832", "--frames", "61", "--steps", "40", "--flow-shift", "5", "--guidance-scale", "3.5"),
    seed=42,
    num_calibrated=12,
    limit=None,
    recipes={REFERENCE_RECIPE: ("--recipe", "paper"), OUR_RECIPE: ("--recipe", "default"), FLOOR: ("--recipe", "rtn")},
)
BUNDLED = Protocol(
    ("--size", "64x64", "--frames", "5", "--steps", "4", "--flow-shift", "5", "--guidance-scale", "3.5"),
    seed=42,
    num_calibrated=2,
    limit=2,
    recipes={
        REFERENCE_RECIPE: ("--recipe", "paper", "--rank", "2"),
        OUR_RECIPE: ("--recipe", "tiny"),
        FLOOR: ("--recipe", "rtn"),
    },
)
"""Rank 2 has the share of the bundled models' width that rank 32 has of 5120."""


def protocol_of(model: str) -> Protocol:
    """Return the published protocol, or for a bundled model its small counterpart: nothing else
    differs.
    """
    return BUNDLED if model in BUNDLED_MODELS else PUBLISHED


@dataclass(frozen=True)
class Chain:
    """The request.

    Attributes:
        model: a folder, a hub id, or a bundled model.
        opens2v: folder of OpenS2V-Eval; None takes the bundled model's own sets.
        work: folder for everything.
        vbench: options of `evaluate` that VBench needs; none leaves it out.
        place: options of `record`, `quantize` and `evaluate` for devices or machines.
        memory: as the commands take it; None for their default.
        limit: items to evaluate; None takes the protocol's.
        with_floor: whether to quantize also by rounding to nearest.
    """

    model: str
    opens2v: Path | None
    work: Path
    vbench: tuple[str, ...] = ()
    place: tuple[str, ...] = ()
    memory: Memory | None = None
    limit: int | None = None
    with_floor: bool = False

    @property
    def calibration(self) -> Path:
        """Return the prompts that calibrate, if they come from OpenS2V-Eval."""
        return self.work / "calibration.jsonl"

    @property
    def evaluation(self) -> Path:
        """Return the folder of `evaluate`."""
        return self.work / "evaluation"

    @property
    def protocol(self) -> Protocol:
        """Return the model's protocol."""
        return protocol_of(self.model)

    @property
    def labels(self) -> list[str]:
        """Return the labels of the quantized models."""
        return [label for label in self.protocol.recipes if label != FLOOR or self.with_floor]

    def commands(self) -> list[list[str]]:
        """Return all commands in order; each one resumes after an interruption."""
        return [["doctor"], *self._plans(), self._record(), *self._quantize(), self._evaluate(), self._report()]

    def _plans(self) -> list[list[str]]:
        recipes = [self.protocol.recipes[label][:2] for label in self.labels]
        return [["plan", self.model, *self.protocol.sampling[:4], *recipe] for recipe in recipes]

    def _record(self) -> list[str]:
        prompts = [] if self.opens2v is None else ["--calibration", str(self.calibration)]
        return [
            "record",
            self.model,
            "-o",
            self._path("samples"),
            *prompts,
            "--prompts",
            str(self.protocol.num_calibrated),
            *self.protocol.sampling,
            *self.place,
            *self._memory(WHILE_RECORDING),
        ]

    def _quantize(self) -> list[list[str]]:
        commands = []
        for label in self.labels:
            store = [] if label == FLOOR else ["--store", self._path("samples")]  # rounding to nearest reads none
            options = [*self.protocol.recipes[label], *store, "--link", *self.place]
            commands.append(["quantize", self.model, "-o", self._path(label), *options])
        return commands

    def _evaluate(self) -> list[str]:
        benchmark = ["tiny"] if self.opens2v is None else ["opens2v", "--root", str(self.opens2v)]
        limit = self.limit or self.protocol.limit
        return [
            "evaluate",
            self.model,
            *map(self._path, self.labels),
            "--benchmark",
            *benchmark,
            "--exclude-overlap",
            *([] if limit is None else ["--limit", str(limit)]),
            *self.protocol.sampling,
            "--seeds",
            str(self.protocol.seed),
            *self.place,
            *self._memory(),
            *self.vbench,
            "-o",
            str(self.evaluation),
        ]

    def _report(self) -> list[str]:
        return ["report", str(self.evaluation), "-o", self._path("report.html")]

    def _path(self, name: str) -> str:
        return str(self.work / name)

    def _memory(self, renamed: Mapping[Memory, str] = MappingProxyType({})) -> list[str]:
        return [] if self.memory is None else ["--memory", renamed.get(self.memory, self.memory)]
