"""store.json, the index of a sample store, checked strictly because its files may come from
anywhere.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from tempoquant.calibrate.sample import GuidanceBranch
from tempoquant.checkpoint.magnitude_ratios import MagnitudeRatios
from tempoquant.errors import CalibrationError, CheckpointError
from tempoquant.timesteps import NUM_TRAIN_TIMESTEPS
from tempoquant.validation import shorten

FORMAT_VERSION = 1
INDEX_NAME = "store.json"
SAMPLES_FOLDER, TEXTS_FOLDER = "samples", "texts"
BRANCHES: tuple[GuidanceBranch, ...] = get_args(GuidanceBranch)

MAX_SAMPLES = 20_000
MAX_STEPS = NUM_TRAIN_TIMESTEPS
_MAX_TEXT = 2**16  # characters of a prompt
_PROVENANCE = {
    "model",
    "scheduler",
    "settings",
    "seed",
    "compute_dtype",
    "from_latents",
    "prompts",
    "videos",
    "loras",
}
_ENTRY = {"file", "expert", "prompt_id", "timestep", "step_index", "guidance_branch", "texts", "sha256"}


def damaged(what: str) -> CalibrationError:
    """Make the error for content that this TempoQuant would not write; `what` is a sentence without
    its full stop.
    """
    return CalibrationError(f"{what}: record the samples again, or upgrade tempoquant if a newer one wrote them.")


@dataclass(frozen=True)
class SampleEntry:
    """One recorded call, without its tensors.

    Attributes:
        file: safetensors file of the call's own inputs, relative to the store.
        denoiser: the denoiser's name.
        prompt_id, timestep, step_index, guidance_branch: see `CalibrationSample`.
        texts: safetensors file of the inputs shared with other calls, relative to the store; None
            for none.
        sha256: hexadecimal, of `file`.
    """

    file: str
    denoiser: str
    prompt_id: str
    timestep: float
    step_index: int
    guidance_branch: GuidanceBranch
    texts: str | None
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the inverse of `from_dict`."""
        values = asdict(self)
        return {"expert" if name == "denoiser" else name: value for name, value in values.items()}

    @classmethod
    def from_dict(cls, entry: Any) -> "SampleEntry":
        """Check and parse an entry. Raises CalibrationError that names the key."""
        _check_keys(entry, _ENTRY)
        _check_file(entry["file"], SAMPLES_FOLDER)
        if entry["texts"] is not None:
            _check_file(entry["texts"], TEXTS_FOLDER)
        _check_hash(entry["sha256"])
        _check_text("prompt_id", entry["prompt_id"])
        _require(
            isinstance(entry["expert"], str) and entry["expert"].isidentifier(),
            "expert",
            "is the name of a denoiser",
            entry["expert"],
        )
        branch, step, timestep = entry["guidance_branch"], entry["step_index"], entry["timestep"]
        _require(branch in BRANCHES, "guidance_branch", f"is one of {BRANCHES}", branch)
        _require(type(step) is int and 0 <= step < MAX_STEPS, "step_index", f"is one of 0 … {MAX_STEPS - 1}", step)
        _require(_is_timestep(timestep), "timestep", f"lies in 0 … {NUM_TRAIN_TIMESTEPS}", timestep)
        values = {"denoiser" if name == "expert" else name: value for name, value in entry.items()}
        return cls(**{**values, "timestep": float(timestep)})


@dataclass(frozen=True)
class StoreIndex:
    """The content of store.json.

    Attributes:
        provenance: the origin of the samples, see docs/checkpoint.md.
        schedule: all timesteps of each denoiser in the sampling loop, falling; the noisiest
            denoiser first.
        samples: by denoiser (high noise first), step, prompt, guidance branch.
        texts: file of shared inputs to its hexadecimal SHA-256.
        magnitude_ratios: of each denoiser; none for samples from latents, or from a recording of an
            older version.
    """

    provenance: Mapping[str, Any]
    schedule: Mapping[str, tuple[float, ...]]
    samples: tuple[SampleEntry, ...]
    texts: Mapping[str, str]
    magnitude_ratios: Mapping[str, MagnitudeRatios] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the text of store.json: the same for the same content."""
        record = {
            "format_version": FORMAT_VERSION,
            "provenance": dict(self.provenance),
            "schedule": {denoiser: list(timesteps) for denoiser, timesteps in self.schedule.items()},
            "samples": [entry.to_dict() for entry in self.samples],
            "texts": dict(self.texts),
        }
        if self.magnitude_ratios:
            record["magnitude_ratios"] = {name: each.to_dict() for name, each in self.magnitude_ratios.items()}
        return json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, record: Any) -> "StoreIndex":
        """Check and parse a record. Raises CalibrationError that names the key and the remedy."""
        version = record.get("format_version") if isinstance(record, dict) else None
        _require(type(version) is int and version == FORMAT_VERSION, "format_version", f"is {FORMAT_VERSION}", version)
        _check_keys(record, {"format_version", "provenance", "schedule", "samples", "texts"}, {"magnitude_ratios"})
        _check_provenance(record["provenance"])
        samples, texts = record["samples"], record["texts"]
        _require(
            isinstance(samples, list) and len(samples) <= MAX_SAMPLES,
            "samples",
            f"is a list of at most {MAX_SAMPLES}",
            type(samples).__name__,
        )
        _require(isinstance(texts, dict), "texts", "is an object", texts)
        for file, digest in texts.items():
            _check_file(file, TEXTS_FOLDER)
            _check_hash(digest)
        schedule = _schedule(record["schedule"])
        entries = tuple(SampleEntry.from_dict(entry) for entry in samples)
        ratios = _magnitude_ratios(record.get("magnitude_ratios", {}), schedule)
        index = cls(record["provenance"], schedule, entries, texts, ratios)
        index._check_consistent()
        return index

    def _check_consistent(self) -> None:
        """Raise CalibrationError for a sample that refers to content outside the store."""
        known = {prompt["id"] for prompt in self.provenance["prompts"]}
        seen = set()
        for entry in self.samples:
            _require(entry.prompt_id in known, "prompt_id", "is one of the recorded prompts", entry.prompt_id)
            _require(entry.texts is None or entry.texts in self.texts, "texts", "is a listed file", entry.texts)
            _require(entry.file not in seen, "file", "is listed once", entry.file)
            _require(entry.denoiser in self.schedule, "expert", "is a denoiser of the schedule", entry.denoiser)
            timesteps = self.schedule[entry.denoiser]
            _require(entry.timestep in timesteps, "timestep", f"is in the schedule of {entry.denoiser}", entry.timestep)
            seen.add(entry.file)


def _schedule(record: Any) -> dict[str, tuple[float, ...]]:
    _require(isinstance(record, dict) and len(record) > 0, "schedule", "is an object of denoisers", record)
    for key, timesteps in record.items():
        _require(key.isidentifier(), "schedule", "is keyed by names of denoisers", key)
        _require(
            isinstance(timesteps, list)
            and len(timesteps) <= MAX_STEPS
            and all(_is_timestep(timestep) for timestep in timesteps)
            and timesteps == sorted(timesteps, reverse=True),
            key,
            f"is a falling list of timesteps in 0 … {NUM_TRAIN_TIMESTEPS}",
            timesteps,
        )
    return {denoiser: tuple(float(timestep) for timestep in timesteps) for denoiser, timesteps in record.items()}


def _magnitude_ratios(record: Any, schedule: Mapping[str, tuple[float, ...]]) -> dict[str, MagnitudeRatios]:
    _require(
        isinstance(record, dict) and set(record) <= set(schedule),
        "magnitude_ratios",
        "is an object of denoisers",
        record,
    )
    try:
        found = {denoiser: MagnitudeRatios.from_dict(each) for denoiser, each in record.items()}
    except CheckpointError as error:
        raise damaged(f"magnitude_ratios cannot be used ({error})") from error
    for denoiser, ratios in found.items():
        _require(
            schedule[denoiser][: len(ratios.timesteps)] == ratios.timesteps,
            "magnitude_ratios",
            f"are of the first timesteps of {denoiser}",
            list(ratios.timesteps),
        )
    return found


def _check_provenance(record: Any) -> None:
    _check_keys(record, _PROVENANCE)
    _check_keys(record["model"], {"hub_id", "revision", "fingerprint"})
    _check_keys(record["scheduler"], {"class", "flow_shift"})
    _require(isinstance(record["settings"], dict), "settings", "is an object", record["settings"])
    _require(type(record["seed"]) is int, "seed", "is a whole number", record["seed"])
    _require(type(record["from_latents"]) is bool, "from_latents", "is true or false", record["from_latents"])
    _check_text("compute_dtype", record["compute_dtype"])
    _require(isinstance(record["prompts"], list), "prompts", "is a list", record["prompts"])
    for prompt in record["prompts"]:
        _check_keys(prompt, {"id", "prompt", "image_sha256"})
        for key, value in prompt.items():
            _check_text(key, value)
    for key in ("videos", "loras"):
        _require(isinstance(record[key], dict), key, "is an object", record[key])
        for digest in record[key].values():
            _check_hash(digest)


def _check_file(name: Any, folder: str) -> None:
    fits = isinstance(name, str) and re.fullmatch(rf"{folder}/\w[\w-]{{0,200}}\.safetensors", name, re.ASCII)
    _require(bool(fits), "a file", f"is {folder}/NAME.safetensors inside the store", name)


def _check_hash(digest: Any) -> None:
    fits = isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest)
    _require(bool(fits), "a hash", "is 64 hexadecimal digits", digest)


def _check_text(key: str, value: Any) -> None:
    _require(isinstance(value, str) and len(value) <= _MAX_TEXT, key, f"is a text of at most {_MAX_TEXT}", value)


def _is_timestep(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= NUM_TRAIN_TIMESTEPS


def _check_keys(record: Any, wanted: Set[str], optional: Set[str] = frozenset()) -> None:
    _require(isinstance(record, dict), "an entry", "is an object", record)
    odd: Sequence[str] = sorted(wanted ^ (set(record) - optional), key=str)
    if odd:
        raise damaged(f"{shorten(odd[0])} is {'missing' if odd[0] in wanted else 'an unknown key'}")


def _require(condition: bool, key: str, rule: str, value: Any) -> None:
    if not condition:
        raise damaged(f"{key} {rule}, not {shorten(value)}")
