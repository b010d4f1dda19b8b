"""The option `--lora`: the LoRA files to fuse into each denoiser, and their strengths."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

_FORM = "DENOISER=FILE, or several such as DENOISER=FILE:0.8,FILE; denoisers are named as in `tempoquant inspect`"

Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="EXPERT=FILE[:STRENGTH],…",
        help="LoRA files to fuse into a denoiser, each with a strength (default 1). tiny-4steps is bundled.",
    ),
]
ReferenceLoras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="EXPERT=FILE[:STRENGTH],…",
        help="LoRA files to fuse into the reference, as into the quantized model; sampling follows them.",
    ),
]


def parse_loras(texts: list[str] | None) -> dict[str, list[tuple[Path, float]]]:
    """Read texts such as "high_noise=a.safetensors:0.8,b.safetensors": denoiser to files and
    strengths, in order.

    A path may hold commas and colons, as long as only one reading names existing files.
    `tiny-4steps` names the bundled pair, which has a file for each denoiser.

    Raises:
        typer.BadParameter: no denoiser is named, a file that is missing, a text that can be read in
            two ways.
    """
    loras: dict[str, list[tuple[Path, float]]] = {}
    for text in texts or []:
        denoiser, _, files = text.partition("=")
        if not denoiser.isidentifier() or not files:
            raise _wrong(f"{text!r} is not {_FORM}.")
        if "" in files.split(","):
            raise _wrong(f"{text!r} has a comma with no file beside it.")
        readings = list(_readings(files))
        if not readings:
            raise _wrong(f"there is no LoRA file {_first_missing(files)}.")
        if len(readings) > 1:
            ways = " or ".join(" and ".join(f"{file} (strength {s:g})" for file, s in way) for way in readings[:2])
            raise _wrong(f"{files!r} can be read as {ways}: rename a file, or give each a --lora of its own.")
        loras.setdefault(denoiser, []).extend(readings[0])
    return loras


def _readings(text: str) -> Iterator[list[tuple[Path, float]]]:
    """Yield every reading of a text as existing files with their strengths."""
    parts = text.split(",")
    for count in range(1, len(parts) + 1):
        rest = ",".join(parts[count:])
        for first in _one(",".join(parts[:count])):
            if count == len(parts):
                yield [first]
            else:
                yield from ([first, *others] for others in _readings(rest))


def _one(text: str) -> Iterator[tuple[Path, float]]:
    if _is_there(text):
        yield Path(text), 1.0
    file, _, strength = text.rpartition(":")
    if file and (value := _number(strength)) is not None and _is_there(file):
        yield Path(file), value


def _is_there(text: str) -> bool:
    from tempoquant.tiny import LORA_NAME

    return text == LORA_NAME or Path(text).is_file()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _first_missing(text: str) -> str:
    return next(part for part in text.split(",") if not list(_one(part)))


def _wrong(words: str) -> typer.BadParameter:
    return typer.BadParameter(words, param_hint="'--lora'")
