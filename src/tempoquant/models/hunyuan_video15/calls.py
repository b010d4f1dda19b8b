"""Calls of a HunyuanVideo-1.5 denoiser: their shapes, and how one runs where tensors have no
values.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tempoquant.models.family import Config, PipelineIndex
from tempoquant.models.hunyuan_video15.pipelines import takes_image

QWEN_TOKENS, SYSTEM_TOKENS, BYT5_TOKENS, IMAGE_TOKENS = 1000, 108, 256, 729
"""The tokens of a text, of the system's words before it, of the words in quotation marks in it, and
of an image.
"""
TEXT_TOKENS = QWEN_TOKENS + BYT5_TOKENS + IMAGE_TOKENS  # one stream of a block; the image's stay empty without one
TEXT_INPUTS = frozenset(
    {
        "encoder_hidden_states",
        "encoder_attention_mask",
        "encoder_hidden_states_2",
        "encoder_attention_mask_2",
        "image_embeds",
    }
)


def example_inputs(index: PipelineIndex, denoiser: Config, latents: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Return the inputs of one call, on the meta device, for latents of a shape (frames, rows,
    columns).
    """

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    inputs = {
        "hidden_states": empty(1, denoiser["in_channels"], *latents),
        "timestep": empty(1),  # the pipelines round it to the denoiser's dtype
        "encoder_hidden_states": empty(1, QWEN_TOKENS, denoiser["text_embed_dim"]),
        "encoder_attention_mask": empty(1, QWEN_TOKENS),
        "encoder_hidden_states_2": empty(1, BYT5_TOKENS, denoiser["text_embed_2_dim"]),
        "encoder_attention_mask_2": empty(1, BYT5_TOKENS),
        "image_embeds": empty(1, IMAGE_TOKENS, denoiser["image_embed_dim"]),
    }
    if denoiser.get("use_meanflow") and takes_image(index):
        inputs["timestep_r"] = empty(1)
    return inputs


def trace(denoiser: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Any:
    """Call a denoiser on the meta device, as if every token of text and image counted."""
    with _EveryTokenCounts():
        return denoiser(**inputs, return_dict=False)


class _EveryTokenCounts(TorchFunctionMode):
    """Lets every token count within this context: a mask selects all rows, its inverse none, and no
    tensor is true.

    The forward sorts its text tokens by masks, whose values do not exist on the meta device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._inverted: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__bool__:
            return False
        if func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool:
            selects_none = any(args[1] is mask for mask in self._inverted)
            return args[0][:0] if selects_none else args[0].clone()
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.__invert__:
            self._inverted.append(result)
        return result
