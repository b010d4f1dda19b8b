"""The sampling of a pipeline: from `sampling.json`, or from the denoisers' configs, or from its
family.

diffusers' `save_pretrained` does not know our file, but keeps the content of a component's config.
So a 4-bit denoiser takes the settings along as it is loaded, and a saved pipeline still samples in
four steps, if it did before.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tempoquant.errors import ModelError, SettingsError
from tempoquant.models.lora.given import sampler_with
from tempoquant.models.pipeline_folder import index_file
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.schedule import flow_shift_of, load_scheduler
from tempoquant.models.source import SourceModel

_logger = logging.getLogger(__name__)

SAMPLING_FILE = "sampling.json"
_FALLBACKS = ("height", "width", "num_frames", "num_steps", "guidance_scale", "flow_shift")
_CONFIG_KEY = "_sampling"
"""The key in the denoisers' config.json; diffusers keeps keys that begin with an underscore,
without a warning.
"""


def take_sampling_along(model: Any, component: Path) -> None:
    """Copy the content of `sampling.json` beside a component's folder into the model's config, if
    there is one.

    Raises:
        ModelError: the file is not a JSON object.
    """
    folder = component.parent
    if index_file(folder) is not None and (folder / SAMPLING_FILE).is_file():
        model.register_to_config(**{_CONFIG_KEY: _read(folder / SAMPLING_FILE)})


def stated_sampling(source: SourceModel) -> tuple[Path, dict[str, Any]] | None:
    """Return the file of a pipeline with its sampling, and its content; None for none.

    Raises:
        ModelError: a file is not readable, or two components disagree.
    """
    file = source.folder / SAMPLING_FILE
    if file.is_file():
        return file, _read(file)
    components = [source.components[name] for name in source.denoiser_components]
    stated = {each.folder / "config.json": each.config.get(_CONFIG_KEY) for each in components}
    found = [(file, _an_object(value, file)) for file, value in stated.items() if value is not None]
    if found and any(value != found[0][1] for _, value in found):
        raise ModelError(
            f"{' and '.join(str(file) for file, _ in found)} say different things about sampling: "
            f"write the right one to {source.folder / SAMPLING_FILE}: {json.dumps(found[0][1])}, say."
        )
    return found[0] if found else None


def default_settings(source: SourceModel) -> SamplingSettings:
    """Return the model's own settings: from `stated_sampling`, or else its family's, as published.

    An unset flow shift is the stored scheduler's.

    Raises:
        ModelError: `SamplingSettings` does not accept the file, or the scheduler does not load.
    """
    stated = stated_sampling(source)
    if stated is None:
        return published_settings(source)
    file, values = stated
    try:
        settings = SamplingSettings.from_dict(values, published_settings(source))
        source.geometry.require(settings)
    except (TypeError, SettingsError) as error:
        raise ModelError(f"{file} is not a valid sampling file ({error}): remove or repair it.") from error
    if settings.flow_shift is not None:
        return settings
    return settings.replace(flow_shift=flow_shift_of(load_scheduler(source, None)))


def published_settings(source: SourceModel) -> SamplingSettings:
    """Return the sampling of the published model that a source resembles."""
    return source.family.published(source.index)[1]


def settings_of(source: SourceModel, changes: Mapping[str, Any]) -> SamplingSettings:
    """Return the model's own settings with some of them changed; None leaves one unchanged.

    Its LoRAs, if any, change the sampler as they change that of a quantized result
    (`sampler_with`).

    Raises as `default_settings` does, and SettingsError for a value that the model cannot run.
    """
    settings = default_settings(source).replace(**sampler_with(source.family, source.loras, changes))
    source.geometry.require(settings)
    warn_of_published(source, settings, changes)
    return settings


def warn_of_published(source: SourceModel, settings: SamplingSettings, given: Mapping[str, Any]) -> None:
    """Log which settings are the published ones, because neither the model nor `given` (if any)
    sets them.
    """
    left = [name for name in _FALLBACKS if given.get(name) is None and getattr(settings, name) is not None]
    if left and stated_sampling(source) is None:
        _logger.warning(
            "%s has no %s, so %s are those that %s was published with: --size, --frames, --steps, "
            "--guidance-scale and --flow-shift change them.",
            source.folder,
            SAMPLING_FILE,
            ", ".join(f"{name} {getattr(settings, name):g}" for name in left),
            source.family.published(source.index)[0],
        )


def _read(file: Path) -> dict[str, Any]:
    try:
        return _an_object(json.loads(file.read_text(encoding="utf-8")), file)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not a valid sampling file ({error}): remove or repair it.") from error


def _an_object(value: Any, file: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ModelError(f"{file} is not a valid sampling file (no JSON object): remove or repair it.")
    return value
