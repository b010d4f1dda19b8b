"""Whether a reference has the LoRAs in its weights that a quantized model has: else more than four bits is compared."""

import logging
from collections.abc import Mapping

from tempoquant.hosts.contents import configs_of
from tempoquant.models.source import SourceModel

_logger = logging.getLogger(__name__)


def warn_of_other_loras(reference: SourceModel, models: Mapping[str, SourceModel]) -> None:
    """Log which models have other LoRAs in their weights than the reference was given, by their SHA-256."""
    given = {name: set(lora.notes) for name, lora in reference.loras.items()}
    for label, source in models.items():
        for denoiser, config in configs_of(source.folder).items():
            fused = {note for note in config.notes if note.startswith("the LoRA ")}
            if fused != given.get(denoiser, set()):
                _logger.warning(
                    "%s and its reference have different LoRAs in %s (%s; %s): unless the reference's files hold them, "
                    "give it the same ones with --lora, or more than four bits is compared",
                    label, denoiser, _words(fused), _words(given.get(denoiser, set())),
                )  # fmt: skip


def _words(notes: set[str]) -> str:
    return ", ".join(sorted(note.removeprefix("the ").split(" (")[0] for note in notes)) or "none"
