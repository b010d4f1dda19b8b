"""The work of a video beside its denoiser calls: texts, the autoencoder in tiles, and the
sampler's steps.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tempoquant.hosts.text_encoders import linear_bytes
from tempoquant.layer_rule import KEPT_TEXT_ENCODER, TextEncoderFormat
from tempoquant.models.geometry import LatentGeometry
from tempoquant.models.pipeline_configs import PipelineConfigs
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.placement.tiles import TILE_PIXELS, tile_stride, use_tiles
from tempoquant.planning.call_work import product_of
from tempoquant.planning.traced_work import Traced, trace
from tempoquant.planning.work import Work

_STEP_COPIES = 8  # float32 copies of the latents: a multistep sampler reads five, and writes three
_STEADY_FRAMES = 2
"""Latent frames after which each one more costs the same, where the autoencoder codes one at a
time."""


@dataclass(frozen=True)
class OtherWork:
    """The work of one video outside its denoisers.

    Attributes:
        text: encoding one text; empty where the text encoder's blocks are not known.
        encoding, decoding: of the autoencoder; no encoding where a pipeline takes no image.
        guiding: joining the answers of the guidance branches, a step.
        stepping: the sampler, a step.
        text_bytes: that are copied to the device for each text: the text encoder's, but its
            embedding.
        quantized_text_bytes: the same of the quantized pipeline's text encoder. What is in fewer
            bits is also copied back, and counts twice.
        autoencoder_bytes: that are copied to the device before it works.
        not_counted: names of models that are used briefly, and not counted.
    """

    text: tuple[Work, ...]
    encoding: tuple[Work, ...]
    decoding: tuple[Work, ...]
    guiding: tuple[Work, ...]
    stepping: tuple[Work, ...]
    text_bytes: int
    quantized_text_bytes: int
    autoencoder_bytes: int
    not_counted: tuple[str, ...]


def other_work(configs: PipelineConfigs, size: SamplingSettings, text_format: TextEncoderFormat) -> OtherWork:
    """Trace them at the size of a video. Raises ModelError.

    Args:
        text_format: the format of the quantized pipeline's text encoder, which computes in 16 bits.
    """
    family, num_latents = configs.family, _num_latents(configs, size)
    vae = configs.autoencoder.build()
    encoding, decoding = _autoencoder(configs, vae, size)
    brief = {family.image_encoder, *family.brief_components} & configs.models.keys()
    text, text_bytes, saved_bytes = _text(configs, text_format)
    return OtherWork(
        text=tuple(text),
        encoding=tuple(encoding),
        decoding=tuple(decoding),
        guiding=(Work.moving(3 * 2.0 * num_latents),),  # two answers read, one written
        stepping=(Work.moving(_STEP_COPIES * 4.0 * num_latents),),
        text_bytes=text_bytes,
        quantized_text_bytes=(text_bytes - saved_bytes) * (1 if text_format == KEPT_TEXT_ENCODER else 2),
        autoencoder_bytes=sum(each.nbytes for each in vae.state_dict().values()),
        not_counted=tuple(sorted(brief - {family.text_encoder} | (set() if text else {family.text_encoder}))),
    )


def _num_latents(configs: PipelineConfigs, size: SamplingSettings) -> int:
    """Count the numbers that a step changes."""
    config = configs.denoiser(configs.denoisers[0].name).config
    return configs.geometry.num_latents(size) * configs.family.latent_channels(config)


def _text(configs: PipelineConfigs, format: TextEncoderFormat) -> tuple[list[Work], int, int]:
    """Return the work of one text, padded to the family's number of tokens, in 16 bits; the bytes
    that are copied for it; and how many fewer these are in a format.
    """
    family = configs.family
    if not family.text_encoder_blocks:
        return [], 0, 0
    encoder = configs.text_encoder.build().to(torch.bfloat16)
    embedding = encoder.get_input_embeddings().weight
    tokens = family.encoder_tokens or family.text_tokens
    embedded = torch.empty(1, tokens, embedding.shape[1], dtype=torch.bfloat16, device="meta")
    mask = torch.empty(1, 1, tokens, tokens, dtype=torch.bfloat16, device="meta")
    found = trace(encoder, lambda: family.traced_text_encoder.call(encoder, embedded, mask))
    copied = sum(each.nbytes for each in encoder.parameters()) - embedding.nbytes
    stored = linear_bytes(encoder, format)
    return merged(found), copied, sum(each.weight.nbytes - stored[each] for each in stored)


def _autoencoder(configs: PipelineConfigs, vae: Any, size: SamplingSettings) -> tuple[list[Work], list[Work]]:
    """Return the work of encoding what a video is conditioned on, if it is, and of decoding it; in
    float32 and in tiles.
    """
    family, geometry, channels = configs.family, configs.geometry, configs.autoencoder_channels
    frames, *sides = geometry.latents(size.height, size.width, size.num_frames)
    encoded_frames = 1 if family.encodes_first_frame_alone else frames
    tiles = _tiles(vae, sides, geometry.pixels)
    encoding, decoding = [], []
    steady = _STEADY_FRAMES if family.traced_frames else None
    for tile, times in tiles.items():
        decoded = _of_frames(vae, partial(_decode, vae, channels, tile), frames, steady)
        decoding += _repeated(decoded, times)
        if family.takes_image(configs.index):
            encoded = _of_frames(vae, partial(_encode, vae, geometry, tile), encoded_frames, steady)
            encoding += _repeated(encoded, times)
    return encoding, decoding


def _decode(vae: Any, channels: int, tile: tuple[int, int], num_frames: int) -> Any:
    """Decode so many latent frames of a tile."""
    return vae.decode(torch.empty(1, channels, num_frames, *tile, device="meta"))


def _encode(vae: Any, geometry: LatentGeometry, tile: tuple[int, int], num_frames: int) -> Any:
    """Encode the pixels of so many latent frames of a tile."""
    height, width = (side * geometry.pixels for side in tile)
    return vae.encode(torch.empty(1, 3, geometry.frames * (num_frames - 1) + 1, height, width, device="meta"))


def _tiles(vae: Any, sides: Sequence[int], pixels: int) -> Counter[tuple[int, int]]:
    """Count the tiles of each size, in latents: rows, columns."""
    height, width = sides
    use_tiles(vae)
    if not getattr(vae, "use_tiling", False):
        return Counter({(height, width): 1})
    tile, stride = TILE_PIXELS // pixels, tile_stride(pixels) // pixels
    if height <= tile and width <= tile:
        return Counter({(height, width): 1})
    starts = itertools.product(range(0, height, stride), range(0, width, stride))
    return Counter((min(tile, height - top), min(tile, width - left)) for top, left in starts)


def _of_frames(vae: nn.Module, compute: Callable[[int], Any], num_frames: int, steady: int | None) -> list[Work]:
    """Return the work of so many latent frames: those after the steady ones cost what one more of
    them does.
    """
    if steady is None or num_frames <= steady:
        return merged(trace(vae, partial(compute, num_frames)))
    one_more = num_frames - steady
    first, then = (merged(trace(vae, partial(compute, count))) for count in (steady, steady + 1))
    return [*_repeated(first, 1 - one_more), *_repeated(then, one_more)]


def _repeated(works: Iterable[Work], times: float) -> list[Work]:
    return [work.repeated(times) for work in works]


def merged(found: Iterable[Traced]) -> list[Work]:
    """Return operations as works, each kernel by itself; those that are alike are one Work."""
    counts = Counter(Work.moving(each.num_bytes) if each.operand is None else product_of(each) for each in found)
    return [work.repeated(times) for work, times in counts.items()]
