"""The tracing of a text encoder: see `ModelFamily.traced_text_encoder`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

Config = Mapping[str, Any]
"""A component's config.json."""


def _fewer_layers(config: Config, num_blocks: int) -> dict[str, Any]:
    return {"num_layers": min(num_blocks, int(config["num_layers"]))}


def _call_with_embeddings(encoder: nn.Module, embedded: torch.Tensor, mask: torch.Tensor) -> Any:
    return encoder(inputs_embeds=embedded, attention_mask=mask)


class TracedTextEncoder(NamedTuple):
    """The tracing of a text encoder: see `ModelFamily.traced_text_encoder`."""

    shortened: Callable[[Config, int], dict[str, Any]] = _fewer_layers
    call: Callable[[nn.Module, torch.Tensor, torch.Tensor], Any] = _call_with_embeddings


PLAIN_ENCODER = TracedTextEncoder()
"""The tracing of a plain text encoder, such as T5's."""
