"""Inputs and shapes of Wan2.2-I2V-A14B: the ten linears of a block, and their numbers of tokens."""

from typing import NamedTuple

HIDDEN, FEED_FORWARD = 5120, 13824
NUM_BLOCKS = 40
TEXT_TOKENS = 512
VIDEO_TOKENS = {"480x832, 81 frames": 32_760, "720x1280, 81 frames": 75_600}


class Shape(NamedTuple):
    """One matrix product y (tokens, out) = x (tokens, in) · Wᵀ."""

    num_tokens: int
    in_features: int
    out_features: int

    def __str__(self) -> str:
        return f"{self.num_tokens:,} × {self.in_features:,} → {self.out_features:,}"


class WanLinear(NamedTuple):
    """One linear of a block.

    Attributes:
        input: the name of its input; linears with one name read the same tensor, which a runtime
            may quantize once.
    """

    name: str
    in_features: int
    out_features: int
    input: str
    reads_text: bool = False

    def shape(self, video_tokens: int) -> Shape:
        """Return its product for a video with that many tokens."""
        return Shape(TEXT_TOKENS if self.reads_text else video_tokens, self.in_features, self.out_features)


BLOCK_LINEARS = (
    WanLinear("attn1.to_q", HIDDEN, HIDDEN, "attn1"),
    WanLinear("attn1.to_k", HIDDEN, HIDDEN, "attn1"),
    WanLinear("attn1.to_v", HIDDEN, HIDDEN, "attn1"),
    WanLinear("attn1.to_out.0", HIDDEN, HIDDEN, "attn1.to_out.0"),
    WanLinear("attn2.to_q", HIDDEN, HIDDEN, "attn2.to_q"),
    WanLinear("attn2.to_k", HIDDEN, HIDDEN, "text", reads_text=True),
    WanLinear("attn2.to_v", HIDDEN, HIDDEN, "text", reads_text=True),
    WanLinear("attn2.to_out.0", HIDDEN, HIDDEN, "attn2.to_out.0"),
    WanLinear("ffn.net.0.proj", HIDDEN, FEED_FORWARD, "ffn.net.0.proj"),
    WanLinear("ffn.net.2", FEED_FORWARD, HIDDEN, "ffn.net.2"),
)


def shapes_of_block(video_tokens: int) -> dict[Shape, list[str]]:
    """Return the distinct products of a block, with the names of the linears that make them."""
    shapes: dict[Shape, list[str]] = {}
    for linear in BLOCK_LINEARS:
        shapes.setdefault(linear.shape(video_tokens), []).append(linear.name)
    return shapes


def inputs_of_block(video_tokens: int) -> dict[str, Shape]:
    """Return every distinct input by its name, with the shape of the first linear that reads it."""
    inputs: dict[str, Shape] = {}
    for linear in BLOCK_LINEARS:
        inputs.setdefault(linear.input, linear.shape(video_tokens))
    return inputs
