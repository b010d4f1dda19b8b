"""Sizes from a pipeline on disk: of its blocks' linears, and of its denoisers' inputs."""

from typing import NamedTuple


class BlockLinear(NamedTuple):
    """A linear of a transformer block.

    Attributes:
        out_features, in_features: of its weight.
        block_index: its block's position in `SourceModel.blocks`.
    """

    out_features: int
    in_features: int
    block_index: int


class SampleSizes(NamedTuple):
    """Sizes of one call of a denoiser.

    Attributes:
        num_tokens: of the video.
        video_values: numbers in the inputs that differ from call to call.
        text_values: numbers in the inputs that all calls for one prompt in one branch of guidance
            share.
    """

    num_tokens: int
    video_values: int
    text_values: int
