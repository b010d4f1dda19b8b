"""The memory of each part of a generation: bytes of weights, counted, and activations, traced.

Parts built from configs run on the meta device as in a memory mode, at the real size. Only repeats
are cut: to two blocks of a denoiser and of a text encoder, and three latent frames of one tile.
"""

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from tempoquant.calibrate.arguments import tensors_in
from tempoquant.checkpoint.schema import LayerEntry
from tempoquant.checkpoint.tensors import keys_by_bin, stored_as
from tempoquant.hosts.text_encoders import linear_bytes
from tempoquant.kernels.reference import w4a4_linear
from tempoquant.kernels.weights_alone import EXPANDED_AT_ONCE, weights_alone_linear
from tempoquant.layer_rule import KEPT_TEXT_ENCODER, TextEncoderFormat
from tempoquant.models.pipeline_configs import PipelineConfigs
from tempoquant.models.recipe_fit import check_linear_fits
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.placement.denoiser_swap import Placed, parts_of
from tempoquant.placement.host_copies import slab_bytes
from tempoquant.placement.tiles import TILE_PIXELS, tile_stride
from tempoquant.planning.allocations import peak_bytes
from tempoquant.planning.foreseen import Linear, foreseen_entry
from tempoquant.recipe import Recipe
from tempoquant.runtime.bin_clock import BinClock
from tempoquant.runtime.linear import QuantizedLinear
from tempoquant.timesteps import TimestepBins

Kernels = Literal["fp4", "fp8", "int8", "bf16", "reference"]
"""How 4-bit linears compute, what takes least memory first, named as by `dispatch.Backend`:
products of packed codes, of numbers expanded to one or two bytes, or plain PyTorch."""


def most_of(names: Collection[str]) -> Kernels:
    """Return which of these kernels takes most memory; fp8, which is most usual, of none."""
    known: tuple[Kernels, ...] = get_args(Kernels)
    return max((name for name in known if name in names), key=known.index, default="fp8")


_EXPANDED_BYTES = {"fp8": 1, "int8": 1, "bf16": 2}

_16_BIT, _32_BIT = torch.bfloat16, torch.float32
_LATENT_COPIES = 5  # float32: the latents, the sampler's last two predictions, its last sample, and its next one


@dataclass(frozen=True)
class QuantizedLayers:
    """The 4-bit layers of one denoiser.

    Attributes:
        entries: by module name.
        num_bins: timestep bins of the denoiser.
    """

    entries: Mapping[str, LayerEntry]
    num_bins: int = 1


@dataclass(frozen=True)
class DenoiserBytes:
    """Bytes of one denoiser's weights on a device.

    Attributes:
        rest: of everything outside the blocks.
        blocks: of each block.
        pinned: of page-locked host memory that holds all of them.
        stored: of its weight files; None where they hold the same dtypes, or are not known.
    """

    rest: int
    blocks: tuple[int, ...]
    pinned: int
    stored: int | None = None

    @property
    def total(self) -> int:
        """Return the bytes of the whole denoiser."""
        return self.rest + sum(self.blocks)


def foreseen_layers(configs: PipelineConfigs, denoiser: str, recipe: Recipe) -> QuantizedLayers:
    """Predict a denoiser's layers by a recipe. Raises RecipeError if rank or group do not fit."""
    family, model = configs.family, empty_denoiser(configs, denoiser)
    blocks = family.blocks_of(model)
    entries, num_bins = {}, len(recipe.bin_fractions_of(denoiser)) + 1
    for name, linear in model.named_modules():
        block = family.block_of(name)
        alone = family.is_modulation(name)
        if block is None or not isinstance(linear, nn.Linear) or not (alone or family.may_quantize(name)):
            continue
        format = recipe.format_of(name, denoiser, blocks.index(block), len(blocks), alone)
        if format is not None:
            rank = 0 if alone else recipe.rank_of(name, denoiser)
            check_linear_fits(format, rank, f"{name} of {denoiser}", linear.out_features, linear.in_features)
            shape = Linear(format, linear.out_features, linear.in_features, 0, rank, alone)
            bias = None if linear.bias is None else str(_16_BIT).removeprefix("torch.")
            entries[name] = foreseen_entry(recipe, shape, bias, num_bins)
    return QuantizedLayers(entries, num_bins)


def empty_denoiser(configs: PipelineConfigs, denoiser: str, num_blocks: int | None = None) -> Any:
    """Return a denoiser on the meta device, in its compute dtypes on a GPU. Raises ModelError."""
    described = configs.denoiser(denoiser)
    changes = {} if num_blocks is None else configs.family.shortened(described.config, num_blocks)
    model = described.build(**changes)
    in_float32 = set(getattr(model, "_keep_in_fp32_modules", None) or [])
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(_32_BIT if in_float32 & {*name.split(".")} else _16_BIT)
    for module in model.modules():  # the rotary tables, made from numbers
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to("meta"))
    return model


def denoiser_bytes(configs: PipelineConfigs, denoiser: str, layers: QuantizedLayers | None = None) -> DenoiserBytes:
    """Count the bytes of every tensor in its dtype, exactly."""
    model = empty_denoiser(configs, denoiser)
    entries = {} if layers is None else layers.entries
    for name, entry in entries.items():
        linear = nn.Module()
        for key, form in stored_as(entry, 1 if layers is None else layers.num_bins).items():
            linear.register_buffer(key, torch.empty(form.shape, dtype=form.dtype, device="meta"))
        model.set_submodule(name, linear)
    rest, *blocks = [[tensor.nbytes for tensor in part] for part in parts_of(Placed.of(configs.family, model))]
    pinned = slab_bytes(itertools.chain(rest, *blocks))
    return DenoiserBytes(sum(rest), tuple(sum(block) for block in blocks), pinned)


def denoising_bytes(
    configs: PipelineConfigs,
    denoiser: str,
    layers: QuantizedLayers | None,
    size: SamplingSettings,
    kernels: Kernels = "fp8",
    in_chunks: bool = True,
) -> int:
    """Return the peak bytes of a denoiser's call and of the sampling loop's tensors meanwhile.

    Args:
        in_chunks: whether its blocks compute a chunk of tokens at a time, if the family has chunks.
    """
    family, config = configs.family, configs.denoiser(denoiser).config
    model = empty_denoiser(configs, denoiser, num_blocks=2)
    blocks = family.blocks_of(model)
    for name, entry in {} if layers is None else layers.entries.items():
        if family.block_of(name) in blocks:
            model.set_submodule(
                name, _ReferenceLinear(entry) if kernels == "reference" else _ForeseenLinear(entry, kernels)
            )
    if in_chunks and family.chunk_blocks is not None:
        family.chunk_blocks(model)
    shape = configs.geometry.latents(size.height, size.width, size.num_frames)
    inputs = family.example_inputs(configs.index, family.shortened(config, 2), shape)
    texts = sum(each.nbytes for name in family.text_inputs for each in tensors_in(inputs.get(name)))
    others = tensors_in({name: each for name, each in inputs.items() if name not in family.text_inputs})
    channels = family.latent_channels(config)
    num_latents = math.prod(shape)
    given = sum(each.numel() for each in others if each.dim() > 2)  # the latents and their conditions
    condition = given - num_latents * channels
    held = num_latents * channels * (_LATENT_COPIES * 4 + 2) + condition * 4 + given * 2
    return peak_bytes(lambda: family.trace(model, inputs)) + held + 2 * texts  # with the prompt and without


class _ForeseenLinear(nn.Module):
    """A 4-bit linear with the allocations of its kernels, without their computation.

    It allocates, beside its output: the rounded input and the weight, both expanded for the product
    (fp4: only the input's packed codes and scales), the input's product with the branch, and its
    tensors of one timestep bin, copied from those of all bins.
    """

    def __init__(self, entry: LayerEntry, kernels: Kernels) -> None:
        super().__init__()
        self._entry, self._kernels = entry, kernels
        self.told = nn.Parameter(torch.empty(0, dtype=_16_BIT, device="meta"), requires_grad=False)  # its dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        entry, tokens = self._entry, x.shape[:-1]
        if entry.weights_alone:
            x.new_empty(min(EXPANDED_AT_ONCE, entry.out_features * entry.in_features), dtype=_16_BIT)
            return x.new_empty((*tokens, entry.out_features))
        if self._kernels == "fp4":
            shapes = [(*tokens, entry.in_features // 2), (*tokens, entry.format.num_groups(entry.in_features))]
        else:
            num_bytes = _EXPANDED_BYTES[self._kernels]
            shapes = [(*tokens, entry.in_features, num_bytes), (entry.out_features, entry.in_features, num_bytes)]
        scratch = [x.new_empty(shape, dtype=torch.uint8) for shape in shapes]
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
        if entry.weights_alone:
            return weights_alone_linear(x, linear.weight_tensors(), entry.format)
        transform, weight = linear.input_transform(), linear.weight_tensors()
        return w4a4_linear(x, transform, weight, entry.format, entry.activation_scale_rule)


@dataclass(frozen=True)
class AutoencoderBytes:
    """The autoencoder's weights, and its activations in tiles; float32."""

    weights: int
    encoding: int
    decoding: int


def autoencoder_bytes(configs: PipelineConfigs, size: SamplingSettings) -> AutoencoderBytes:
    """Return the bytes of encoding the first frame and decoding the video. Raises ModelError."""
    family = configs.family
    vae, geometry, channels = configs.autoencoder.build(), configs.geometry, configs.autoencoder_channels
    latent_shape = geometry.latents(size.height, size.width, size.num_frames)
    tile_size = TILE_PIXELS // geometry.pixels
    traced = (family.traced_frames or latent_shape[0], tile_size, tile_size)
    if geometry.is_image:  # which is coded whole
        traced = latent_shape
    frames, height, width = (min(a, b) for a, b in zip(latent_shape, traced, strict=True))
    tile = torch.empty(1, channels, frames, height, width, device="meta")
    num_frames = geometry.frames * (frames - 1) + 1
    given_frames = 1 if configs.family.encodes_first_frame_alone else size.num_frames
    num_frames = min(num_frames, given_frames)
    pixels = torch.empty(1, 3, num_frames, height * geometry.pixels, width * geometry.pixels, device="meta")
    if not any(isinstance(module, nn.Conv3d) for module in vae.modules()):  # it codes pictures, and knows no frames
        tile, pixels = tile[:, :, 0], pixels[:, :, 0]
    encoding = peak_bytes(lambda: vae.encode(pixels))
    vae.decoder.register_forward_hook(lambda _m, _args, decoded: decoded[..., :1, :1].clone())  # it leaves
    decoding = peak_bytes(lambda: vae.decode(tile))
    latents = 4 * math.prod(latent_shape)
    overlapping = (TILE_PIXELS / tile_stride(geometry.pixels)) ** 2 + 2  # tiles, joined to rows, joined to the whole
    video = 4 * 3 * given_frames * size.height * size.width
    encoded = round(2 * channels * latents * overlapping)
    # Empty frames are made, then joined to the first; only the joined ones stay.
    encoding = max(2 * video, video + encoding + encoded)
    weights = sum(tensor.nbytes for tensor in vae.state_dict().values())
    return AutoencoderBytes(weights, encoding, decoding + 3 * channels * latents)


@dataclass(frozen=True)
class TextEncoderBytes:
    """The text encoder's weights, in all and on the device at once, and its activations; 16-bit."""

    weights: int
    on_device: int
    encoding: int


def text_encoder_bytes(configs: PipelineConfigs, format: TextEncoderFormat = KEPT_TEXT_ENCODER) -> TextEncoderBytes:
    """Return the bytes of encoding one padded text, with linears in a format. Raises ModelError."""
    family, described = configs.family, configs.text_encoder
    encoder = described.build().to(_16_BIT)
    stored = linear_bytes(encoder, format)

    def held(module: nn.Module) -> int:
        kept = {id(each): each.nbytes for each in module.parameters()}
        linears = [each for each in module.modules() if isinstance(each, nn.Linear) and each in stored]
        return sum(kept.values()) + sum(stored[each] - each.weight.nbytes for each in linears)

    weights = held(encoder)
    if not family.text_encoder_blocks:  # it is there whole, and its activations are negligible
        return TextEncoderBytes(weights, weights, 0)
    blocks = [held(block) for block in encoder.get_submodule(family.text_encoder_blocks)]
    traced = described.build(**family.traced_text_encoder.shortened(described.config, 2)).to(_16_BIT)
    embedding = encoder.get_input_embeddings().weight
    rest = weights - sum(blocks) - embedding.nbytes
    tokens = family.encoder_tokens or family.text_tokens
    embedded = torch.empty(1, tokens, embedding.shape[1], dtype=_16_BIT, device="meta")
    mask = torch.empty(1, 1, tokens, tokens, dtype=_16_BIT, device="meta")
    encoding = (
        peak_bytes(lambda: family.traced_text_encoder.call(traced, embedded, mask)) + embedded.nbytes + mask.nbytes
    )
    return TextEncoderBytes(weights, rest + max(blocks), encoding)


def other_weight_bytes(configs: PipelineConfigs) -> dict[str, int]:
    """Return the bytes of the image encoder's and other brief models' weights, by component.

    Their activations are negligible beside the autoencoder's.
    """
    names = {configs.family.image_encoder, *configs.family.brief_components} - {configs.family.text_encoder}
    built = {name: configs.models[name].build() for name in sorted(names & configs.models.keys())}
    return {name: _16_BIT.itemsize * sum(each.numel() for each in model.parameters()) for name, model in built.items()}
