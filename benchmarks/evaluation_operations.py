"""Floating-point operations and least bytes of one video of Wan2.2-I2V-A14B, and their seconds on a
GPU of given rates. Computed, never measured.

    T = ((frames − 1) / 4 + 1) · (height / 16) · (width / 16)   tokens: 4 frames, 16 × 16 pixels
    linears of a block   = Σ 2 · tokens · in · out              the ten of benchmarks/registry.py
    attention of a block = 4 · T · (T + 512) · 5120             Q·Kᵀ and P·V of video and text
    a call = 40 blocks,  a video = steps · guidance branches · calls + the autoencoder

The parts outside the blocks (patches, time and text embedding, 0.04 % of a call) and the text
encoder are left out.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.kernels_roofline import H100_SXM, Rates, block_floors
from benchmarks.registry import BLOCK_LINEARS, HIDDEN, NUM_BLOCKS, TEXT_TOKENS
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.wan.pipelines import I2V_A14B

TF32_SHARE = 0.5
"""Rate of the autoencoder's float32 convolutions beside BF16's: they run in TF32, PyTorch's default
for them.
"""

SHARE = 0.42
"""The share of a GPU's datasheet rates that a whole generation reaches: an assumption. The
project's estimate of quantizing assumes as much for a block's forward (0.6 of a large matrix
product's rate, itself 0.7 of the datasheet), and it agrees with `published_share`.
"""

PUBLISHED_SECONDS = 328.0
"""Seconds of one 480P video of 81 frames on an H100, whole: Wan2.2's README,
assets/comp_effic.png.
"""


def video_tokens(size: SamplingSettings) -> int:
    """Return the number of video tokens in a transformer call."""
    return ((size.num_frames - 1) // 4 + 1) * (size.height // 16) * (size.width // 16)


def linear_operations(num_tokens: int) -> float:
    """Count the operations of a block's ten linears, in one call."""
    return sum(
        2.0 * tokens * inner * outer for tokens, inner, outer in (each.shape(num_tokens) for each in BLOCK_LINEARS)
    )


def attention_operations(num_tokens: int) -> float:
    """Count the operations of a block's self- and cross-attention, in one call."""
    return 4.0 * num_tokens * (num_tokens + TEXT_TOKENS) * HIDDEN


class AutoencoderWork(NamedTuple):
    """Operations of encoding the first frame (with the empty frames after it), and of decoding the
    video.
    """

    encode: float
    decode: float


@cache
def autoencoder_operations(size: SamplingSettings) -> AutoencoderWork:
    """Count the autoencoder's operations by PyTorch on meta tensors, in one piece: the first latent
    frame, and each one after it.
    """
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config({}).eval().requires_grad_(False)
    rows, columns, rest = size.height // 8, size.width // 8, (size.num_frames - 1) // 4
    found = []
    for frames in (1, 2):  # from the second on, every latent frame costs the same
        latents = torch.empty(1, vae.config.z_dim, frames, rows, columns, device="meta")
        pixels = torch.empty(1, 3, 4 * frames - 3, size.height, size.width, device="meta")
        with FlopCounterMode(display=False) as encoding:
            vae.encode(pixels)
        with FlopCounterMode(display=False) as decoding:
            vae.decode(latents)
        found.append((encoding.get_total_flops(), decoding.get_total_flops()))
    (encode, decode), (encode_two, decode_two) = found
    return AutoencoderWork(encode + rest * (encode_two - encode), decode + rest * (decode_two - decode))


@dataclass(frozen=True)
class VideoCost:
    """One video.

    Attributes:
        linears, attention: operations of all calls.
        autoencoder: operations.
        seconds_16bit, seconds_4bit: on a GPU of given rates, at a given share of them; four bits on
            the path `fp8`.
    """

    linears: float
    attention: float
    autoencoder: float
    seconds_16bit: float
    seconds_4bit: float

    @property
    def operations(self) -> float:
        """Return all operations."""
        return self.linears + self.attention + self.autoencoder

    @property
    def speedup(self) -> float:
        """Return the speedup of four bits over 16."""
        return self.seconds_16bit / self.seconds_4bit


def video_cost(size: SamplingSettings, rates: Rates = H100_SXM, share: float = SHARE) -> VideoCost:
    """Compute a video's cost: linears by their roofline (benchmarks/kernels_roofline.py), attention
    and autoencoder by their operations.
    """
    num_tokens = video_tokens(size)
    branches = 1 if size.guidance_scale <= 1 else 2
    num_blocks = size.num_steps * branches * NUM_BLOCKS
    attention = num_blocks * attention_operations(num_tokens)
    autoencoder = sum(autoencoder_operations(size))
    rest_s = attention / rates.bf16_flops + autoencoder / (TF32_SHARE * rates.bf16_flops)
    sixteen, four = (num_blocks * seconds + rest_s for seconds in block_floors(num_tokens, rates))
    linears = num_blocks * linear_operations(num_tokens)
    return VideoCost(linears, attention, autoencoder, sixteen / share, four / share)


def published_share() -> float:
    """Return the share of an H100's rates in Wan's own published time: 480 × 832, 81 frames, 40
    steps.
    """
    return video_cost(I2V_A14B, H100_SXM, share=1.0).seconds_16bit / PUBLISHED_SECONDS
