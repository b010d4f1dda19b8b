"""export --to comfyui-nvfp4: a quantized pipeline becomes files that ComfyUI loads without a node.

Each denoiser becomes one file for ComfyUI's folder diffusion_models, and its branches one LoRA for
the folder loras. One tensor at a time is in memory. OUTPUT is complete or absent, and finished
denoisers are kept in OUTPUT.unfinished after an interruption.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tempoquant.checkpoint import files, iter_layers, iter_rest, read_config, read_model_config
from tempoquant.checkpoint.one_file import OneFileWriter
from tempoquant.checkpoint.schema import ComponentConfig
from tempoquant.checkpoint.shards import disk_errors
from tempoquant.checkpoint.tensors import StoredAs, check_presence
from tempoquant.checkpoint.writer import library_version
from tempoquant.errors import UnsupportedError
from tempoquant.hosts.comfyui.nvfp4_layout import (
    LORA_PREFIX,
    REMEDY,
    TARGET,
    branch_forms,
    branch_tensors,
    layer_forms,
    layer_tensors,
    num_replacing_bytes,
    require_exportable,
)
from tempoquant.hosts.contents import clip_ratios_of
from tempoquant.hosts.empty_model import empty_model
from tempoquant.hosts.model_card import comfyui_nvfp4_card
from tempoquant.hosts.nunchaku.config import is_exported
from tempoquant.models.family import ModelFamily
from tempoquant.models.fingerprint import fingerprint
from tempoquant.models.source import SourceModel
from tempoquant.output.output_folder import ExportIdentity, OutputFolder
from tempoquant.progress import SILENT, Progress

MODELS, LORAS = "diffusion_models", "loras"
"""Folders of a ComfyUI's `models` folder."""


@dataclass(frozen=True)
class ExportedDenoiser:
    """The exported files of one denoiser.

    Attributes:
        denoiser: its name.
        model_file: relative to the output.
        branch_file: the same; None if no layer has a branch.
        num_layers: in four bits.
        bits_per_weight: of those layers; everything that replaces their weights, branches included.
        num_bytes: of both files.
        num_clipped: layers that had a clip ratio other than 1, which is not carried.
    """

    denoiser: str
    model_file: str
    branch_file: str | None
    num_layers: int
    bits_per_weight: float
    num_bytes: int
    num_clipped: int


@dataclass(frozen=True)
class _Plan:
    """One denoiser's export: its component, the component's content, and ComfyUI's name of each
    tensor.

    `rest` holds the tensors outside 4-bit layers, by diffusers' name; `names` has those and the
    layers.
    """

    denoiser: str
    source: Path
    config: ComponentConfig
    rest: Mapping[str, StoredAs]
    names: Mapping[str, str]

    @property
    def model_file(self) -> str:
        return f"{MODELS}/tempoquant_{self.denoiser}_nvfp4.safetensors"

    @property
    def branch_file(self) -> str | None:
        has_branch = any(entry.rank for entry in self.config.layers.values())
        return f"{LORAS}/tempoquant_{self.denoiser}_nvfp4_branch.safetensors" if has_branch else None


def export(
    folder: str | Path, output: str | Path, *, overwrite: bool = False, progress: Progress = SILENT
) -> tuple[ExportedDenoiser, ...]:
    """Write every denoiser in ComfyUI's `nvfp4`, and its branches as a LoRA beside it.

    Args:
        folder: that `quantize` wrote.
        output: a folder that does not exist or is empty. A finished export of the same folder is
            left unchanged.
        overwrite: replace the content of `output`.
        progress: shows how far the job is.

    Returns:
        The written (or existing) files, the noisiest denoiser first.

    Raises:
        UnsupportedError: the format cannot hold a layer, or ComfyUI has no name for a tensor;
            nothing is written then.
        TempoQuantError: see tempoquant.errors.
    """
    source = SourceModel.open(folder)
    plans = [_plan(each.name, source.components[each.component].folder, source.family) for each in source.denoisers]
    identity = ExportIdentity(TARGET, fingerprint(source, progress), library_version())
    target = OutputFolder(Path(output), identity, overwrite)
    target.refuse_overlap(source.folder)
    unfinished = target.work
    if target.is_finished():
        unfinished.tidy()
        return tuple(_exported(plan, target.path) for plan in plans)
    with unfinished.owned(overwrite) as work:
        for plan in plans:
            _export_denoiser(plan, target.component(work, ""), progress)
        files_of = {plan.denoiser: (plan.model_file, plan.branch_file) for plan in plans}
        target.complete_alone(work, comfyui_nvfp4_card(source, plans[0].config.recipe, files_of))
        unfinished.remove()
    return tuple(_exported(plan, target.path) for plan in plans)


def _plan(denoiser: str, component: Path, family: ModelFamily) -> _Plan:
    """Plan an export, and refuse an impossible one. Reads config.json and headers only."""
    model_config = read_model_config(component)
    if is_exported(model_config):
        raise UnsupportedError(f"{component} is an export already: give the folder that `quantize` wrote.")
    config = read_config(component)
    if not config.layers:
        raise UnsupportedError(f"{component} has no 4-bit layer, and {TARGET} needs one: {REMEDY}.")
    for name, entry in sorted(config.layers.items()):
        require_exportable(f"{name} of {denoiser}", entry)
    del model_config["quantization_config"]
    model = empty_model(model_config, config.layers, str(component))
    unread = model._keys_to_ignore_on_load_unexpected or []  # in some sources; neither diffusers nor ComfyUI has them
    rest = {
        name: form
        for name, (_, form) in files.component_forms(component).items()
        if name.rpartition(".")[0] not in config.layers and not any(re.search(pattern, name) for pattern in unread)
    }
    # ComfyUI ignores missing tensors: it would silently load another model.
    check_presence(set(rest), {n for n in model.state_dict() if n.rpartition(".")[0] not in config.layers}, "the model")
    return _Plan(denoiser, component, config, rest, _comfyui_names([*rest, *config.layers], denoiser, family))


def _comfyui_names(names: Iterable[str], denoiser: str, family: ModelFamily) -> dict[str, str]:
    found = {name: family.original_name(name) for name in names}
    unknown = sorted(name for name, theirs in found.items() if theirs is None)
    if unknown:
        raise UnsupportedError(
            f"{unknown[0]} of {denoiser} has no name in ComfyUI that TempoQuant knows for models of the family "
            f"{family.name}: load the folder with diffusers instead."
        )
    return {name: theirs for name, theirs in found.items() if theirs is not None}


def _export_denoiser(plan: _Plan, result: Path, progress: Progress) -> None:
    """Write both files beside their places, then move them there, the model's last, which marks
    both as whole.
    """
    place = result / plan.model_file
    if place.is_file():
        return
    branch_place = None if plan.branch_file is None else result / plan.branch_file
    metadata = {"tempoquant": json.dumps(_record(plan), sort_keys=True)}
    layers = plan.config.layers
    model_forms = {plan.names[name]: form for name, form in plan.rest.items()} | {
        f"{plan.names[name]}.{key}": form for name, entry in layers.items() for key, form in layer_forms(entry).items()
    }
    lora_forms = {
        f"{LORA_PREFIX}{plan.names[name]}.{key}": form
        for name, entry in layers.items()
        for key, form in branch_forms(entry).items()
    }
    partial, branch_partial = (result / f"{kind}.partial" for kind in (MODELS, LORAS))
    with disk_errors(result):
        for each in filter(None, (place, branch_place)):
            each.parent.mkdir(parents=True, exist_ok=True)
    advance = progress.start(f"Exporting {plan.denoiser}", len(layers))
    with (
        OneFileWriter(partial, model_forms, metadata) as model,
        OneFileWriter(branch_partial, lora_forms, metadata) as lora,
    ):
        for name, layer in iter_layers(plan.source):
            _add(model, f"{plan.names[name]}.", layer_tensors(layer))
            _add(lora, f"{LORA_PREFIX}{plan.names[name]}.", branch_tensors(layer))
            advance()
        for name, tensor in iter_rest(plan.source):
            if name in plan.rest:
                model.add(plan.names[name], tensor)
    with disk_errors(result):
        if branch_place is None:
            branch_partial.unlink()
        else:
            os.replace(branch_partial, branch_place)
        os.replace(partial, place)
        for folder in (result / MODELS, result / LORAS):
            if folder.is_dir():
                files.sync(folder)


def _add(file: OneFileWriter, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        file.add(f"{prefix}{key}", tensor)


def _record(plan: _Plan) -> dict[str, object]:
    """Return the files' record of their origin."""
    config = plan.config
    return {
        "calibration": None if config.calibration is None else config.calibration.to_dict(),
        "clip_ratios_carried": False,
        "denoiser": plan.denoiser,
        "export_target": TARGET,
        "library_version": library_version(),
        "notes": list(config.notes),
        "recipe": config.recipe.to_dict(),
    }


def _exported(plan: _Plan, output: Path) -> ExportedDenoiser:
    layers = plan.config.layers.values()
    names = [name for name in (plan.model_file, plan.branch_file) if name is not None]
    return ExportedDenoiser(
        denoiser=plan.denoiser,
        model_file=plan.model_file,
        branch_file=plan.branch_file,
        num_layers=len(layers),
        bits_per_weight=8 * sum(map(num_replacing_bytes, layers)) / sum(e.in_features * e.out_features for e in layers),
        num_bytes=sum((output / name).stat().st_size for name in names),
        num_clipped=sum(any(ratio != 1 for ratio in ratios) for _, ratios in clip_ratios_of(plan.source, plan.config)),
    )
