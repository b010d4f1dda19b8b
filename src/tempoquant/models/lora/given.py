"""LoRA files as users name them for a denoiser, each with a strength; and the sampling of the
result.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tempoquant.errors import ModelError, RecipeError, SettingsError
from tempoquant.models.family import ModelFamily
from tempoquant.models.lora.lora import Lora, LoraSum
from tempoquant.models.source import SourceModel
from tempoquant.tiny import LORA_NAME, lora_file

_logger = logging.getLogger(__name__)

LoraFile: TypeAlias = str | Path | tuple[str | Path, float]
"""A file (or `tiny-4steps`, the bundled pair's name), or a file and its strength."""

LoraFiles: TypeAlias = LoraFile | Sequence[LoraFile]
"""The files of one denoiser."""

_SAMPLER = ("num_steps", "guidance_scale", "flow_shift")


def with_loras(source: SourceModel, lora: Mapping[str, LoraFiles]) -> SourceModel:
    """Return a 16-bit pipeline whose weights hold LoRAs wherever they are read: the reference of a
    result.

    Raises as `load_loras`, and ModelError for a denoiser that is quantized.
    """
    for name in lora:
        if name in source.denoiser_names:
            source.component_of(name).require_16_bit()
    return dataclasses.replace(source, loras=load_loras(source, lora))


def load_loras(source: SourceModel, lora: Mapping[str, LoraFiles]) -> dict[str, LoraSum]:
    """Return the LoRAs of each denoiser by its name.

    Raises:
        RecipeError: a denoiser is unknown, or a file named twice for one.
        ModelError: a LoRA cannot be read, does not fit the denoiser, or is the bundled one of
            another model.
    """
    loras = {}
    for name, files in lora.items():
        if name not in source.denoiser_names:
            raise RecipeError(f"a LoRA belongs to {' or '.join(source.denoiser_names)}, not {name!r}.")
        given = [(_place_of(file, source, name), strength) for file, strength in _one_by_one(files)]
        for file, _ in given:
            if sum(file == other for other, _ in given) > 1:
                raise RecipeError(f"{file} is given twice for {name}: give it once, with the sum of the strengths.")
        if given:
            loras[name] = LoraSum(
                tuple(Lora.load(file, source.family, strength, source.denoisers, name) for file, strength in given)
            )
            loras[name].check_fits({key: form.shape for key, (_, form) in source.forms(name).items()})
    _warn_of_halves(loras)
    return loras


def _place_of(file: str | Path, source: SourceModel, denoiser: str) -> Path:
    """Return the location of a LoRA: one of the bundled pair, or a file."""
    if str(file) != LORA_NAME or Path(file).is_file():
        return Path(file).absolute()
    if source.bundled != "tiny":
        raise ModelError(f"the LoRAs {LORA_NAME} were distilled from tiny and fit no other model: give a file.")
    return lora_file(denoiser)


def _warn_of_halves(loras: Mapping[str, LoraSum]) -> None:
    """Log which files also hold LoRAs of other denoisers, for which they were not given."""
    for name, given in loras.items():
        for lora in given.loras:
            for other in lora.others:
                if other not in loras or all(lora.file != each.file for each in loras[other].loras):
                    _logger.warning("%s holds a LoRA of %s, too: given as %s, that is left out", lora.file, other, name)


def sampler_with(family: ModelFamily, loras: Mapping[str, LoraSum], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes of the model's own sampling.

    LoRAs that state the number of steps they were distilled for (`stated_steps`) change it to
    theirs; others do not.

    Args:
        asked: settings of the user or the recipe; None for unset ones.

    Returns:
        The given settings, with the distilled sampler's num_steps, guidance_scale and flow_shift
        for unset ones, if there is such a sampler.

    Raises:
        SettingsError: the LoRAs state different numbers of steps, and none was given.
    """
    given = {key: value for key, value in asked.items() if value is not None}
    stated = sorted(set().union(*(lora.num_steps for lora in loras.values())))
    if not stated:
        return given
    if len(stated) > 1 and "num_steps" not in given:
        raise SettingsError(
            f"the LoRAs are for different numbers of steps ({' and '.join(map(str, stated))}): say which with --steps."
        )
    return {"num_steps": stated[0], **family.distilled, **given}


def sampler_words(sampler: Mapping[str, Any]) -> str:
    """Describe the sampling of a model with LoRAs; `sampler` is from `sampler_with`."""
    changed = [f"{key} {sampler[key]:g}" for key in _SAMPLER if key in sampler]
    if changed:
        return ", ".join(changed)
    return (
        "the model's own steps and guidance (no LoRA's name says for how many steps it is, as 4steps does; "
        "one that was distilled wants --steps 4 --guidance-scale 1)"
    )


def _one_by_one(files: LoraFiles) -> list[tuple[str | Path, float]]:
    if isinstance(files, str | Path):
        return [(files, 1.0)]
    if isinstance(files, tuple) and len(files) == 2 and isinstance(files[1], int | float):
        return [(files[0], float(files[1]))]  # type: ignore[arg-type]
    return [pair for file in files for pair in _one_by_one(file)]  # type: ignore[arg-type]
