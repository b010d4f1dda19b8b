"""LoRA files as people name them for an expert: one or several, each with a strength; and how a result then samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tempoquant.errors import RecipeError, SettingsError
from tempoquant.integrations.expert_weights import expert_forms
from tempoquant.integrations.lora import Lora, LoraSum
from tempoquant.timesteps import Expert

LoraFile: TypeAlias = str | Path | tuple[str | Path, float]
"""A file, or a file and what it is multiplied by."""

LoraFiles: TypeAlias = LoraFile | Sequence[LoraFile]
"""Those of one expert."""

DISTILLED: Mapping[str, Any] = {"guidance_scale": 1.0, "flow_shift": 5.0}
"""How LoRAs that distil Wan2.2 to a few steps sample, beside the number of steps: without guidance."""


def load_loras(source: Path, lora: Mapping[str, LoraFiles]) -> dict[Expert, LoraSum]:
    """The LoRAs of each expert by its name.

    Raises:
        RecipeError: an expert is unknown, or a file named twice for one.
        ModelError: a LoRA cannot be read, or does not fit the expert.
    """
    loras = {}
    for name, files in lora.items():
        if name not in {expert.value for expert in Expert}:
            raise RecipeError(f"a LoRA belongs to high_noise or low_noise, not {name!r}.")
        given = [(Path(file).absolute(), strength) for file, strength in _one_by_one(files)]
        for file, _ in given:
            if sum(file == other for other, _ in given) > 1:
                raise RecipeError(f"{file} is given twice for {name}: give it once, with the sum of the strengths.")
        if given:
            loras[Expert(name)] = LoraSum(tuple(Lora.load(file, strength) for file, strength in given))
            forms = {key: form.shape for key, (_, form) in expert_forms(source, Expert(name)).items()}
            loras[Expert(name)].check_fits(forms)
    return loras


def sampler_with(loras: Mapping[Expert, LoraSum], asked: Mapping[str, Any]) -> dict[str, Any]:
    """What is changed of the model's own sampling.

    LoRAs that say for how many steps they were distilled (`stated_steps`) change it to theirs; others do not.

    Args:
        asked: settings as the user or the recipe says; None where none does.

    Returns:
        What was asked, with the distilled sampler's num_steps, guidance_scale and flow_shift in the places that nobody
        decided, if there is one.

    Raises:
        SettingsError: the LoRAs say different numbers of steps, and nobody decided.
    """
    given = {key: value for key, value in asked.items() if value is not None}
    stated = sorted(set().union(*(lora.num_steps for lora in loras.values())))
    if not stated:
        return given
    if len(stated) > 1 and "num_steps" not in given:
        raise SettingsError(
            f"the LoRAs are for different numbers of steps ({' and '.join(map(str, stated))}): say which with --steps."
        )
    return {"num_steps": stated[0], **DISTILLED, **given}


def sampler_words(sampler: Mapping[str, Any]) -> str:
    """How a model with LoRAs is sampled, for people; `sampler` is from `sampler_with`."""
    changed = [f"{key} {sampler[key]:g}" for key in ("num_steps", *DISTILLED) if key in sampler]
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
