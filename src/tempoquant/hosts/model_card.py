"""The README.md of a quantized pipeline: base model, licence, recipe, bits, measured sizes."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from tempoquant.checkpoint.reader import read_config, read_model_config
from tempoquant.checkpoint.schema import ComponentConfig
from tempoquant.checkpoint.tensors import num_replacing_bytes
from tempoquant.hosts.nunchaku.config import exported_config
from tempoquant.hosts.text_encoder_contents import quantized_text_encoders
from tempoquant.models.source import SourceModel
from tempoquant.recipe import Recipe


def model_card(partial: Path, source: SourceModel, settings: dict[str, Any]) -> str:
    """Write the model card of a pipeline whose components are already in `partial`.

    The base model is the source's hub id, or the one that the source's card names; the licence is
    the source card's.
    """
    recipe = Recipe.from_dict(settings)
    base = _source_card(source)
    data = ModelCardData(
        license=base.get("license"),
        base_model=source.hub_id or base.get("base_model"),
        library_name="diffusers",
        pipeline_tag=source.pipeline_tag,
        tags=["tempoquant", "quantized", "W4A4", recipe.format],
        **{key: base[key] for key in ("license_name", "license_link") if base.get(key)},
    )
    rows = [_row(partial / each.component, source, each.name) for each in source.denoisers]
    encoders = quantized_text_encoders(partial)
    notes = [
        f"{each.component}: linears in {each.format}, which {each.needs} loads; {each.loss_in_words()}"
        for each in encoders
    ]
    notes += [f"{each.name}: {note}." for each in source.denoisers for note in source.component_of(each.name).notes]
    body = _BODY.format(
        title=source.family.title(source.index),
        pipeline=source.index.class_name,
        recipe=recipe.name,
        rows="\n".join(rows),
        but=", but for text encoders (below)" if encoders else "",
        notes="".join(f"- {note}\n" for note in notes),
        toml=recipe.to_toml(),
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"


def export_card(partial: Path, source: SourceModel) -> str:
    """Write the model card of an export of the quantized pipeline `source`, whose components are in
    `partial`.
    """
    base = _source_card(source)
    kept = {key: base[key] for key in ("license", "base_model", "pipeline_tag") if base.get(key)}
    model_config = read_model_config(partial / source.denoisers[0].component)
    config = exported_config(model_config, "the export")
    precision = model_config["quantization_config"]["svdq_w4a4"]["precision"]
    data = ModelCardData(
        library_name="diffusers", tags=["tempoquant", "quantized", "W4A4", "nunchaku_lite", precision], **kept
    )
    body = _EXPORT_BODY.format(
        title=source.family.title(source.index),
        pipeline=source.index.class_name,
        recipe=config.recipe.name,
        precision=precision,
        toml=config.recipe.to_toml(),
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"


def comfyui_nvfp4_card(source: SourceModel, recipe: Recipe, files_of: Mapping[str, tuple[str, str | None]]) -> str:
    """Write the README.md of an export for ComfyUI's own `nvfp4`.

    Args:
        source: the quantized pipeline.
        recipe: of its quantization.
        files_of: denoiser to the file of the model and that of its branches, relative to the
            export.
    """
    base = _source_card(source)
    kept = {key: base[key] for key in ("license", "base_model", "pipeline_tag") if base.get(key)}
    data = ModelCardData(tags=["tempoquant", "quantized", "comfyui", "nvfp4"], **kept)
    rows = [f"| {name} | `{model}` | {f'`{lora}`' if lora else 'none'} |" for name, (model, lora) in files_of.items()]
    title = source.family.title(source.index)
    body = _COMFYUI_BODY.format(title=title, recipe=recipe.name, rows="\n".join(rows), toml=recipe.to_toml())
    return f"---\n{data.to_yaml()}\n---\n{body}"


def comfyui_card(source: SourceModel, config: ComponentConfig) -> str:
    """Write the model card of an export of the quantized pipeline `source` to ComfyUI's files.

    Args:
        config: of one of its denoisers.
    """
    base = _source_card(source)
    kept = {key: base[key] for key in ("license", "base_model", "pipeline_tag") if base.get(key)}
    data = ModelCardData(tags=["tempoquant", "quantized", "W4A4", "comfyui", config.recipe.format], **kept)
    body = _COMFYUI_NODES_BODY.format(
        title=source.family.title(source.index),
        recipe=config.recipe.name,
        toml=config.recipe.to_toml(),
        files="\n".join(f"- `{each.name}.safetensors`" for each in source.denoisers),
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"


def _source_card(source: SourceModel) -> dict[str, Any]:
    """Return the metadata of the source's own card; empty if it has none, or damaged YAML."""
    file = source.folder / "README.md"
    try:
        return dict(ModelCard.load(file).data.to_dict()) if file.is_file() else {}
    except (ValueError, YAMLError):  # somebody else's mistake costs no work here
        warnings.warn(f"the YAML at the top of {file} cannot be read: the new card names no licence.", stacklevel=2)
        return {}


def _row(component: Path, source: SourceModel, name: str) -> str:
    config = read_config(component)
    layers = config.layers.values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    bits = 8 * sum(num_replacing_bytes(layer, config.bins.num_bins) for layer in layers) / max(1, weights)
    before, after = _size_mib(source.component_of(name).weight_files), _size_mib(component.glob("*.safetensors"))
    return f"| {name} | {len(layers)} | {bits:.3f} | {before:,.1f} | {after:,.1f} |"


def _size_mib(files: Iterable[Path]) -> float:
    return sum(file.stat().st_size for file in files) / 2**20


_BODY = """
# A 4-bit {title}

Quantized by [TempoQuant](https://pypi.org/project/tempoquant/) with the recipe `{recipe}`: 4-bit weights and 4-bit
activations (W4A4) in the linears of every transformer block, a 16-bit low-rank branch where the recipe has one; all
else is as it was{but}.

```python
import tempoquant  # registers the quantizer with diffusers
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("this folder")
```

| denoiser | 4-bit layers | bits a weight, all included | source, MiB on disk | this, MiB on disk |
|---|---|---|---|---|
{rows}

{notes}
Bits a weight count everything that is stored in place of the 16-bit weights. To measure the quality against the 16-bit
model on your own prompts: `tempoquant compare REFERENCE THIS_FOLDER --samples-from prompts.jsonl`.

## Recipe

```toml
{toml}```
"""

_EXPORT_BODY = """
# A 4-bit {title} for diffusers' nunchaku kernels

Quantized by [TempoQuant](https://pypi.org/project/tempoquant/) with the recipe `{recipe}` and exported
(`tempoquant export --to nunchaku-lite`): {precision} weights and activations (W4A4) in the linears of every transformer
block, a 16-bit low-rank branch beside each. Plain diffusers loads it, with the package `kernels` and a CUDA device:

```python
# DIFFUSERS_TRUST_REMOTE_KERNELS=true lets diffusers fetch and run the kernels
import torch
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("this folder", dtype=torch.bfloat16)
```

INT4 needs Turing or newer, NVFP4 Blackwell; Hopper is not supported by those kernels. Clip ratios are not carried.
`tempoquant compare REFERENCE THIS_FOLDER` scores it on any machine, with the kernels' rounding done in plain PyTorch.

## Recipe

```toml
{toml}```
"""

_COMFYUI_BODY = """
# A 4-bit {title} for ComfyUI, without a node

Quantized by [TempoQuant](https://pypi.org/project/tempoquant/) with the recipe `{recipe}` and exported
(`tempoquant export --to comfyui-nvfp4`). Copy both folders into ComfyUI's `models` folder, and wire for each denoiser
**Load Diffusion Model** → **Load LoRA (Bypass, Model Only)** at strength 1 with its own branch file: the 4-bit weights
are the remainder that the branch leaves, and mean nothing without it.

| denoiser | model | branch |
|---|---|---|
{rows}

One such bypass holds for a model: a second one takes the first one's place, and the branch is gone. An ordinary LoRA
node changes the 4-bit weights, whose input is scaled, and is wrong on these files. To use a LoRA, fuse it before
quantizing: `tempoquant quantize --lora`.

NVIDIA Blackwell multiplies in four bits; every other device dequantizes the weights and multiplies in 16 (W4A16).

## Recipe

```toml
{toml}```
"""

_COMFYUI_NODES_BODY = """
# A 4-bit {title} for ComfyUI

Quantized by [TempoQuant](https://pypi.org/project/tempoquant/) with the recipe `{recipe}` and exported
(`tempoquant export --to comfyui`): 4-bit weights and 4-bit activations (W4A4) in the linears of every transformer
block.

{files}

Put the folder into ComfyUI's `models/diffusion_models` and load it with TempoQuant's nodes, which run what the files
hold as it was quantized. ComfyUI's own loader does not read them. Text encoder and VAE are the model's usual ones.

## Recipe

```toml
{toml}```
"""
