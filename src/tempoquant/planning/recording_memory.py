"""Allocations of a 16-bit pipeline's models while it records and is calibrated, traced on the meta
device.

Unlike in `generation_memory`, nothing is chunked or tiled here, since neither recording nor
calibration does it.
"""

import functools
from dataclasses import dataclass

import torch

from tempoquant.models.pipeline_configs import configs_of
from tempoquant.models.source import SourceModel
from tempoquant.planning.allocations import peak_bytes
from tempoquant.planning.generation_memory import empty_denoiser


@dataclass(frozen=True)
class RecordingMemory:
    """Peaks of activations of one pipeline at one size.

    Attributes:
        source: the 16-bit pipeline.
        height, width, num_frames: of the video.
        dtype: of the denoisers' computation.
    """

    source: SourceModel
    height: int
    width: int
    num_frames: int
    dtype: torch.dtype

    @functools.lru_cache(maxsize=64)  # noqa: B019 (values of a few numbers, and a source that lives as long as its run)
    def of_call(self, denoiser: str) -> int:
        """Return the most bytes alive in one call of a denoiser, without its weights."""
        configs = configs_of(self.source)
        model = empty_denoiser(configs, denoiser, num_blocks=1)
        config = configs.family.shortened(configs.denoiser(denoiser).config, 1)
        latents = configs.geometry.latents(self.height, self.width, self.num_frames)
        inputs = configs.family.example_inputs(configs.index, config, latents)
        return peak_bytes(lambda: configs.family.trace(model, inputs)) * self.dtype.itemsize // 2  # traced in 16 bits

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def of_encoding(self) -> int:
        """Return the most bytes alive while the autoencoder encodes a whole video, in float32; 0 if
        none does.
        """
        configs = configs_of(self.source)
        if not configs.family.takes_image(configs.index):
            return 0
        autoencoder = configs.autoencoder.build()
        num_frames = 1 if configs.family.encodes_first_frame_alone else self.num_frames
        video = torch.empty(1, 3, num_frames, self.height, self.width, device="meta")
        return peak_bytes(lambda: autoencoder.encode(video))
