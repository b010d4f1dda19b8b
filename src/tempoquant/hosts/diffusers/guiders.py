"""Pipelines whose guidance is a component, a guider of diffusers, and not an argument of the
call.
"""

from typing import Any

from diffusers import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from diffusers.guiders import BaseGuidance

from tempoquant.errors import ModelError

_TWO_CALLS = (ClassifierFreeGuidance, AdaptiveProjectedGuidance)
"""Guiders that call the denoiser with the prompt, and then without it: no other calls, in no other
order.
"""


def guider_of(pipeline: Any) -> BaseGuidance | None:
    """Return a pipeline's guider; None if its call takes the guidance scale."""
    guider = getattr(pipeline, "guider", None)
    return guider if isinstance(guider, BaseGuidance) else None


def use_guidance_scale(pipeline: Any, scale: float) -> None:
    """Give a pipeline's own guider a scale: 1 + the factor of the difference of its two
    predictions.

    Raises:
        ModelError: it guides by other calls than two, guides some steps only, or defines its scale
            differently.
    """
    guider = guider_of(pipeline)
    assert guider is not None  # callers have asked for one
    name, config = type(guider).__name__, guider.config
    if type(guider) not in _TWO_CALLS:
        raise ModelError(
            f"the pipeline's guider is a {name}, whose calls TempoQuant cannot tell apart: use a "
            "ClassifierFreeGuidance."
        )
    if config.start != 0 or config.stop != 1 or not getattr(config, "enabled", True):
        raise ModelError(
            f"the pipeline's {name} guides some steps only (start {config.start:g}, stop {config.stop:g}): set start "
            "to 0, stop to 1 and enabled to true in guider_config.json, and guidance_scale to 1 for no guidance."
        )
    if config.use_original_formulation:
        raise ModelError(
            f"the pipeline's {name} counts its scale from 0: set use_original_formulation to false in "
            "guider_config.json, and add 1 to guidance_scale."
        )
    if config.guidance_scale != scale:
        pipeline.guider = guider.new(guidance_scale=scale)
