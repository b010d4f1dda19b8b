"""Errors for inputs that are no diffusers pipeline: each names the input, and a replacement."""

from collections.abc import Mapping
from pathlib import Path

from tempoquant.errors import ModelError
from tempoquant.models.families import FAMILIES

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_INSTEAD = "give its weights as safetensors in 16 bits or fp8_scaled"


def refuse_file(file: Path) -> None:
    """Raise ModelError for a file of weights that is not read, by its kind."""
    if file.suffix == ".gguf":
        raise ModelError(
            f"{file} is a GGUF file, whose weights are rounded to a few bits already, in a layout that only its own "
            f"readers know: {_INSTEAD}."
        )
    if file.suffix in PICKLES:
        raise ModelError(f"{file} would have to be unpickled, which can run any code: {_INSTEAD}.")
    if file.suffix != ".safetensors":
        raise ModelError(f"{file} is no safetensors file: {_INSTEAD}.")


def file_as_model(file: Path) -> ModelError:
    """Return the error for a file in place of a model."""
    try:
        refuse_file(file)
    except ModelError as error:
        return error
    return ModelError(
        f"{file} is one file of weights, and a pipeline has more: give --base with a diffusers folder or hub id of the "
        f"same model, and --expert DENOISER={file}."
    )


def no_pipeline(folder: Path, hub_id: str | None) -> ModelError:
    """Return the error for a folder without model_index.json, local or of the hub."""
    name = hub_id or str(folder)
    bases = {original: base for family in FAMILIES for original, base in family.diffusers_ids.items()}
    if hub_id in bases:
        return ModelError(f"{hub_id} is the original release, no diffusers pipeline: give {bases[hub_id]}.")
    if parts := _original_parts(folder):
        like = next((base for original, base in bases.items() if original.endswith(f"/{folder.name}")), None)
        base = like or f"the diffusers repository of the same model, such as {next(iter(bases.values()))}"
        denoisers = " ".join(f"--expert {denoiser}={path}" for denoiser, path in parts.items())
        return ModelError(f"{name} is an original release, no diffusers pipeline: give --base {base} and {denoisers}.")
    files = sorted(file for file in folder.iterdir() if file.suffix in (".gguf", ".safetensors", *PICKLES))
    if files:
        return ModelError(f"{name} has no model_index.json, so it is no diffusers pipeline: {file_as_model(files[0])}")
    return ModelError(
        f"{folder / 'model_index.json'} is missing: {name} is not a complete diffusers pipeline. Files of single "
        "denoisers are given with --base and --expert."
    )


def _original_parts(folder: Path) -> Mapping[str, Path]:
    """Return the folders of an original release by the denoisers whose weights they hold."""
    found = (family.original_parts(folder) for family in FAMILIES)
    return next((parts for parts in found if parts), {})
