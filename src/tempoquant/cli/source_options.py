"""The options `--base` and `--expert`: a pipeline with separate files for its denoisers'
weights.
"""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tempoquant.models.with_experts import ModelName

Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="In place of MODEL, with --expert: gives everything but the weights of --expert (docs/sources.md).",
    ),
]
Denoisers = Annotated[
    list[str] | None,
    typer.Option(
        "--expert",
        metavar="DENOISER=FILE|FOLDER",
        help="With --base: safetensors of a denoiser, 16-bit or fp8_scaled, such as ComfyUI's.",
    ),
]


class FamilyName(str, Enum):
    """The values of --family."""

    GENERIC = "generic"


Family = Annotated[
    FamilyName | None,
    typer.Option(
        help="generic: observe the pipeline instead of using a known model family (docs/models.md).",
    ),
]


def model_of(
    model: str | None,
    base: str | None,
    denoisers: list[str] | None,
    called: str = "MODEL",
    family: FamilyName | None = None,
) -> "ModelName":
    """Return the model that a command line names: a model by itself, or a base and files of its
    denoisers.

    Args:
        called: the name of the argument for a model by itself.
        family: "generic", or None for the family that covers the pipeline.

    Raises:
        typer.BadParameter: neither or both are named, an option lacks the other, or a text is no
            DENOISER=FILE.
    """
    if base is None:
        if denoisers:
            raise _wrong("gives weights alone: name their pipeline with --base.")
        if model is None:
            raise typer.BadParameter("name a model, or give --base and --expert.", param_hint=f"'{called}'")
        if family is not None:
            from tempoquant.models.with_experts import GenericModel

            return GenericModel(model)
        return model
    if family is not None:
        raise typer.BadParameter("goes with a whole model, not with --base.", param_hint="'--family'")
    if model is not None:
        raise typer.BadParameter(f"replaces {called}: leave {model} out.", param_hint="'--base'")
    if not denoisers:
        raise typer.BadParameter(f"goes with --expert: give the model alone as {called}.", param_hint="'--base'")
    from tempoquant.models.with_experts import WithExperts

    files: dict[str, str | Path] = {}
    for text in denoisers:
        name, _, path = text.partition("=")
        if not name.isidentifier() or not path:
            raise _wrong(f"{text!r} is not DENOISER=FILE or DENOISER=FOLDER.")
        if name in files:
            raise _wrong(f"{name} is given twice: {files[name]} and {path}.")
        files[name] = path
    return WithExperts(base, files)


def reference_and_folders(
    names: list[str], base: str | None, denoisers: list[str] | None, family: FamilyName | None = None
) -> tuple["ModelName", list[str]]:
    """Parse a command's arguments: a reference, unless --base is one, and folders or hub ids of
    quantized pipelines.

    Raises typer.BadParameter as `model_of`, and for no folder.
    """
    reference = None if base is not None or not names else names[0]
    folders = names if base is not None else names[1:]
    model = model_of(reference, base, denoisers, "REFERENCE", family)
    if not folders:
        raise typer.BadParameter("name a quantized pipeline.", param_hint="'DIR'")
    return model, folders


def places_of(model: str) -> tuple[str, str]:
    """Return the last two names of a model's folder, with links followed, or of its hub id."""
    from tempoquant.models.hub import is_hub_id, split_revision

    path = Path(model)
    if not path.exists() and is_hub_id(model):
        hub_id, revision = split_revision(model)
        parent, name = hub_id.split("/")
        return parent, name if revision is None else f"{name}@{revision}"
    return path.resolve().parent.name, path.resolve().name


def _wrong(words: str) -> typer.BadParameter:
    return typer.BadParameter(words, param_hint="'--expert'")
