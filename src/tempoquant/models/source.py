"""SourceModel: a pipeline on disk, opened and checked once, and passed to every reader."""

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempoquant.calibrate.arguments import tensors_in
from tempoquant.errors import ModelError
from tempoquant.models.component_files import Component
from tempoquant.models.families import family_of
from tempoquant.models.family import ModelFamily, PipelineIndex
from tempoquant.models.geometry import LatentGeometry
from tempoquant.models.hub import fetch, revision_of, split_revision
from tempoquant.models.no_source import no_pipeline
from tempoquant.models.pipeline_folder import (
    SMALL_FILES,
    WHOLE_MODEL,
    hub_name,
    index_file,
    local_folder,
    read_index,
    refuse_other_weights,
)
from tempoquant.models.source_sizes import BlockLinear, SampleSizes
from tempoquant.models.weight_files import Forms
from tempoquant.models.with_experts import GenericModel, ModelName, WithExperts, warn_of_names
from tempoquant.timesteps import Denoiser

if TYPE_CHECKING:
    from tempoquant.models.lora.lora import LoraSum


@dataclass(frozen=True, eq=False)
class SourceModel:
    """A pipeline on disk, 16-bit or quantized. Everything in it is read from the files once.

    Attributes:
        folder: its location, absolute.
        family: its kind of model.
        index: its model_index.json.
        components: by name.
        denoisers: the noisiest first.
        hub_id: its name, if it was given as a hub id; a folder's path is private.
        bundled: the name of a bundled model; "" for any other.
        loras: the LoRAs that are added to each denoiser's weights, see `lora.given.with_loras`.
    """

    folder: Path
    family: ModelFamily
    index: PipelineIndex
    components: Mapping[str, Component]
    denoisers: tuple[Denoiser, ...]
    hub_id: str | None = None
    bundled: str = ""
    loras: Mapping[str, "LoraSum"] = field(default_factory=dict)
    _cache: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, model: ModelName, weights: bool = True) -> "SourceModel":
        """Find a model, and check that it is a complete pipeline of a known family.

        It reads no weight. For a hub id, the small files are fetched and checked before the
        weights.

        Args:
            model: a bundled model's name, a folder, or a hub id ("org/name@revision"); or one of
                these with files of denoisers' weights, or for the generic family.
            weights: False to look at configs only, and fetch nothing else.

        Raises:
            ModelError: there is no such model, it cannot be fetched, or no family can run it.
            CheckpointError: the same of a component that is quantized.
        """
        if isinstance(model, GenericModel):
            from tempoquant.models.generic.opening import open_generic  # opens sources itself

            return open_generic(model)
        base, given = (model.base, model.files()) if isinstance(model, WithExperts) else (model, {})
        folder = local_folder(base)
        if folder is not None:
            bundled = "" if Path(base).is_dir() else str(base)
            return cls.of_folder(folder, weights, None, bundled, given)
        name = hub_name(base)
        hub_id, _ = split_revision(name)
        small = cls.of_folder(fetch(name, SMALL_FILES), False, hub_id, "", given)
        if not weights:
            return small
        needed = [f"{name}/*.safetensors" for name, component in small.components.items() if not component.given]
        patterns = (*SMALL_FILES, *needed) if given or small.index.is_modular else WHOLE_MODEL
        return cls.of_folder(fetch(name, patterns), True, hub_id, "", given)

    @classmethod
    def of_folder(
        cls,
        folder: Path,
        weights: bool,
        hub_id: str | None,
        bundled: str,
        given: Mapping[str, tuple[Path, ...]],
        family: ModelFamily | None = None,
    ) -> "SourceModel":
        """Open a folder, as `open` does.

        Args:
            given: files of denoisers' weights, by their names.
            family: None for the family that covers the pipeline's class.
        """
        if not folder.is_dir():
            raise ModelError(f"there is no folder {folder}.")
        folder = folder.absolute()  # workers may run in another folder
        if index_file(folder) is None:
            raise no_pipeline(folder, hub_id)
        index = read_index(folder)
        family = family or family_of(index)
        denoisers = family.denoisers(index)
        for file in folder.glob("*.json"):
            if not file.exists():
                raise ModelError(f"{file} is a link to {os.readlink(file)}, which is not there: fetch the model again.")
        kept = {name: each for name, each in index.components.items() if name not in family.unused_components}
        components = {name: Component(folder / name, *each) for name, each in kept.items()}
        for each in denoisers:
            component = components[each.component]
            components[each.component] = replace(component, family=family, given=given.get(each.name, ()))
        if wrong := sorted(given.keys() - {each.name for each in denoisers}):
            names = " and ".join(each.name for each in denoisers)
            raise ModelError(f"{hub_id or bundled or folder} has no denoiser {wrong[0]!r}, only {names}.")
        warn_of_names(given, (each.name for each in denoisers))
        for component in components.values():
            if not component.given or not component.folder.is_dir():
                refuse_other_weights(component.folder)
            if component.given:
                component.require_16_bit()
            component.check(weights)
        return cls(folder, family, index, components, denoisers, hub_id, bundled)

    @property
    def name(self) -> str:
        """Return its name for people: as a bundled model, its hub id, or its folder's name."""
        return self.bundled or self.hub_id or self.folder.name

    @property
    def pipeline_tag(self) -> str:
        """Return the hub's name of its task."""
        if self.geometry.is_image:
            return "text-to-image"
        return "image-to-video" if self.family.needs(self.index) else "text-to-video"

    @property
    def revision(self) -> str | None:
        """Return the commit of a snapshot in the hub's cache; None for any other folder."""
        return revision_of(self.folder)

    def denoiser(self, name: str) -> Denoiser:
        """Return a denoiser by its name. Raises ModelError that lists the names."""
        found = next((each for each in self.denoisers if each.name == name), None)
        if found is None:
            raise ModelError(f"{self.name} has no denoiser {name!r}, only {' and '.join(self.denoiser_names)}.")
        return found

    @property
    def denoiser_names(self) -> tuple[str, ...]:
        """Return the names of all denoisers, the noisiest first."""
        return tuple(denoiser.name for denoiser in self.denoisers)

    @property
    def places(self) -> tuple[Path, ...]:
        """Return its folder, and files of weights elsewhere: everything that is read."""
        return (self.folder, *(file for component in self.components.values() for file in component.given))

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of the denoisers' weight files."""
        return sum(file.stat().st_size for name in self.denoiser_names for file in self.component_of(name).weight_files)

    @property
    def bits_per_weight(self) -> float:
        """Return the bits a weight of unquantized block linears: 8 if stored in 8, else 16."""
        bits = weights = 0
        for name in self.denoiser_names:
            tensors = self.component_of(name).tensors
            for linear, shape in self.linears(name).items():
                weights += shape.out_features * shape.in_features
                eight = tensors[f"{linear}.weight"].is_8_bit
                bits += shape.out_features * shape.in_features * (8 if eight else 16)
        return bits / weights

    def component_of(self, denoiser: str) -> Component:
        """Return the component of a denoiser, by the denoiser's name."""
        return self.components[self.denoiser(denoiser).component]

    @property
    def denoiser_components(self) -> tuple[str, ...]:
        """Return the names of the denoisers' components."""
        return tuple(denoiser.component for denoiser in self.denoisers)

    @property
    def other_components(self) -> tuple[str, ...]:
        """Return the names of the components that are not denoisers."""
        return tuple(name for name in self.components if name not in self.denoiser_components)

    @property
    def text_components(self) -> tuple[str, ...]:
        """Return the names of the components that make embeddings of texts."""
        return tuple(name for name in self.components if name in self.family.text_components)

    @property
    def first(self) -> Component:
        """Return the component of the first denoiser, which has all facts that denoisers share."""
        return self.component_of(self.denoisers[0].name)

    @functools.cached_property
    def geometry(self) -> LatentGeometry:
        """Return the geometry of a video. Raises ModelError if a config does not define it."""
        try:
            return self.family.geometry(self.first.config, self.autoencoder.config)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"the configs of {self.folder} do not say how a video becomes tokens ({error!r}): fetch the model "
                "again."
            ) from error

    @property
    def width(self) -> int:
        """Return the features of a token in the first denoiser. Raises ModelError if unknown."""
        try:
            return self.family.width(self.first.config)
        except (KeyError, TypeError) as error:
            raise ModelError(
                f"{self.first.folder / 'config.json'} does not say {error}: fetch the model again."
            ) from error

    @property
    def autoencoder(self) -> Component:
        """Return the component that encodes videos. Raises ModelError if there is none."""
        return self._named(self.family.autoencoder)

    @property
    def text_encoder(self) -> Component:
        """Return the component that encodes texts. Raises ModelError if there is none."""
        return self._named(self.family.text_encoder)

    def _named(self, name: str) -> Component:
        if name not in self.components:
            raise ModelError(f"{self.folder} names no {name} in its {self.index.file_name}: fetch the model again.")
        return self.components[name]

    def sample_sizes(self, denoiser: str, height: int, width: int, num_frames: int) -> SampleSizes:
        """Return the sizes of a denoiser's calibration sample for a video, 0 for none."""
        config = self.component_of(denoiser).config
        try:
            num_tokens = self.geometry.num_tokens(height, width, num_frames) if num_frames else 0
            latents = self.geometry.latents(height, width, num_frames) if num_frames else (0, 0, 0)
            inputs = self.family.example_inputs(self.index, config, latents)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{self.component_of(denoiser).folder / 'config.json'} does not say {error}: fetch the model again."
            ) from error
        sizes = {name: sum(each.numel() for each in tensors_in(value)) for name, value in inputs.items()}
        texts = sum(sizes.pop(name) for name in self.family.text_inputs if name in sizes)
        return SampleSizes(num_tokens, sum(sizes.values()), texts)

    def forms(self, denoiser: str) -> Forms:
        """Return file, dtype and shape of a denoiser's weights. Raises ModelError."""
        return self.component_of(denoiser).forms

    def blocks(self, denoiser: str) -> tuple[str, ...]:
        """Return the names of a denoiser's blocks in their order, such as "blocks.0"."""
        return self._cached("blocks", denoiser, self._find_blocks)

    def _find_blocks(self, denoiser: str) -> tuple[str, ...]:
        found = {block for name in self.forms(denoiser) if (block := self.family.block_of(name)) is not None}
        return self.family.in_order(found)

    def linears(self, denoiser: str) -> Mapping[str, BlockLinear]:
        """Return the linears of a 16-bit denoiser's blocks that may be quantized, by name."""
        return self._cached("linears", denoiser, lambda name: self._find_linears(name, self.family.may_quantize))

    def modulation(self, denoiser: str) -> Mapping[str, BlockLinear]:
        """Return the linears of a 16-bit denoiser's blocks whose weights alone may be quantized."""
        return self._cached("modulation", denoiser, lambda name: self._find_linears(name, self.family.is_modulation))

    def _find_linears(self, denoiser: str, wanted: Callable[[str], bool]) -> dict[str, BlockLinear]:
        position = {block: index for index, block in enumerate(self.blocks(denoiser))}
        return {
            name.removesuffix(".weight"): BlockLinear(form.shape[0], form.shape[1], position[block])
            for name, (_, form) in self.forms(denoiser).items()
            if name.endswith(".weight")
            and len(form.shape) == 2
            and wanted(name.removesuffix(".weight"))
            and (block := self.family.block_of(name)) is not None
        }

    def _cached(self, what: str, denoiser: str, find: Any) -> Any:
        key = f"{what} of {denoiser}"
        if key not in self._cache:
            self._cache[key] = find(denoiser)
        return self._cache[key]
