"""The loss of embeddings by a quantized text encoder: one text's, by two pipelines."""

from collections.abc import Mapping
from typing import Any

import torch

from tempoquant.layer_rule import KEPT_TEXT_ENCODER
from tempoquant.models.families import facts_of
from tempoquant.models.source import SourceModel
from tempoquant.models.text_encoders import format_of, text_encoders
from tempoquant.sqnr import sqnr_db

PREFIX = "text: "
"""Of the names of embeddings in a file that holds latents too."""


def has_quantized_text_encoder(source: SourceModel) -> bool:
    """Return whether transformers quantized a text encoder of a pipeline."""
    return any(format_of(each) != KEPT_TEXT_ENCODER for each in text_encoders(source).values())


@torch.no_grad()
def embeddings_of(pipeline: Any, text: str) -> dict[str, torch.Tensor]:
    """Return the embeddings of a text, on the host, by names with PREFIX; no masks."""
    family = facts_of(pipeline).family
    found = family.encoded_text(pipeline, text, family.text_tokens, pipeline._execution_device)
    tensors = {name: each for name, each in found.items() if isinstance(each, torch.Tensor)}
    return {
        PREFIX + name: each.detach().to("cpu", copy=True).contiguous()
        for name, each in tensors.items()
        if each.is_floating_point()
    }


def embedding_db(reference: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """Return the SQNR, in decibel, of the embedding that lost most. Raises ModelError."""
    return min(sqnr_db(embedding, other[name]) for name, embedding in reference.items())
