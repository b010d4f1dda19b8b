"""Two experts of one model, each from its slot of a node: their order, and whether they belong
together.
"""

import logging
from pathlib import Path

from tempoquant.errors import ModelError
from tempoquant.hosts.comfyui.stored import StoredDenoiser, open_denoisers

_logger = logging.getLogger(__name__)


def open_experts(noisier: str | Path, cleaner: str | Path) -> tuple[StoredDenoiser, StoredDenoiser]:
    """Open the noisier and the cleaner expert, each from a folder of both or from its own file.

    A file in the other one's slot is loaded as asked, and a warning says so.

    Raises:
        ModelError: they belong to different models, or one is no expert of two.
        TempoQuantError: as `open_denoisers` raises.
    """
    first, second = open_denoisers(noisier)[0], open_denoisers(cleaner)[-1]
    _require_one_model(first, second)
    if first.name == second.name:
        _logger.warning(
            "TempoQuant: both slots hold the %s expert (%s): the other half of the steps will run with the wrong one.",
            first.name,
            first.where,
        )
    elif first.header.timesteps[0] < second.header.timesteps[0]:
        _logger.warning(
            "TempoQuant: the slot of the noisier expert holds %s, that of the cleaner one %s: exchange them, or the "
            "video will be noise.",
            first.name,
            second.name,
        )
    return first, second


def _require_one_model(first: StoredDenoiser, second: StoredDenoiser) -> None:
    one, other = first.header.config, second.header.config
    ignored = {key for config in (one, other) for key in config if key.startswith("_") and key != "_class_name"}
    for key in sorted((one.keys() | other.keys()) - ignored):
        if one.get(key) != other.get(key):
            raise ModelError(
                f"{first.where} and {second.where} are of different models ({key} is {one.get(key)} in one and "
                f"{other.get(key)} in the other): load two experts of the same one."
            )
