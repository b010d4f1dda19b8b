"""A check that a reference has the same LoRAs in its weights as a quantized model; otherwise the
comparison covers more than four bits.
"""

import logging
from collections.abc import Mapping

from tempoquant.checkpoint.schema import ComponentConfig
from tempoquant.models.source import SourceModel

_logger = logging.getLogger(__name__)


def warn_of_other_loras(reference: SourceModel, models: Mapping[str, Mapping[str, ComponentConfig]]) -> None:
    """Warn of models whose weights hold other LoRAs than the reference was given, by their SHA-256.

    Args:
        models: each model's label to its denoisers' configs, see `hosts.contents.configs_of`.
    """
    given = {name: set(lora.notes) for name, lora in reference.loras.items()}
    for label, configs in models.items():
        for denoiser, config in configs.items():
            fused = {note for note in config.notes if note.startswith("the LoRA ")}
            if fused != given.get(denoiser, set()):
                _logger.warning(
                    "%s and its reference have different LoRAs in %s (%s; %s): unless the reference's files hold them, "
                    "give it the same ones with --lora, or more than four bits is compared",
                    label,
                    denoiser,
                    _words(fused),
                    _words(given.get(denoiser, set())),
                )


def _words(notes: set[str]) -> str:
    return ", ".join(sorted(note.removeprefix("the ").split(" (")[0] for note in notes)) or "none"
