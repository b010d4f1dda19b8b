"""What each part of a generation holds: bytes of its weights, counted, and of its activations, traced.

The parts are built on the meta device from their configs and run there as a memory mode runs them, at the real size.
Only what repeats is cut short: two of an expert's blocks, two of the text encoder's, three latent frames of one tile.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from tempoquant.checkpoint.schema import LayerEntry
from tempoquant.checkpoint.tensors import keys_by_bin, stored_as
from tempoquant.errors import ModelError
from tempoquant.integrations.allocations import peak_bytes
from tempoquant.integrations.block_costs import Linear, foreseen_entry
from tempoquant.integrations.chunked_blocks import chunk_blocks
from tempoquant.integrations.expert_swap import parts_of
from tempoquant.integrations.host_copies import slab_bytes
from tempoquant.integrations.memory_modes import TILE_PIXELS, TILE_STRIDE
from tempoquant.integrations.residency import MAX_TOKENS
from tempoquant.integrations.sampling import SamplingSettings
from tempoquant.kernels.reference import w4a4_linear
from tempoquant.recipe import Recipe
from tempoquant.runtime.bin_clock import BinClock
from tempoquant.runtime.linear import QuantizedLinear
from tempoquant.timesteps import Expert, TimestepBins

Kernels = Literal["fp8", "int8", "bf16", "reference"]
"""How 4-bit linears compute: products of numbers expanded to one or two bytes, or plain PyTorch."""

_EXPANDED_BYTES = {"fp8": 1, "int8": 1, "bf16": 2}

_16_BIT, _32_BIT = torch.bfloat16, torch.float32
_FRAMES_PER_LATENT, _PIXELS_PER_LATENT = 4, 8
_LATENT_COPIES = 5  # float32: the latents, the sampler's last two predictions, its last sample, and its next one


@dataclass(frozen=True)
class QuantizedLayers:
    """The 4-bit layers of one expert.

    Attributes:
        entries: by module name.
        num_bins: timestep bins of the expert.
    """

    entries: Mapping[str, LayerEntry]
    num_bins: int = 1


@dataclass(frozen=True)
class ExpertBytes:
    """Bytes of one expert's weights on a device.

    Attributes:
        rest: of all that is in no block.
        blocks: of each block.
        pinned: of page-locked host memory that holds all of them.
    """

    rest: int
    blocks: tuple[int, ...]
    pinned: int

    @property
    def total(self) -> int:
        """Of the whole expert."""
        return self.rest + sum(self.blocks)


def foreseen_layers(config: Mapping[str, Any], expert: Expert, recipe: Recipe) -> QuantizedLayers:
    """What quantizing an expert with a recipe will give. Raises RecipeError for a rank or group that does not fit."""
    model = empty_expert(config)
    entries, num_bins = {}, len(recipe.bin_fractions(expert)) + 1
    for name, linear in model.named_modules():
        if not name.startswith("blocks.") or not isinstance(linear, nn.Linear):
            continue
        format = recipe.format_of(name, expert, int(name.split(".")[1]), len(model.blocks))
        if format is not None:
            shape = Linear(format, linear.out_features, linear.in_features, 0, recipe.rank_of(name, expert))
            bias = None if linear.bias is None else str(_16_BIT).removeprefix("torch.")
            entries[name] = foreseen_entry(recipe, shape, bias, num_bins)
    return QuantizedLayers(entries, num_bins)


def empty_expert(config: Mapping[str, Any], num_blocks: int | None = None) -> Any:
    """An expert on the meta device, in the dtypes in which it computes on a GPU. Raises ModelError."""
    changes = {} if num_blocks is None else {"num_layers": num_blocks}
    try:
        with torch.device("meta"):
            model = WanTransformer3DModel.from_config({**config, **changes})
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"a config does not describe a WanTransformer3DModel: {error}") from error
    for name, parameter in model.named_parameters():
        kept = any(part in name.split(".") for part in model._keep_in_fp32_modules)
        parameter.data = parameter.data.to(_32_BIT if kept else _16_BIT)
    for module in model.modules():  # the rotary tables, made from numbers
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to("meta"))
    return model.eval().requires_grad_(False)


def expert_bytes(config: Mapping[str, Any], layers: QuantizedLayers | None = None) -> ExpertBytes:
    """Exact: of every tensor in the dtype in which it is held."""
    model = empty_expert(config)
    entries = {} if layers is None else layers.entries
    for name, entry in entries.items():
        linear = nn.Module()
        for key, form in stored_as(entry, 1 if layers is None else layers.num_bins).items():
            linear.register_buffer(key, torch.empty(form.shape, dtype=form.dtype, device="meta"))
        model.set_submodule(name, linear)
    rest, *blocks = [[tensor.nbytes for tensor in part] for part in parts_of(model)]
    pinned = slab_bytes(itertools.chain(rest, *blocks))
    return ExpertBytes(sum(rest), tuple(sum(block) for block in blocks), pinned)


def denoising_bytes(
    config: Mapping[str, Any], layers: QuantizedLayers | None, size: SamplingSettings, kernels: Kernels = "fp8"
) -> int:
    """Of one call of an expert, and of what the sampling loop holds meanwhile."""
    model = empty_expert(config, min(2, int(config["num_layers"])))
    if layers is not None:
        present = {name: entry for name, entry in layers.entries.items() if int(name.split(".")[1]) < len(model.blocks)}
        for name, entry in present.items():
            model.set_submodule(
                name, _ReferenceLinear(entry) if kernels == "reference" else _ForeseenLinear(entry, kernels)
            )
    chunk_blocks(model)
    shape = _latent_shape(size)
    latents = torch.empty(1, config["in_channels"], *shape, dtype=_16_BIT, device="meta")
    text = torch.empty(1, MAX_TOKENS, config["text_dim"], dtype=_16_BIT, device="meta")
    timestep = torch.empty(1, device="meta")
    call = {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": text, "return_dict": False}
    num_latents, channels = math.prod(shape), config["out_channels"]
    condition = config["in_channels"] - channels
    held = num_latents * (_LATENT_COPIES * channels * 4 + condition * 4 + channels * 2) + latents.nbytes
    return peak_bytes(lambda: model(**call)) + held + 2 * text.nbytes  # with the prompt and without


class _ForeseenLinear(nn.Module):
    """A 4-bit linear as kernels run it: it allocates and does not compute.

    Beside its output: the rounded input and the weight, both expanded to what is multiplied, the input's product
    with the branch, and what it has by timestep bin, taken out of the other bins'.
    """

    def __init__(self, entry: LayerEntry, kernels: Kernels) -> None:
        super().__init__()
        self._entry, self._num_bytes = entry, _EXPANDED_BYTES[kernels]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        entry, tokens = self._entry, x.shape[:-1]
        shapes = [(*tokens, entry.in_features), (entry.out_features, entry.in_features)]
        scratch = [x.new_empty((*shape, self._num_bytes), dtype=torch.uint8) for shape in shapes]
        scratch.append(x.new_empty((*tokens, entry.rank)))
        of_one_bin = stored_as(entry, 1)
        scratch += [x.new_empty(of_one_bin[key].shape, dtype=of_one_bin[key].dtype) for key in keys_by_bin(entry)]
        return x.new_empty((*tokens, entry.out_features))


class _ReferenceLinear(nn.Module):
    """A 4-bit linear as plain PyTorch runs it."""

    def __init__(self, entry: LayerEntry) -> None:
        super().__init__()
        self._entry = entry
        self._linear = QuantizedLinear(entry, BinClock(TimestepBins()), _16_BIT, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        linear, entry = self._linear, self._entry
        transform, weight = linear.input_transform(), linear.weight_tensors()
        return w4a4_linear(x, transform, weight, entry.format, entry.activation_scale_rule)


@dataclass(frozen=True)
class AutoencoderBytes:
    """The autoencoder's weights, and its activations in tiles; float32."""

    weights: int
    encoding: int
    decoding: int


def autoencoder_bytes(config: Mapping[str, Any], size: SamplingSettings) -> AutoencoderBytes:
    """Of encoding the first frame (with the empty frames after it) and of decoding the video. Raises ModelError."""
    try:
        with torch.device("meta"):
            vae = AutoencoderKLWan.from_config(dict(config)).eval().requires_grad_(False)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"a config does not describe an AutoencoderKLWan: {error}") from error
    # Three latent frames: the first is coded differently, and the third finds all that is kept from earlier ones.
    frames, height, width = (min(a, b) for a, b in zip(_latent_shape(size), (3, *2 * [_TILE]), strict=True))
    tile = torch.empty(1, vae.config.z_dim, frames, height, width, device="meta")
    num_frames = _FRAMES_PER_LATENT * (frames - 1) + 1
    pixels = torch.empty(1, 3, num_frames, height * _PIXELS_PER_LATENT, width * _PIXELS_PER_LATENT, device="meta")
    encoding = peak_bytes(lambda: vae.encode(pixels))
    vae.decoder.register_forward_hook(lambda _m, _args, decoded: decoded[:, :, :, :1, :1].clone())  # it leaves
    decoding = peak_bytes(lambda: vae.decode(tile))
    latents = 4 * math.prod(_latent_shape(size))
    overlapping = (TILE_PIXELS / TILE_STRIDE) ** 2 + 2  # tiles, joined to rows, joined to the whole
    video = 4 * 3 * size.num_frames * size.height * size.width
    encoded = round(2 * vae.config.z_dim * latents * overlapping)
    # The empty frames are made, then joined to the first; only the joined ones are left when the encoder runs.
    encoding = max(2 * video, video + encoding + encoded)
    weights = sum(tensor.nbytes for tensor in vae.state_dict().values())
    return AutoencoderBytes(weights, encoding, decoding + 3 * vae.config.z_dim * latents)


_TILE = TILE_PIXELS // _PIXELS_PER_LATENT


@dataclass(frozen=True)
class TextEncoderBytes:
    """The text encoder's weights, all and of what is on the device at once, and its activations; 16-bit."""

    weights: int
    on_device: int
    encoding: int


def text_encoder_bytes(config: Mapping[str, Any]) -> TextEncoderBytes:
    """Of encoding one text of 512 tokens. Raises ModelError."""
    try:
        whole = UMT5Config(**config)
        short = UMT5Config(**{**config, "num_layers": min(2, whole.num_layers)})
        with torch.device("meta"):
            models = [UMT5EncoderModel(each).eval().to(_16_BIT) for each in (whole, short)]
    except (TypeError, ValueError, RuntimeError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"a config does not describe a UMT5EncoderModel: {error}") from error
    encoder, traced = models
    blocks = [sum(parameter.nbytes for parameter in block.parameters()) for block in encoder.encoder.block]
    weights = sum(parameter.nbytes for parameter in encoder.parameters())
    rest = weights - sum(blocks) - encoder.shared.weight.nbytes
    embedded = torch.empty(1, MAX_TOKENS, whole.d_model, dtype=_16_BIT, device="meta")
    mask = torch.empty(1, 1, MAX_TOKENS, MAX_TOKENS, dtype=_16_BIT, device="meta")
    encoding = peak_bytes(lambda: traced(inputs_embeds=embedded, attention_mask=mask)) + embedded.nbytes + mask.nbytes
    return TextEncoderBytes(weights, rest + max(blocks), encoding)


def _latent_shape(size: SamplingSettings) -> tuple[int, int, int]:
    frames = (size.num_frames - 1) // _FRAMES_PER_LATENT + 1
    return frames, size.height // _PIXELS_PER_LATENT, size.width // _PIXELS_PER_LATENT
