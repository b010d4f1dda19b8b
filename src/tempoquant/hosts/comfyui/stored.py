"""StoredDenoiser: a quantized denoiser on disk, from a folder of `quantize` or a file of
`export`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tempoquant.checkpoint import files
from tempoquant.checkpoint.checks import damaged
from tempoquant.checkpoint.files import CONFIG_NAME, component_forms, open_weights, read_forms
from tempoquant.checkpoint.reader import check_forms, read_config, read_model_config
from tempoquant.checkpoint.schema import QUANT_METHOD
from tempoquant.checkpoint.tensors import StoredAs
from tempoquant.errors import CheckpointError, ModelError
from tempoquant.hosts.comfyui.exported_file import QUANTIZATION, Header, read_header
from tempoquant.hosts.comfyui.names import family_in_comfyui, own_tensor
from tempoquant.models.comfyui_layout import ComfyLayout
from tempoquant.models.families import family_of
from tempoquant.models.family import ModelFamily
from tempoquant.models.pipeline_folder import INDEX_NAMES, index_file, read_index
from tempoquant.timesteps import Denoiser


@dataclass(frozen=True)
class StoredDenoiser:
    """A quantized denoiser on disk. Its headers agree with its config.

    Attributes:
        where: its folder or file.
        header: its description of itself.
        family, layout: of its class.
        places: diffusers' names of its tensors to file, key and form.
    """

    where: Path
    header: Header
    family: ModelFamily
    layout: ComfyLayout
    places: Mapping[str, tuple[Path, str, StoredAs]] = field(repr=False)

    @property
    def name(self) -> str:
        """Return the denoiser's name."""
        return self.header.quantization.denoiser

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield diffusers' name and value of every tensor, as stored, each in fresh memory."""
        by_file: dict[Path, list[tuple[str, str]]] = {}
        for name, (file, key, _) in self.places.items():
            by_file.setdefault(file, []).append((name, key))
        for file, entries in by_file.items():
            with open_weights(file) as weights:
                for name, key in entries:
                    yield name, weights.get_tensor(key).clone()

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor by diffusers' name, as stored."""
        file, key, _ = self.places[name]
        with open_weights(file) as weights:
            return weights.get_tensor(key).clone()


def open_denoisers(path: str | Path) -> list[StoredDenoiser]:
    """Find every quantized denoiser of a folder (of a pipeline, or of one component) or of an
    exported file.

    Returns:
        The noisiest first. No weight is read.

    Raises:
        ModelError: there is nothing, nothing quantized, or a model that ComfyUI cannot run.
        CheckpointError: it is damaged, newer than this TempoQuant, or another program's.
    """
    path = following_links(Path(path).expanduser())
    if path.is_file():
        return [_of_file(path)]
    if not path.is_dir():
        raise ModelError(f"there is no folder or file {path}.")
    if index_file(path) is not None:
        return _of_pipeline(path)
    if (path / CONFIG_NAME).is_file():
        return [_of_component(path, _denoiser_of_component(path))]
    raise ModelError(
        f"{path} holds neither {INDEX_NAMES[0]} nor {CONFIG_NAME}: give the folder that `tempoquant quantize` wrote, "
        "or a file that `tempoquant export --to comfyui` wrote."
    )


def following_links(path: Path) -> Path:
    """Return the target of a user's link in a folder of models; a blob of the hub's cache keeps its
    name.
    """
    target = path.resolve()
    return target if target.is_dir() or target.suffix == path.suffix else path


def open_denoiser(path: str | Path, name: str | None = None) -> StoredDenoiser:
    """Return one denoiser of a folder or file: by name, or the only one.

    Raises ModelError that lists the denoisers if there are several and none is named, or none has
    the name in a folder of several; and as `open_denoisers` raises.
    """
    found = open_denoisers(path)
    if name is None and len(found) == 1:
        return found[0]
    named = [each for each in found if each.name == name]
    if named:
        return named[0]
    there = " and ".join(each.name for each in found)
    if name is None:
        raise ModelError(f"{path} holds {there}: name the one to load.")
    raise ModelError(f"{path} holds no {name}, only {there}.")


def _of_pipeline(folder: Path) -> list[StoredDenoiser]:
    index = read_index(folder)
    denoisers = family_of(index).denoisers(index)
    there = [each for each in denoisers if (folder / each.component / CONFIG_NAME).is_file()]
    if not there:
        raise ModelError(f"{folder} lacks {denoisers[0].component}: fetch the whole folder again.")
    return [_of_component(folder / each.component, each) for each in there]


def _denoiser_of_component(folder: Path) -> Denoiser | None:
    """Return a component's denoiser from the pipeline around it; None for a component that lies
    alone.
    """
    around = folder.absolute().parent
    if index_file(around) is None:
        return None
    index = read_index(around)
    return next((each for each in family_of(index).denoisers(index) if each.component == folder.name), None)


def _of_component(folder: Path, denoiser: Denoiser | None) -> StoredDenoiser:
    config = read_model_config(folder)
    family, layout = family_in_comfyui(config, str(folder))
    section = config.pop(QUANTIZATION, None)
    if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
        raise ModelError(
            f"{folder} is not quantized by TempoQuant: quantize the model first, or load it with ComfyUI's own nodes."
        )
    quantization = read_config(folder)
    timesteps = (denoiser or Denoiser(quantization.denoiser, folder.name)).timesteps
    if denoiser is not None and denoiser.name != quantization.denoiser:
        raise CheckpointError(
            f"{folder} holds the {quantization.denoiser} denoiser, but belongs to {denoiser.name}: fetch it again."
        )
    forms = component_forms(folder)
    check_forms({name: form for name, (_, form) in forms.items()}, quantization)
    places = {name: (file, name, form) for name, (file, form) in forms.items()}
    return StoredDenoiser(folder, Header(config, quantization, timesteps), family, layout, places)


def _of_file(file: Path) -> StoredDenoiser:
    header = read_header(files.require_safe(file))
    family, layout = family_in_comfyui(header.config, str(file))
    places: dict[str, tuple[Path, str, StoredAs]] = {}
    for key, (_, form) in read_forms([file]).items():
        name = own_tensor(key, family)
        if name is None or name in places:
            raise damaged(f"{file} holds {key}, which its model does not have")
        places[name] = (file, key, form)
    check_forms({name: form for name, (_, _, form) in places.items()}, header.quantization)
    return StoredDenoiser(file, header, family, layout, places)
