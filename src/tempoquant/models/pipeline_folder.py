"""Pipeline folders: the location of a named model, its components, and a check that loading it is
safe.
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from tempoquant.errors import ModelError
from tempoquant.models.family import PipelineIndex
from tempoquant.models.hub import is_hub_id
from tempoquant.models.no_source import PICKLES, file_as_model, refuse_file

_LIBRARIES = {"diffusers", "transformers"}
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.md", "*.jinja")
WHOLE_MODEL = (*SMALL_FILES, "*.safetensors")
INDEX_NAME = "model_index.json"
INDEX_NAMES = (INDEX_NAME, "modular_model_index.json")
"""diffusers' names of a pipeline's index; a modular pipeline has the second, and may have both."""
BUNDLED_MODELS = ("tiny", "tiny-outliers")


def local_folder(model: str | Path) -> Path | None:
    """Return the folder of a bundled model or of a folder; None for a hub id. Raises ModelError for
    anything else.
    """
    if str(model) == "tiny":
        from tempoquant.tiny import weights_folder

        return weights_folder()
    if str(model) == "tiny-outliers":
        from tempoquant.tiny.outliers_pipeline import outliers_folder

        return outliers_folder()
    path = Path(model)
    if path.is_dir():
        return path
    if path.is_file():
        raise file_as_model(path)
    if not is_hub_id(hub_name(model)):
        raise ModelError(
            f"there is no model folder {model}: give {', '.join(BUNDLED_MODELS)}, a diffusers folder, or a hub id."
        )
    return None


def hub_name(model: str | Path) -> str:
    """Return the hub's name of a model: with a slash, also where paths have other separators."""
    return model.as_posix() if isinstance(model, Path) else str(model)


def read_json(file: Path) -> Any:
    """Read a JSON file's value. Raises ModelError if it is missing or malformed."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{file} is missing: {file.parent} is not a complete diffusers pipeline.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not readable JSON ({error}).") from error


def read_index(folder: Path) -> PipelineIndex:
    """Read a pipeline's index; of a modular one, the components in the folder.

    Raises:
        ModelError: it is missing or malformed, names a component outside the folder, or one whose
            library is neither diffusers nor transformers (whose code would have to be trusted).
    """
    file = index_file(folder) or folder / INDEX_NAME
    values, is_modular = read_json(file), file.name == INDEX_NAMES[1]
    if not isinstance(values, dict):
        raise ModelError(f"{file} is not a JSON object.")
    components = {}
    for name, value in values.items():
        if name.startswith("_") or not isinstance(value, list):
            continue
        if not name.isidentifier():
            raise ModelError(f"{file.name} names a component {name!r}, which could lie outside {folder}: refused.")
        if is_modular and len(value) == 3 and isinstance(value[2], dict):
            value = _of_modular(folder, name, value)
        if len(value) != 2 or value == [None, None]:
            continue
        library, class_name = value
        if isinstance(library, str) and library.isidentifier() and _is_of_one_pipeline(library):
            library = f"diffusers.pipelines.{library}"  # of classes that only one pipeline has
        elif not isinstance(library, str) or library not in _LIBRARIES:
            raise ModelError(
                f"component {name} wants code from {library!r}; only diffusers and transformers are loaded."
            )
        components[name] = (library, str(class_name))
    return PipelineIndex(folder, values, components)


def _is_of_one_pipeline(library: str) -> bool:
    """Return whether diffusers has a module of this name for one pipeline's own classes, whose
    indexes name it alone.
    """
    return library not in _LIBRARIES and importlib.util.find_spec(f"diffusers.pipelines.{library}") is not None


def index_file(folder: Path) -> Path | None:
    """Return the index of a pipeline in a folder; None for none."""
    return next((folder / name for name in INDEX_NAMES if os.path.lexists(folder / name)), None)


def _of_modular(folder: Path, name: str, value: list[Any]) -> list[Any]:
    """Return the library and class of a modular pipeline's component; of none for one outside the
    folder.

    The origin in the index is ignored, since copies keep that of their source. Raises ModelError
    for a component in a subfolder with another name.
    """
    library, class_name, place = value
    if place.get("subfolder") not in (None, "", name):
        raise ModelError(
            f"component {name} of {folder} lies in its subfolder {place['subfolder']!r}: give it a folder of its own "
            "name, and say so in modular_model_index.json."
        )
    return [library, class_name] if (folder / name).is_dir() else [None, None]


def refuse_other_weights(component: Path) -> None:
    """Raise ModelError for a component that is missing, or has only pickled or GGUF weights."""
    if not component.is_dir():
        raise ModelError(f"component {component} is named in its pipeline's index but missing.")
    names = sorted(entry.name for entry in component.iterdir())
    others = [name for name in names if name.endswith((".gguf", *PICKLES))]
    if others and not any(name.endswith(".safetensors") for name in names):
        refuse_file(component / others[0])
