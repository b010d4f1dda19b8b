"""LatentGeometry: the latents and tokens of a video, and the videos that have them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from tempoquant.errors import SettingsError
from tempoquant.models.sampling_settings import SamplingSettings


@dataclass(frozen=True)
class LatentGeometry:
    """The division of a video by an autoencoder and a denoiser.

    Attributes:
        pixels: rows, and columns, of pixels in one latent.
        frames: frames in one latent; the first latent holds the first frame alone.
        patch: latents in one token: frames, rows, columns.
        given_latents: latent frames of a given picture, in front of the video's own.
        fewest_frames: that a video can have.
        is_image: whether there is one frame alone.
        size_for: (height, width) of a picture to those of the video that the pipeline makes of it,
            if the pipeline chooses its sizes itself.
    """

    pixels: int
    frames: int
    patch: tuple[int, int, int]
    given_latents: int = 0
    fewest_frames: int = 1
    is_image: bool = False
    size_for: Callable[[int, int], tuple[int, int]] | None = None

    @property
    def size_step(self) -> int:
        """Return the step of a video's height and width, in pixels."""
        return self.pixels * math.lcm(*self.patch[1:])

    def require(self, settings: SamplingSettings) -> None:
        """Raise SettingsError for a size or a number of frames that does not divide into tokens."""
        for name in ("height", "width"):
            if getattr(settings, name) % self.size_step:
                raise SettingsError(f"{name} is a multiple of {self.size_step}, not {getattr(settings, name)}.")
        if self.size_for is not None:
            height, width = self.size_for(settings.height, settings.width)
            if (height, width) != (settings.height, settings.width):
                raise SettingsError(
                    f"this pipeline chooses its sizes itself: of pictures of {settings.height} × {settings.width} "
                    f"(height × width) it makes videos of {height} × {width}, so give that size."
                )
        if settings.num_frames % self.frames != 1 % self.frames:
            raise SettingsError(
                f"num_frames is {self.frames}k + 1 (1, {self.frames + 1}, …, {20 * self.frames + 1}), not "
                f"{settings.num_frames}."
            )
        if self.is_image and settings.num_frames != 1:
            raise SettingsError(f"num_frames is 1, since the pipeline makes images, not {settings.num_frames}.")
        if settings.num_frames < self.fewest_frames:
            raise SettingsError(f"num_frames is at least {self.fewest_frames}, not {settings.num_frames}.")

    def latents(self, height: int, width: int, num_frames: int) -> tuple[int, int, int]:
        """Return the shape of a video's latents, a given picture's among them: frames, rows,
        columns.
        """
        return self.given_latents + (num_frames - 1) // self.frames + 1, height // self.pixels, width // self.pixels

    def num_latents(self, settings: SamplingSettings) -> int:
        """Return the number of latents of a video, each with all channels."""
        return math.prod(self.latents(settings.height, settings.width, settings.num_frames))

    def num_tokens(self, height: int, width: int, num_frames: int) -> int:
        """Return the number of tokens of a video in the denoiser's blocks."""
        shape = self.latents(height, width, num_frames)
        return math.prod(length // size for length, size in zip(shape, self.patch, strict=True))
