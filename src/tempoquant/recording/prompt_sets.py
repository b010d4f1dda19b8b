"""The prompts for calibration and evaluation: the user's own, or the bundled models' built-in
sets.
"""

from collections.abc import Callable, Iterable

from tempoquant.errors import CalibrationError
from tempoquant.models.pipeline_folder import BUNDLED_MODELS
from tempoquant.prompts import Prompt, load_prompts
from tempoquant.tiny.sets import TinyItem, calibration_items, evaluation_items


def calibration_prompts(model: str, path: str | None, count: int) -> list[Prompt]:
    """Return the first `count` prompts of a file or folder, or of the built-in set of a bundled
    model.

    Raises:
        CalibrationError: no set is known for the model, or it has too few prompts.
    """
    return _prompts(model, path, count, calibration_items, "--calibration")


def evaluation_prompts(model: str, path: str | None, count: int) -> list[Prompt]:
    """Return the first `count` prompts of a set that shares nothing with calibration's; see
    `calibration_prompts`.
    """
    return _prompts(model, path, count, evaluation_items, "--samples-from")


def _prompts(
    model: str, path: str | None, count: int, builtin: Callable[[int], Iterable[TinyItem]], flag: str
) -> list[Prompt]:
    if path is not None:
        prompts = load_prompts(path)
        if len(prompts) < count:
            raise CalibrationError(
                f"{path} holds {len(prompts)} prompts, {count} are wanted: add some or ask for fewer."
            )
        return prompts[:count]
    if str(model) not in BUNDLED_MODELS:
        raise CalibrationError(f"{model} has no built-in prompts: give a jsonl of {{prompt, image}} with {flag}.")
    return [Prompt(item.id, item.image, item.prompt) for item in builtin(count)]
