"""The models of TempoQuant in ComfyUI's folders, which a node offers."""

import os
from collections.abc import Iterable
from pathlib import Path

from tempoquant.checkpoint.files import CONFIG_NAME
from tempoquant.checkpoint.reader import read_model_config
from tempoquant.errors import CheckpointError
from tempoquant.hosts.comfyui.exported_file import QUANTIZATION, is_exported_file
from tempoquant.hosts.comfyui.stored import following_links
from tempoquant.models.pipeline_folder import index_file

_SUFFIX = ".safetensors"


def list_models(roots: Iterable[str | Path]) -> dict[str, Path]:
    """Find every folder that `quantize` wrote and every file that `export --to comfyui` wrote.

    Args:
        roots: folders to search, links followed; missing ones are skipped. Of equal names, the
            first counts.

    Returns:
        Names, relative to their root and with forward slashes, to places, sorted. Only headers are
        read.
    """
    found: dict[str, Path] = {}
    for root in map(Path, roots):
        for place in _models_in(root):
            found.setdefault(place.relative_to(root).as_posix(), place)
    return dict(sorted(found.items()))


def _models_in(root: Path) -> Iterable[Path]:
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # links in a circle
            folders.clear()
            continue
        seen.add(real)
        here = Path(folder)
        if index_file(here) is not None:
            folders.clear()
            if any(map(_is_quantized, here.glob(f"*/{CONFIG_NAME}"))):
                yield here
        elif CONFIG_NAME in files and _is_quantized(here / CONFIG_NAME):
            folders.clear()
            yield here
        else:
            yield from (here / name for name in files if name.endswith(_SUFFIX) and _is_export(here / name))


def _is_quantized(config: Path) -> bool:
    try:
        return QUANTIZATION in read_model_config(following_links(config.parent))
    except CheckpointError:
        return False  # another program's, or half copied: loading it by name reports the error


def _is_export(file: Path) -> bool:
    try:
        return is_exported_file(following_links(file))
    except CheckpointError:
        return False
