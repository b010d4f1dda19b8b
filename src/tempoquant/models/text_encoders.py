"""The text encoders of a pipeline on disk: their names, and whether transformers quantized them."""

import dataclasses
import re
from typing import TYPE_CHECKING

from tempoquant.layer_rule import KEPT_TEXT_ENCODER, TextEncoderFormat
from tempoquant.models.component_files import Component

if TYPE_CHECKING:
    from tempoquant.models.source import SourceModel

_FORMAT_OF: dict[str, TextEncoderFormat] = {"torchao": "int8", "bitsandbytes": "nf4"}
_TORCHAO = r"\._weight_(?:qdata|scale|zero_point)$"
_BITSANDBYTES = r"\.weight\.(?:absmax|quant_map|quant_state\..*|nested_.*)$"
_STORED_PART = re.compile(f"{_TORCHAO}|{_BITSANDBYTES}")


def text_encoders(source: "SourceModel") -> dict[str, Component]:
    """Return the models that make embeddings of texts, by name: what a family's pipelines encode a
    prompt with.
    """
    found = {name: source.components[name] for name in source.text_components}
    return {name: each for name, each in found.items() if each.library == "transformers" and each.has_weights}


def format_of(component: Component) -> TextEncoderFormat:
    """Return what a text encoder's linears are stored in; "16bit" for one that nobody quantized."""
    return _FORMAT_OF.get(component.quantized_by or "", KEPT_TEXT_ENCODER)


def with_text_encoders_of(source: "SourceModel", other: "SourceModel") -> "SourceModel":
    """Return a pipeline whose text encoders are those of another one."""
    return dataclasses.replace(source, components={**source.components, **text_encoders(other)})


def parameter_of(name: str) -> str:
    """Return the parameter that a tensor in a quantized text encoder's file belongs to."""
    return _STORED_PART.sub(".weight", name)
