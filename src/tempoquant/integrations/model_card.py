"""The README.md of a quantized pipeline: base model, licence, recipe, bits, measured sizes."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from tempoquant.checkpoint.reader import read_config, read_model_config
from tempoquant.checkpoint.tensors import num_replacing_bytes
from tempoquant.integrations.expert_weights import EXPERT_COMPONENTS
from tempoquant.integrations.nunchaku_lite import exported_config
from tempoquant.recipe import Recipe
from tempoquant.timesteps import Expert


def model_card(partial: Path, source: Path, settings: dict[str, Any], hub_id: str | None) -> str:
    """Text of the model card for a pipeline whose components are already written to `partial`.

    The base model is `hub_id`, or what the source's own card names; the licence is the source card's.
    """
    recipe = Recipe.from_dict(settings)
    base = _source_card(source)
    data = ModelCardData(
        license=base.get("license"),
        base_model=hub_id or base.get("base_model"),
        library_name="diffusers",
        pipeline_tag="image-to-video",
        tags=["tempoquant", "quantized", "W4A4", recipe.format],
    )
    rows = [_expert_row(partial / component, source / component, expert.value)
            for expert, component in EXPERT_COMPONENTS.items()]  # fmt: skip
    body = _BODY.format(recipe=recipe.name, rows="\n".join(rows), toml=recipe.to_toml())
    return f"---\n{data.to_yaml()}\n---\n{body}"


def export_card(partial: Path, source: Path) -> str:
    """Text of the model card for an export of the quantized pipeline `source`, whose components are in `partial`."""
    base = _source_card(source)
    kept = {key: base[key] for key in ("license", "base_model", "pipeline_tag") if base.get(key)}
    model_config = read_model_config(partial / EXPERT_COMPONENTS[Expert.HIGH_NOISE])
    config = exported_config(model_config, "the export")
    precision = model_config["quantization_config"]["svdq_w4a4"]["precision"]
    data = ModelCardData(
        library_name="diffusers", tags=["tempoquant", "quantized", "W4A4", "nunchaku_lite", precision], **kept
    )
    body = _EXPORT_BODY.format(recipe=config.recipe.name, precision=precision, toml=config.recipe.to_toml())
    return f"---\n{data.to_yaml()}\n---\n{body}"


def _source_card(source: Path) -> dict[str, Any]:
    """Metadata of the source's own card; empty when it has none."""
    file = source / "README.md"
    return dict(ModelCard.load(file).data.to_dict()) if file.is_file() else {}


def _expert_row(component: Path, source: Path, name: str) -> str:
    config = read_config(component)
    layers = config.layers.values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    bits = 8 * sum(num_replacing_bytes(layer, config.bins.num_bins) for layer in layers) / max(1, weights)
    before, after = _size_mib(source), _size_mib(component)
    return f"| {name} | {len(layers)} | {bits:.3f} | {before:,.1f} | {after:,.1f} |"


def _size_mib(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20


_BODY = """
# A 4-bit Wan2.2 image-to-video pipeline

Quantized by [TempoQuant](https://pypi.org/project/tempoquant/) with the recipe `{recipe}`: 4-bit weights and 4-bit
activations (W4A4) in the linears of every transformer block, a 16-bit low-rank branch where the recipe has one; all
else is as it was.

```python
import tempoquant  # registers the quantizer with diffusers
from diffusers import WanImageToVideoPipeline

pipeline = WanImageToVideoPipeline.from_pretrained("this folder")
```

| expert | 4-bit layers | bits a weight, all included | 16-bit, MiB on disk | this, MiB on disk |
|---|---|---|---|---|
{rows}

Bits a weight count everything that is stored in place of the 16-bit weights. To measure the quality against the 16-bit
model on your own prompts: `tempoquant compare REFERENCE THIS_FOLDER --samples-from prompts.jsonl`.

## Recipe

```toml
{toml}```
"""

_EXPORT_BODY = """
# A 4-bit Wan2.2 image-to-video pipeline for diffusers' nunchaku kernels

Quantized by [TempoQuant](https://pypi.org/project/tempoquant/) with the recipe `{recipe}` and exported
(`tempoquant export --to nunchaku-lite`): {precision} weights and activations (W4A4) in the linears of every transformer
block, a 16-bit low-rank branch beside each. Plain diffusers loads it, with the package `kernels` and a CUDA device:

```python
# DIFFUSERS_TRUST_REMOTE_KERNELS=true lets diffusers fetch and run the kernels
import torch
from diffusers import WanImageToVideoPipeline

pipeline = WanImageToVideoPipeline.from_pretrained("this folder", dtype=torch.bfloat16)
```

INT4 needs Turing or newer, NVFP4 Blackwell; Hopper is not supported by those kernels. Clip ratios are not carried.
`tempoquant compare REFERENCE THIS_FOLDER` scores it on any machine, with the kernels' rounding done in plain PyTorch.

## Recipe

```toml
{toml}```
"""
