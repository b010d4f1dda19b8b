"""Pipeline folders: where a named model lies, whether it is a two-expert Wan pipeline, and that loading it is safe."""

import json
import os
from pathlib import Path
from typing import Any

from tempoquant.errors import ModelError
from tempoquant.integrations.component_files import check_component

_PIPELINE_CLASS = "WanImageToVideoPipeline"
_TRANSFORMER_CLASS = "WanTransformer3DModel"
_LIBRARIES = {"diffusers", "transformers"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONFIGS = ["*.json"]
_SMALL_FILES = [*_CONFIGS, "*.model", "*.txt", "*.md"]
_ALL_FILES = [*_SMALL_FILES, "*.safetensors"]
BUNDLED_MODELS = ("tiny", "tiny-outliers")


def resolve_model(model: str | Path, configs_only: bool = False) -> Path:
    """The folder of a model: a bundled one by name, a folder, or a hub id (then fetched into the hub's cache).

    Args:
        configs_only: fetch no weights.

    Raises:
        ModelError: there is no such model, it cannot be fetched, or its configs are not those of a Wan pipeline, which
            is seen before its weights are fetched.
    """
    if str(model) == "tiny":
        from tempoquant.tiny import weights_folder

        return weights_folder()
    if str(model) == "tiny-outliers":
        from tempoquant.tiny.outliers import outliers_folder

        return outliers_folder()
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or str(model).count("/") != 1 or str(model).startswith(("/", ".")):
        raise ModelError(
            f"there is no model folder {model}: give {', '.join(BUNDLED_MODELS)}, a diffusers folder, or a hub id."
        )
    if not configs_only:  # what a few kilobytes tell is told before a hundred gigabytes are fetched
        check_pipeline_folder(_fetch(str(model), _SMALL_FILES), weights=False)
    return _fetch(str(model), _CONFIGS if configs_only else _ALL_FILES)


def hub_id_of(model: str | Path) -> str | None:
    """The model's name if it was given as a hub id; None for a folder (whose path is nobody's business) and for the
    bundled models."""
    return None if Path(model).exists() or str(model) in BUNDLED_MODELS else str(model)


def revision_of(folder: Path) -> str | None:
    """The commit of a snapshot in the hub's cache; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def _fetch(hub_id: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{hub_id} is neither a folder here nor could it be fetched from the hub: {error}") from error


def read_json(file: Path) -> Any:
    """A JSON file's value. Raises ModelError when it is missing or malformed."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{file} is missing: {file.parent} is not a complete diffusers pipeline.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not readable JSON ({error}).") from error


def components_of(folder: Path) -> dict[str, tuple[str, str]]:
    """The components that model_index.json names: name → (library, class).

    Raises:
        ModelError: a name that would leave the folder, or a library other than diffusers and transformers (whose code
            would have to be trusted).
    """
    index = read_json(folder / "model_index.json")
    if not isinstance(index, dict):
        raise ModelError(f"{folder / 'model_index.json'} is not a JSON object.")
    components = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):
            continue
        if not name.isidentifier():
            raise ModelError(f"model_index.json names a component {name!r}, which could lie outside {folder}: refused.")
        if len(value) != 2 or value == [None, None]:
            continue
        library, class_name = value
        if not isinstance(library, str) or library not in _LIBRARIES:
            raise ModelError(
                f"component {name} wants code from {library!r}; only diffusers and transformers are loaded."
            )
        components[name] = (library, str(class_name))
    return components


def check_pipeline_folder(folder: Path, weights: bool = True) -> None:
    """Check that a folder is a two-expert Wan image-to-video pipeline, and that all of it is there and whole.

    Reads configs, indexes and the headers of safetensors files, no weight.

    Args:
        weights: False where only configs were fetched.

    Raises:
        ModelError: it is not; the message names the file, what is wrong with it, and the remedy.
        CheckpointError: the same of a component that is quantized.
    """
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}.")
    index = read_json(folder / "model_index.json")
    components = components_of(folder)
    class_name = index.get("_class_name")
    if class_name != _PIPELINE_CLASS:
        raise ModelError(
            f"{folder} is a {class_name}, not a {_PIPELINE_CLASS}: only Wan2.2 image-to-video is supported."
        )
    for name in ("transformer", "transformer_2"):
        if components.get(name) != ("diffusers", _TRANSFORMER_CLASS):
            raise ModelError(
                f"{folder} has no {_TRANSFORMER_CLASS} as {name}: a two-expert Wan2.2 pipeline needs both."
            )
    ratio = index.get("boundary_ratio")
    if not isinstance(ratio, int | float):
        raise ModelError(f"{folder} has no boundary_ratio: a two-expert Wan2.2 pipeline needs one.")
    if isinstance(ratio, bool) or not 0 < ratio < 1:
        raise ModelError(
            f"the boundary_ratio of {folder} is {ratio}: it lies between 0 and 1, so that each expert has timesteps."
        )
    if index.get("expand_timesteps"):
        raise ModelError(
            f"{folder} has a timestep for each token (expand_timesteps): only pipelines with one for each call are "
            "supported."
        )
    for file in folder.glob("*.json"):
        if not file.exists():
            raise ModelError(f"{file} is a link to {os.readlink(file)}, which is not there: fetch the model again.")
    for name in components:
        _refuse_pickles(folder / name)
    for name, (library, class_name) in components.items():
        check_component(folder / name, library, class_name, weights)


def _refuse_pickles(component: Path) -> None:
    if not component.is_dir():
        raise ModelError(f"component {component} is named in model_index.json but missing.")
    names = [entry.name for entry in component.iterdir()]
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"{component / pickles[0]} would have to be unpickled, which can run any code: convert it to safetensors."
        )
