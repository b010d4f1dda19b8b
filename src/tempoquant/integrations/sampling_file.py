"""Where a pipeline folder says how it is sampled: `sampling.json`, or the configs of experts that lay beside one.

diffusers' `save_pretrained` knows no file of ours, but keeps what is in a component's config. So a 4-bit expert takes
the settings along as it is loaded, and a pipeline that is saved again still samples in four steps, if it did.
"""

import json
from pathlib import Path
from typing import Any

from tempoquant.errors import ModelError
from tempoquant.integrations.pipeline_folder import read_json

SAMPLING_FILE = "sampling.json"
_CONFIG_KEY = "_sampling"
"""Of the experts' config.json; diffusers keeps keys that begin with an underscore, without a warning."""


def take_sampling_along(model: Any, component: Path) -> None:
    """Put what `sampling.json` beside a component's folder says into the model's config, if there is one.

    Raises:
        ModelError: the file is not a JSON object.
    """
    folder = component.parent
    if (folder / "model_index.json").is_file() and (folder / SAMPLING_FILE).is_file():
        model.register_to_config(**{_CONFIG_KEY: _read(folder / SAMPLING_FILE)})


def stated_sampling(folder: Path, components: tuple[str, ...]) -> tuple[Path, dict[str, Any]] | None:
    """The file of a pipeline folder that says how it is sampled, and what it says; None where none does.

    Args:
        components: whose configs are asked where there is no `sampling.json`.

    Raises:
        ModelError: a file is not readable, or two components say different things.
    """
    if (folder / SAMPLING_FILE).is_file():
        return folder / SAMPLING_FILE, _read(folder / SAMPLING_FILE)
    files = [folder / name / "config.json" for name in components if (folder / name / "config.json").is_file()]
    stated = {file: read_json(file).get(_CONFIG_KEY) for file in files}
    found = [(file, _an_object(value, file)) for file, value in stated.items() if value is not None]
    if found and any(value != found[0][1] for _, value in found):
        raise ModelError(
            f"{' and '.join(str(file) for file, _ in found)} say different things about sampling: "
            f"write the right one to {folder / SAMPLING_FILE}: {json.dumps(found[0][1])}, say."
        )
    return found[0] if found else None


def _read(file: Path) -> dict[str, Any]:
    try:
        return _an_object(json.loads(file.read_text(encoding="utf-8")), file)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not a valid sampling file ({error}): remove or repair it.") from error


def _an_object(value: Any, file: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ModelError(f"{file} is not a valid sampling file (no JSON object): remove or repair it.")
    return value
