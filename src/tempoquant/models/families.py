"""The model families that TempoQuant knows, found by the class of a pipeline or of a denoiser."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempoquant.errors import ModelError, UnsupportedError
from tempoquant.models.family import ModelFamily, PipelineIndex
from tempoquant.models.generic.family import family_in, stored_family
from tempoquant.models.hunyuan_video15.family import HUNYUAN_VIDEO15, HUNYUAN_VIDEO15_I2V
from tempoquant.models.ltx2.family import LTX2
from tempoquant.models.minimax_h3.family import MINIMAX_H3
from tempoquant.models.wan.family import WAN, WAN_ANIMATE, WAN_VACE
from tempoquant.timesteps import Denoiser

FAMILIES: list[ModelFamily] = [
    WAN,
    WAN_VACE,
    WAN_ANIMATE,
    LTX2,
    HUNYUAN_VIDEO15,
    HUNYUAN_VIDEO15_I2V,
    MINIMAX_H3,
]


def family_of(index: PipelineIndex) -> ModelFamily:
    """Return the family of a pipeline: the one that a quantized folder stores, or the one that
    covers its class.

    Raises ModelError for a class that no family covers.
    """
    kept = stored_family(index)  # the family that the folder was quantized by
    family = kept or next((each for each in FAMILIES if index.class_name in each.pipelines), None)
    if family is not None:
        return family
    raise ModelError(
        f"{index.folder} is a {index.class_name}, which no model family covers: supported are {_known()}. "
        "--family generic may run it, and CONTRIBUTING.md says how to add a family."
    )


def family_of_denoiser(class_name: str) -> ModelFamily | None:
    """Return the family whose denoisers have a class; None for none."""
    return next((family for family in FAMILIES if class_name in family.transformers), None)


@dataclass(frozen=True)
class PipelineFacts:
    """The facts about a pipeline in memory.

    Attributes:
        family: its kind of model.
        index: the content of its model_index.json.
        denoisers: the noisiest first.
    """

    family: ModelFamily
    index: PipelineIndex
    denoisers: tuple[Denoiser, ...]

    def denoiser(self, name: str) -> Denoiser:
        """Return a denoiser by its name."""
        return next(each for each in self.denoisers if each.name == name)


def facts_of(pipeline: Any) -> PipelineFacts:
    """Return the facts about a diffusers pipeline in memory.

    Raises:
        UnsupportedError: no family covers its class.
        ModelError: its family cannot run it, for example without a denoiser.
    """
    names = [kind.__name__ for kind in type(pipeline).__mro__]
    family = _family_of(pipeline) or next((each for each in FAMILIES if each.pipelines & {*names}), None)
    if family is None:
        raise UnsupportedError(f"no model family covers a {names[0]}: supported are {_known()}.")
    components = {
        name: (each[0], each[1])
        for name, each in pipeline.config.items()
        if isinstance(each, tuple | list) and len(each) in (2, 3) and getattr(pipeline, name, None) is not None
    }
    class_name = next(name for name in names if name in family.pipelines)
    values = {**pipeline.config, "_class_name": class_name}
    index = PipelineIndex(Path(f"this {class_name}"), values, components)
    return PipelineFacts(family, index, family.denoisers(index))


def remember_family(pipeline: Any, family: ModelFamily) -> None:
    """Record the family by which a pipeline was opened, for `facts_of`."""
    pipeline._tempoquant_family = family


def _family_of(pipeline: Any) -> ModelFamily | None:
    """Return the family that a pipeline was opened by, or that one of its models' configs
    stores.
    """
    if (family := getattr(pipeline, "_tempoquant_family", None)) is not None:
        return family  # type: ignore[no-any-return]
    configs = (getattr(each, "config", None) for each in getattr(pipeline, "components", {}).values())
    kept = (family_in(config, "its config") for config in configs if isinstance(config, Mapping))
    return next((family for family in kept if family is not None), None)


def _known() -> str:
    return ", ".join(sorted(name for family in FAMILIES for name in family.pipelines))
