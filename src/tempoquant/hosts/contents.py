"""The content of a quantized pipeline folder, from its configs, headers and clip ratios."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tempoquant.checkpoint import ComponentConfig, check_tensors, read_config, read_model_config
from tempoquant.checkpoint.files import CONFIG_NAME, component_forms, open_weights, read_forms, weight_files
from tempoquant.checkpoint.reader import check_forms
from tempoquant.checkpoint.tensors import num_replacing_bytes
from tempoquant.errors import CheckpointError
from tempoquant.hosts.nunchaku.config import ExportedConfig, exported_config, is_exported
from tempoquant.hosts.text_encoder_contents import TextEncoderContents, quantized_text_encoders
from tempoquant.layer import HardlySeen
from tempoquant.models.families import family_of_denoiser
from tempoquant.timesteps import NUM_TRAIN_TIMESTEPS

CLIP_RATIO_SUFFIX = ".clip_ratio"


@dataclass(frozen=True)
class BinContents:
    """One timestep bin and the clip ratios that a denoiser's layers use inside it.

    Attributes:
        lowest_timestep, highest_timestep: the half-open interval [lowest, highest).
        clip_ratio_min, clip_ratio_median, clip_ratio_max: over the denoiser's layers.
    """

    lowest_timestep: float
    highest_timestep: float
    clip_ratio_min: float
    clip_ratio_median: float
    clip_ratio_max: float


@dataclass(frozen=True)
class LayerContents:
    """One 4-bit layer.

    Attributes:
        format: its name.
        rank: of the low-rank branch.
        bits_per_weight: as in DenoiserContents.
        clip_ratio: one per timestep bin, from clean to noisy.
    """

    format: str
    rank: int
    bits_per_weight: float
    clip_ratio: tuple[float, ...]


@dataclass(frozen=True)
class DenoiserContents:
    """One quantized denoiser.

    Attributes:
        denoiser: its name.
        component: the name of its folder.
        num_layers: linears in four bits.
        num_16bit_linears: linears of blocks that stayed in 16 bits.
        formats: format name to number of layers.
        ranks: rank of the low-rank branch to number of layers.
        bits_per_weight: of the 4-bit layers; everything that replaces their weights, as
            `num_replacing_bytes` counts it.
        num_bytes: of the component's weight files.
        bins: from clean to noisy.
        layers: every 4-bit layer by name.
        notes: notes that the run stored.
        hardly_seen: layers with input features that calibration hardly saw, by name.
    """

    denoiser: str
    component: str
    num_layers: int
    num_16bit_linears: int
    formats: Mapping[str, int]
    ranks: Mapping[int, int]
    bits_per_weight: float
    num_bytes: int
    bins: tuple[BinContents, ...]
    layers: Mapping[str, LayerContents]
    notes: tuple[str, ...]
    hardly_seen: Mapping[str, HardlySeen]


@dataclass(frozen=True)
class Contents:
    """A quantized pipeline.

    Attributes:
        folder: its location.
        denoisers: high noise first.
        bits_per_weight: over all denoisers.
        num_bytes: of all denoisers' weight files.
        recipe: the resolved recipe, as plain values.
        library_version: of the TempoQuant that wrote it.
        calibration_prompt_ids: none if the recipe needed none.
        calibration_settings: how the calibration samples were drawn.
        text_encoders: those that are quantized.
    """

    folder: str
    denoisers: tuple[DenoiserContents, ...]
    bits_per_weight: float
    num_bytes: int
    recipe: Mapping[str, Any]
    library_version: str
    calibration_prompt_ids: tuple[str, ...]
    calibration_settings: Mapping[str, Any]
    text_encoders: tuple[TextEncoderContents, ...] = ()


def quantized_components(folder: Path) -> dict[str, Path]:
    """Return the quantized component of each denoiser of a pipeline folder, high noise first; empty
    for a 16-bit pipeline.

    Raises CheckpointError if there is no such folder, a config is damaged, or two components claim
    one denoiser.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}.")
    found: dict[str, Path] = {}
    for config_file in sorted(folder.glob(f"*/{CONFIG_NAME}")):
        component = config_file.parent
        keys = read_model_config(component).keys()
        if not {"quantization_config", "_class_name"} <= keys:  # transformers' models name no class
            continue
        denoiser = config_of(component).denoiser
        if denoiser in found:
            raise CheckpointError(f"{found[denoiser]} and {component} both claim to be the {denoiser} denoiser.")
        found[denoiser] = component
    return found


def config_of(component: Path) -> ComponentConfig:
    """Return the config of a component of `quantize` or `export`. Raises CheckpointError."""
    model_config = read_model_config(component)
    if not is_exported(model_config):
        return read_config(component)
    return exported_config(model_config, str(component / CONFIG_NAME))


def check_headers(component: Path) -> None:
    """Compare a component's headers with its config. Raises CheckpointError."""
    if is_exported(read_model_config(component)):
        from tempoquant.hosts.nunchaku.reader import ExportedComponent  # which needs diffusers' models

        ExportedComponent(component)
    else:
        check_forms({name: form for name, (_, form) in component_forms(component).items()}, read_config(component))


def check_component(component: Path) -> None:
    """Compare every tensor of a quantized or exported component with its config. Raises
    CheckpointError.
    """
    if not is_exported(read_model_config(component)):
        check_tensors(component)
        return
    from tempoquant.hosts.nunchaku.reader import ExportedComponent  # which needs diffusers' models

    for _ in ExportedComponent(component).layers():
        pass


def configs_of(folder: Path) -> dict[str, ComponentConfig]:
    """Return the quantization config of each quantized denoiser; empty for a 16-bit pipeline.
    Raises CheckpointError.
    """
    return {denoiser: config_of(component) for denoiser, component in quantized_components(folder).items()}


def calibration_prompts_of(folder: Path) -> list[dict[str, str]]:
    """Return the provenance of every prompt that any denoiser was calibrated on. Raises
    CheckpointError.
    """
    calibrations = [config.calibration for config in configs_of(folder).values()]
    return [dict(prompt) for calibration in calibrations if calibration is not None for prompt in calibration.prompts]


def contents_of(folder: Path) -> Contents:
    """Read the content of a quantized pipeline. Raises CheckpointError if it holds no quantized
    denoiser or is damaged.
    """
    components = quantized_components(folder)
    if not components:
        raise CheckpointError(f"{folder} holds no quantized denoiser: make one with `tempoquant quantize`.")
    configs = {denoiser: config_of(component) for denoiser, component in components.items()}
    first = next(iter(configs.values()))
    prompts = {
        prompt["id"] for config in configs.values() if config.calibration for prompt in config.calibration.prompts
    }
    denoisers = tuple(_denoiser_contents(components[denoiser], config) for denoiser, config in configs.items())
    return Contents(
        folder=str(folder),
        denoisers=denoisers,
        bits_per_weight=bits_per_weight(configs.values()),
        num_bytes=sum(denoiser.num_bytes for denoiser in denoisers),
        recipe=first.recipe.to_dict(),
        library_version=first.library_version,
        calibration_prompt_ids=tuple(sorted(prompts)),
        calibration_settings=first.calibration.settings if first.calibration else {},
        text_encoders=quantized_text_encoders(folder),
    )


def bits_per_weight(configs: Iterable[ComponentConfig]) -> float:
    """Compute the bits of all 4-bit layers of some component configs: everything stored in place of
    the weight, over its elements.
    """
    layers = [(config, name) for config in configs for name in config.layers]
    num_weights = sum(config.layers[name].in_features * config.layers[name].out_features for config, name in layers)
    if num_weights == 0:
        return math.nan
    return 8 * sum(_num_replacing_bytes(config, name) for config, name in layers) / num_weights


def _num_replacing_bytes(config: ComponentConfig, name: str) -> int:
    if isinstance(config, ExportedConfig):
        return config.num_replacing_bytes(name)
    return num_replacing_bytes(config.layers[name], config.bins.num_bins)


def num_weight_bytes(component: Path) -> int:
    """Return the bytes of a component's weight files. Raises CheckpointError if there are none."""
    return sum(file.stat().st_size for file in weight_files(component))


def _denoiser_contents(component: Path, config: ComponentConfig) -> DenoiserContents:
    clip_ratios = dict(clip_ratios_of(component, config))
    return DenoiserContents(
        denoiser=config.denoiser,
        component=component.name,
        num_layers=len(config.layers),
        num_16bit_linears=sum(1 for name, _ in _block_matrices(component) if name.endswith(".weight")),
        formats=dict(sorted(Counter(entry.format.name for entry in config.layers.values()).items())),
        ranks=dict(sorted(Counter(entry.rank for entry in config.layers.values()).items())),
        bits_per_weight=bits_per_weight([config]),
        num_bytes=num_weight_bytes(component),
        bins=_bins(component, config, clip_ratios.values()),
        layers={
            name: LayerContents(
                entry.format.name,
                entry.rank,
                8 * _num_replacing_bytes(config, name) / (entry.in_features * entry.out_features),
                tuple(clip_ratios.get(name, ())),
            )
            for name, entry in config.layers.items()
        },
        notes=config.notes,
        hardly_seen={} if isinstance(config, ExportedConfig) else config.hardly_seen,
    )


def _bins(component: Path, config: ComponentConfig, clip_ratios: Iterable[list[float]]) -> tuple[BinContents, ...]:
    limits = (0.0, *config.bins.edges, float(NUM_TRAIN_TIMESTEPS))
    by_bin: list[list[float]] = [[] for _ in range(config.bins.num_bins)]
    for ratios in clip_ratios:
        if len(ratios) != config.bins.num_bins:
            raise CheckpointError(f"{component} holds {len(ratios)} clip ratios for {config.bins.num_bins} bins.")
        for values, ratio in zip(by_bin, ratios, strict=True):
            values.append(ratio)
    return tuple(
        BinContents(limits[i], limits[i + 1], min(values), statistics.median(values), max(values))
        for i, values in enumerate(by_bin)
        if values
    )


def clip_ratios_of(component: Path, config: ComponentConfig) -> Iterator[tuple[str, list[float]]]:
    """Yield every 4-bit layer of a component with its clip ratios, one a timestep bin, from clean
    to noisy.
    """
    if isinstance(config, ExportedConfig):
        yield from ((name, [1.0] * config.bins.num_bins) for name in config.layers)
        return
    for file in weight_files(component):
        with open_weights(file) as weights:
            for name in sorted(weights.keys()):
                if name.endswith(CLIP_RATIO_SUFFIX):
                    ratios = weights.get_tensor(name).clone().view(torch.float32).tolist()
                    yield name.removesuffix(CLIP_RATIO_SUFFIX), ratios


def _block_matrices(component: Path) -> Iterator[tuple[str, Any]]:
    """Yield (name, form) of every floating matrix in a block that is no low-rank branch."""
    family = family_of_denoiser(read_model_config(component).get("_class_name", ""))
    for name, (_, form) in read_forms(weight_files(component)).items():
        is_branch = name.endswith((".up", ".down"))
        is_in_block = family is not None and family.block_of(name) is not None
        if is_in_block and len(form.shape) == 2 and form.dtype.is_floating_point and not is_branch:
            yield name, form
