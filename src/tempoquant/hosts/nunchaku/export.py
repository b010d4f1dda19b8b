"""export: a quantized pipeline becomes one that stock diffusers runs with nunchaku's fused kernels.

One layer at a time is in memory, and OUTPUT is complete or absent. After an interruption, finished
denoisers are kept in OUTPUT.unfinished, and the same call resumes there.
"""

import functools
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tempoquant.checkpoint import files, iter_layers, iter_rest, read_config, read_model_config
from tempoquant.checkpoint.schema import ComponentConfig
from tempoquant.checkpoint.shards import ShardWriter
from tempoquant.checkpoint.writer import library_version
from tempoquant.errors import UnsupportedError
from tempoquant.hosts.empty_model import empty_model
from tempoquant.hosts.model_card import export_card
from tempoquant.hosts.nunchaku.config import (
    BINS,
    TARGET,
    common_format,
    common_rank,
    exported_entry,
    is_exported,
    quantization_config,
    require_exportable,
    to_target,
)
from tempoquant.hosts.nunchaku.reader import check_names
from tempoquant.models.fingerprint import fingerprint
from tempoquant.models.source import SourceModel
from tempoquant.output.output_folder import ExportIdentity, OutputFolder
from tempoquant.progress import SILENT, Progress

MAX_SHARD_BYTES = 2**30


@dataclass(frozen=True)
class _Plan:
    """One denoiser's export.

    Attributes:
        source: its quantized component.
        config: its content.
        exported: the content of its export, without notes and hashes.
    """

    source: Path
    config: ComponentConfig
    exported: ComponentConfig


def export(
    folder: str | Path, output: str | Path, *, overwrite: bool = False, link: bool = False, progress: Progress = SILENT
) -> Path:
    """Write all denoisers as `nunchaku_lite`, and everything else of the pipeline as it is.

    Args:
        folder: that `quantize` wrote.
        output: a folder that does not exist or is empty. A finished export of the same folder is
            left unchanged.
        overwrite: replace the content of `output`.
        link: hard-link all other components instead of copying them.
        progress: shows how far the job is.

    Returns:
        The output folder.

    Raises:
        UnsupportedError: the target cannot hold a layer; nothing is written then.
        TempoQuantError: see tempoquant.errors.
    """
    source = SourceModel.open(folder)
    plans = {each.component: _plan(source.components[each.component].folder) for each in source.denoisers}
    target = OutputFolder(
        Path(output), ExportIdentity(TARGET, fingerprint(source, progress), library_version()), overwrite
    )
    target.refuse_overlap(source.folder)
    if link:
        target.check_link(source)
    unfinished = target.work
    if target.is_finished():
        unfinished.tidy()
        return target.path
    with unfinished.owned(overwrite) as work:
        for component, plan in plans.items():
            place = target.component(work, component)
            if not place.is_dir():
                _export_component(plan, place, work / f"{place.name}.partial", progress)
        card = functools.partial(export_card, source=source)
        target.complete(work, source, link, card, progress=progress)
        unfinished.remove()
    return target.path


def _plan(component: Path) -> _Plan:
    """Plan an export, and refuse an impossible one. Reads config.json only."""
    if is_exported(read_model_config(component)):
        raise UnsupportedError(f"{component} is an export already: give the folder that `quantize` wrote.")
    config = read_config(component)
    for name, entry in sorted(config.layers.items()):
        require_exportable(f"{name} of {config.denoiser}", entry)
    common_format(config.layers)
    rank = common_rank(config.layers)
    layers = {name: exported_entry(entry, rank) for name, entry in config.layers.items()}
    return _Plan(
        component,
        config,
        ComponentConfig(config.denoiser, BINS, layers, config.recipe, config.library_version, config.calibration),
    )


def _export_component(plan: _Plan, place: Path, partial: Path, progress: Progress) -> None:
    """Write one denoiser to `partial`, check its names, then move it to its place."""
    model_config = read_model_config(plan.source)
    del model_config["quantization_config"]
    model = empty_model(model_config, plan.config.layers, str(plan.source))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    place.parent.mkdir(exist_ok=True)
    out = ShardWriter(place, partial, MAX_SHARD_BYTES)
    rank = common_rank(plan.exported.layers)
    advance = progress.start(f"Exporting {plan.config.denoiser}", len(plan.config.layers))
    num_clipped = 0
    for name, layer in iter_layers(plan.source):
        num_clipped += bool((layer.clip_ratio != 1).any())
        for key, tensor in to_target(layer, rank).items():
            out.add(f"{name}.{key}", tensor)
        advance()
    unread = model._keys_to_ignore_on_load_unexpected or []  # in some sources; diffusers would ignore them
    for name, tensor in iter_rest(plan.source):
        if any(re.search(pattern, name) for pattern in unread):
            continue
        # diffusers casts all of it to its compute dtype while loading, whatever the file says.
        out.add(name, tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor)
    hashes = out.name_shards()
    forms = files.component_forms(partial)
    check_names({name: form for name, (_, form) in forms.items()}, plan.exported.layers, model)
    out.write_json(files.CONFIG_NAME, {**model_config, "quantization_config": _config(plan, num_clipped, hashes)})
    out.place()


def _config(plan: _Plan, num_clipped: int, hashes: Mapping[str, str]) -> dict[str, object]:
    lost = f"{num_clipped} of {len(plan.config.layers)} layers had one other than 1" if num_clipped else "all were 1"
    notes = (*plan.config.notes, f"exported to {TARGET}: clip ratios are not carried ({lost})")
    return quantization_config(replace(plan.exported, notes=notes, weight_sha256=hashes))
