"""The step of `quantize` that leaves text encoders in fewer bits, and measures what that does to
embeddings.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tempoquant.checkpoint.files import CONFIG_NAME, sync_tree
from tempoquant.errors import RecipeError
from tempoquant.hosts.diffusers.pipeline import load_component
from tempoquant.hosts.text_encoder_contents import MEASURED
from tempoquant.hosts.text_encoders import require_quantizer, save_quantized
from tempoquant.layer_rule import KEPT_TEXT_ENCODER, TextEncoderFormat
from tempoquant.models.component_files import Component
from tempoquant.models.source import SourceModel
from tempoquant.models.text_encoders import text_encoders
from tempoquant.placement.streaming import encode_texts
from tempoquant.progress import Progress
from tempoquant.sqnr import sqnr_db

MAX_TEXTS = 12
_ANY_TEXTS = (
    "A cat walks along a garden wall in the evening sun.",
    "Waves break on a rocky shore while the camera rises slowly.",
    "A woman in a red coat turns around and smiles.",
)
"""To measure on where a recipe has no prompts."""


def check_text_encoders(source: SourceModel, format: TextEncoderFormat) -> None:
    """Raise where text encoders cannot be left in a format, before any work.

    Raises:
        RecipeError: it is known of no component that it encodes texts.
        ModelError: one is quantized already.
        UnsupportedError: the package that the format needs is not installed.
    """
    if format == KEPT_TEXT_ENCODER:
        return
    encoders = text_encoders(source)
    if not encoders:
        raise RecipeError(
            f"text_encoder = {format!r} names the text encoders of {source.name}, and which of its components these "
            f"are is not known (family {source.family.name}): leave --text-encoder out."
        )
    for component in encoders.values():
        component.require_16_bit()
    require_quantizer(format)


def quantize_text_encoders(
    source: SourceModel,
    format: TextEncoderFormat,
    texts: Sequence[str],
    targets: Mapping[str, Path],
    device: str,
    progress: Progress,
) -> None:
    """Write a pipeline's text encoders in a format; those that are there already are left as they
    are.

    Each config.json says what embeddings lost, under "tempoquant".

    Args:
        texts: to measure on, at most MAX_TEXTS, and the empty one; a few sentences where there are
            none.
        targets: component's name to where it belongs.
        device: where texts are encoded.

    Raises:
        ModelError, UnsupportedError, OutputError: as `save_quantized`.
    """
    missing = {name: each for name, each in text_encoders(source).items() if not targets[name].is_dir()}
    if format == KEPT_TEXT_ENCODER or not missing:
        return
    advance = progress.start(f"Text encoder in {format}", len(missing) + 2)
    partial = {name: targets[name].with_name(f".{name}.partial") for name in missing}
    for name, component in missing.items():
        shutil.rmtree(partial[name], ignore_errors=True)
        save_quantized(component, format, partial[name])
        advance()
    measured = list(dict.fromkeys([*(list(texts)[:MAX_TEXTS] or _ANY_TEXTS), ""]))
    before = _on_host(encode_texts(source, measured, device))
    advance()
    saved = {
        name: Component(folder, missing[name].library, missing[name].class_name) for name, folder in partial.items()
    }
    after = encode_texts(source, measured, device, {name: load_component(each, "auto") for name, each in saved.items()})
    found = {"num_texts": len(measured), "embedding_sqnr_db": _embedding_sqnr_db(before, _on_host(after))}
    for name, folder in partial.items():
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        text = json.dumps({**config, MEASURED: found}, indent=2, sort_keys=True, allow_nan=False)
        (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        sync_tree(folder)
        folder.rename(targets[name])
    advance()


def _embedding_sqnr_db(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float | None]:
    """Return each embedding's mean over texts, dB, by name; None where no text changed it."""
    names = [name for name in next(iter(before.values())) if "mask" not in name]
    found: dict[str, float | None] = {}
    for name in names:
        pairs = [(before[text][name], after[text][name]) for text in before]
        if not all(isinstance(each, torch.Tensor) and each.is_floating_point() for pair in pairs for each in pair):
            continue
        values = [value for pair in pairs if math.isfinite(value := sqnr_db(*pair))]
        found[name] = math.fsum(values) / len(values) if values else None
    return found


def _on_host(embeddings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        text: {name: each.cpu() if isinstance(each, torch.Tensor) else each for name, each in found.items()}
        for text, found in embeddings.items()
    }
