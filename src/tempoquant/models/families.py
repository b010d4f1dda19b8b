"""The model families that TempoQuant knows, found by the class of a pipeline or of a denoiser."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempoquant.errors import ModelError, UnsupportedError
from tempoquant.models.family import ModelFamily, PipelineIndex
from tempoquant.models.ltx2.family import LTX2
from tempoquant.models.wan.family import WAN, WAN_ANIMATE, WAN_VACE
from tempoquant.timesteps import Denoiser

FAMILIES: list[ModelFamily] = [WAN, WAN_VACE, WAN_ANIMATE, LTX2]


def family_of(index: PipelineIndex) -> ModelFamily:
    """Return the family of a pipeline. Raises ModelError for a class that no family covers."""
    for family in FAMILIES:
        if index.class_name in family.pipelines:
            return family
    raise ModelError(
        f"{index.folder} is a {index.class_name}, which no model family covers: supported are {_known()}. "
        "CONTRIBUTING.md says how to add one."
    )


def family_of_denoiser(class_name: str) -> ModelFamily | None:
    """Return the family whose denoisers have a class; None where there is none."""
    return next((family for family in FAMILIES if class_name in family.transformers), None)


@dataclass(frozen=True)
class PipelineFacts:
    """What is known of a pipeline in memory.

    Attributes:
        family: what kind of model it is.
        index: what its model_index.json would say.
        denoisers: the noisiest first.
    """

    family: ModelFamily
    index: PipelineIndex
    denoisers: tuple[Denoiser, ...]

    def denoiser(self, name: str) -> Denoiser:
        """Return a denoiser by its name."""
        return next(each for each in self.denoisers if each.name == name)


def facts_of(pipeline: Any) -> PipelineFacts:
    """Return what is known of a diffusers pipeline in memory.

    Raises:
        UnsupportedError: no family covers its class.
        ModelError: its family cannot run it, for want of a denoiser, say.
    """
    names = [kind.__name__ for kind in type(pipeline).__mro__]
    family = next((each for each in FAMILIES if each.pipelines & {*names}), None)
    if family is None:
        raise UnsupportedError(f"no model family covers a {names[0]}: supported are {_known()}.")
    components = {
        name: (each[0], each[1])
        for name, each in pipeline.config.items()
        if isinstance(each, tuple | list) and len(each) == 2 and getattr(pipeline, name, None) is not None
    }
    class_name = next(name for name in names if name in family.pipelines)
    values = {**pipeline.config, "_class_name": class_name}
    index = PipelineIndex(Path(f"this {class_name}"), values, components)
    return PipelineFacts(family, index, family.denoisers(index))


def _known() -> str:
    return ", ".join(sorted(name for family in FAMILIES for name in family.pipelines))
