"""A check, before anything runs, that prompts hold the conditions of a pipeline."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tempoquant.errors import CalibrationError, SettingsError
from tempoquant.models.source import SourceModel

IMAGE = "image"
_WORDS = {IMAGE: "an image", "pose": "a pose clip", "face": "a face clip"}


class Conditioned(Protocol):
    """A `Prompt`, or an item of a benchmark."""

    @property
    def id(self) -> str: ...

    @property
    def image(self) -> Any: ...

    @property
    def clips(self) -> Mapping[str, Path]: ...


def lacking(source: SourceModel, prompt: Conditioned) -> str | None:
    """Return in words the input that a pipeline needs and a prompt lacks, such as "an image"; None
    for none.
    """
    for name in source.family.needs(source.index):
        if (prompt.image is None) if name == IMAGE else (name not in prompt.clips):
            return _WORDS[name]
    return None


def require_needed(source: SourceModel, prompts: Iterable[Conditioned]) -> None:
    """Raise CalibrationError for a prompt that lacks an input of the pipeline."""
    for prompt in prompts:
        if (missing := lacking(source, prompt)) is not None:
            raise CalibrationError(
                f"a {source.index.class_name} needs {missing}, which prompt {prompt.id!r} lacks: give prompts with one."
            )


def require_texts_alone(source: SourceModel, prompts: Iterable[Conditioned]) -> None:
    """Raise SettingsError for a prompt whose text cannot be encoded without its image."""
    if source.family.text_sees_image and (seen := next((each for each in prompts if each.image is not None), None)):
        raise SettingsError(
            f"the text encoder of a {source.index.class_name} looks at the image of prompt {seen.id!r}, and "
            "memory disk encodes texts alone: choose resident, or give prompts without images."
        )


def require_given(source: SourceModel, prompt: Conditioned) -> None:
    """Check the user's inputs for one video against those of the pipeline.

    Raises:
        CalibrationError: an input of the pipeline is missing, the pipeline does not take a given
            one, or there is no such clip.
    """
    name, needed = source.index.class_name, source.family.needs(source.index)
    if (missing := lacking(source, prompt)) is not None:
        flags = " and ".join(f"--{each}" for each in needed)
        raise CalibrationError(f"a {name} needs {missing}: give {flags}.")
    if prompt.image is not None and not source.family.takes_image(source.index):
        raise CalibrationError(f"a {name} takes no image: leave --image out.")
    for clip, path in prompt.clips.items():
        if clip not in needed:
            raise CalibrationError(f"a {name} takes no {clip} clip: leave --{clip} out.")
        if not path.exists():
            raise CalibrationError(f"there is no {clip} clip {path}.")
