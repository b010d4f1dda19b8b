"""The components of a pipeline, from its config files alone: no weight is read, or fetched."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ConfigMixin
from huggingface_hub.errors import StrictDataclassError

from tempoquant.checkpoint.schema import ComponentConfig
from tempoquant.errors import ModelError
from tempoquant.layer_rule import KEPT_TEXT_ENCODER, TextEncoderFormat
from tempoquant.models.families import FAMILIES
from tempoquant.models.family import Config, ModelFamily, PipelineIndex
from tempoquant.models.generic.published import PUBLISHED
from tempoquant.models.geometry import LatentGeometry
from tempoquant.models.pipeline_folder import local_folder
from tempoquant.models.source import SourceModel
from tempoquant.models.text_encoders import format_of
from tempoquant.timesteps import Denoiser


class ModelConfig(NamedTuple):
    """A component that is a model.

    Attributes:
        library, class_name: as model_index.json names them.
        config: config.json without its quantization.
    """

    library: str
    class_name: str
    config: Config

    def build(self, **changes: Any) -> Any:
        """Return the model on the meta device, with changes of its config. Raises ModelError if it
        describes none.
        """
        kind = getattr(importlib.import_module(self.library), self.class_name, None)
        if kind is None:
            raise ModelError(f"the {self.library} installed here has no {self.class_name}: upgrade it.")
        values = {**self.config, **changes}
        try:
            with torch.device("meta"):
                if issubclass(kind, ConfigMixin):
                    model = kind.from_config(values)  # type: ignore[attr-defined]
                else:
                    model = kind(kind.config_class(**values))
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, StrictDataclassError) as error:
            raise ModelError(f"a config does not describe a {self.class_name}: {error}") from error
        return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class PipelineConfigs:
    """A pipeline as its configs describe it.

    Attributes:
        name: as the user gave it.
        family: its kind of model.
        index: its model_index.json.
        denoisers: the noisiest first.
        models: config of each component that is a model and takes part in every generation, by the
            component's name.
        quantized: the quantization of each quantized denoiser, by its name.
        disk_bytes: of a component's weight files, if an index file or the publisher states it.
        text_encoder_format: of the text encoder's linears.
    """

    name: str
    family: ModelFamily
    index: PipelineIndex
    denoisers: tuple[Denoiser, ...]
    models: Mapping[str, ModelConfig]
    quantized: Mapping[str, ComponentConfig] = field(default_factory=dict)
    disk_bytes: Mapping[str, int] = field(default_factory=dict)
    text_encoder_format: TextEncoderFormat = KEPT_TEXT_ENCODER

    def denoiser(self, name: str) -> ModelConfig:
        """Return the config of a denoiser."""
        return self.models[next(each.component for each in self.denoisers if each.name == name)]

    @property
    def text_encoder(self) -> ModelConfig:
        """Return the config of the text encoder."""
        return self.models[self.family.text_encoder]

    @property
    def autoencoder(self) -> ModelConfig:
        """Return the config of the autoencoder, completed by the class's defaults."""
        return self.models[self.family.autoencoder]

    @property
    def autoencoder_channels(self) -> int:
        """Return channels of the autoencoder's latents."""
        return self.family.autoencoder_channels(self.autoencoder.build().config)

    @property
    def geometry(self) -> LatentGeometry:
        """Return the geometry of a video. Raises ModelError if a config does not define it."""
        try:
            return self.family.geometry(self.denoiser(self.denoisers[0].name).config, self.autoencoder.config)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"the configs of {self.name} do not say how a video becomes tokens ({error!r})."
            ) from error


def published_models() -> dict[str, PipelineConfigs]:
    """Return published models by names that need no file: for planning before anything is
    fetched.
    """
    return {name: _published(each, name) for each in (*FAMILIES, *PUBLISHED) for name in each.published_models()}


def _published(family: ModelFamily, name: str) -> PipelineConfigs:
    described = family.published_models()[name]
    models = {component: ModelConfig(*model) for component, model in described["models"].items()}
    classes = {component: (model.library, model.class_name) for component, model in models.items()}
    index = PipelineIndex(Path(name), described["index"], classes)
    return PipelineConfigs(name, family, index, family.denoisers(index), models, {}, described["disk_bytes"])


def read_configs(model: str) -> PipelineConfigs:
    """Return the configs of a published model's name, a bundled model, a folder, or a hub id (its
    JSON is fetched).

    Raises:
        ModelError: there is no such model, it is of another class, a config is missing or
            malformed, or a folder with weights lacks some.
        CheckpointError: this TempoQuant does not read a quantized denoiser's config.
    """
    if (published := published_models().get(model)) is not None:
        return published
    folder = local_folder(model)
    # A folder without any weights holds configs for planning, and the hub's cache the fetched part
    # of a model.
    has_weights = folder is not None and any(folder.glob("*/*.safetensors"))
    return configs_of(SourceModel.open(model, weights=has_weights), model)


def configs_of(source: SourceModel, name: str = "") -> PipelineConfigs:
    """Return the configs of an open pipeline."""
    family = source.family
    others = (family.text_encoder, family.autoencoder, family.image_encoder, *family.brief_components)
    names = (*source.denoiser_components, *others)
    components = {name: source.components[name] for name in names if name in source.components}
    models = {
        name: ModelConfig(
            each.library,
            each.class_name,
            {key: value for key, value in each.config.items() if key != "quantization_config"},
        )
        for name, each in components.items()
    }
    quantized = {
        each.name: source.components[each.component].quantization
        for each in source.denoisers
        if source.components[each.component].is_quantized
    }
    disk = {name: size for name, each in components.items() if (size := each.disk_bytes) is not None}
    encoder = source.components.get(family.text_encoder)
    format = KEPT_TEXT_ENCODER if encoder is None else format_of(encoder)
    return PipelineConfigs(
        name or source.name, source.family, source.index, source.denoisers, models, quantized, disk, format
    )
