"""The quantized text encoders of a pipeline folder, from their configs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempoquant.checkpoint import read_model_config
from tempoquant.checkpoint.files import CONFIG_NAME
from tempoquant.layer_rule import TextEncoderFormat

MEASURED = "tempoquant"
"""The key of a text encoder's config.json that says what its quantization does to embeddings."""
NEEDS: dict[TextEncoderFormat, str] = {"int8": "torchao", "nf4": "bitsandbytes"}
"""The package that quantizes to a format, and that loads it again."""


@dataclass(frozen=True)
class TextEncoderContents:
    """One text encoder that transformers quantized.

    Attributes:
        component: the name of its folder.
        format: of its linears: "int8", "nf4".
        needs: the package that loads it.
        num_bytes: of its weight files.
        num_texts: that embeddings were compared on; 0 where TempoQuant did not make it.
        embedding_sqnr_db: name of an embedding to the mean over texts, in decibel; None where
            nothing changed.
    """

    component: str
    format: str
    needs: str
    num_bytes: int
    num_texts: int
    embedding_sqnr_db: Mapping[str, float | None]

    def loss_in_words(self) -> str:
        """Return a sentence of what embeddings lost."""
        if not self.num_texts:
            return "what its embeddings lost was not measured."
        found = self.embedding_sqnr_db.items()
        losses = [f"{name} {'unchanged' if db is None else f'{db:.1f} dB'}" for name, db in found]
        return f"SQNR of its embeddings, mean of {self.num_texts} texts: {', '.join(losses)}."


def quantized_text_encoders(folder: Path) -> tuple[TextEncoderContents, ...]:
    """Return the quantized text encoders of a pipeline folder, by name. Raises CheckpointError for
    a damaged config.
    """
    found = []
    for file in sorted(folder.glob(f"*/{CONFIG_NAME}")):
        config = read_model_config(file.parent)
        section = config.get("quantization_config")
        method = section.get("quant_method") if isinstance(section, dict) else None
        if "_class_name" not in config and method in NEEDS.values():
            found.append(_contents(file.parent, config, str(method)))
    return tuple(found)


def _contents(component: Path, config: Mapping[str, Any], method: str) -> TextEncoderContents:
    measured = config.get(MEASURED) or {}
    num_bytes = sum(file.stat().st_size for file in component.glob("*.safetensors"))
    format = next(name for name, package in NEEDS.items() if package == method)
    return TextEncoderContents(
        component.name,
        format,
        method,
        num_bytes,
        measured.get("num_texts", 0),
        measured.get("embedding_sqnr_db", {}),
    )
