"""The Wan VAE on whole clips at once: the function of diffusers' `AutoencoderKLWan`, faster to
train.

diffusers processes a clip in chunks of four frames with a cache. Every convolution is causal, so
one pass over the whole clip gives the same result, provided three facts of the cached pass are
kept: the first frame never passes the temporal convolutions of a resampling layer; `downsample3d`
strides over the clip without padding; `upsample3d` starts from zeros at the second latent frame. A
single frame meets only the last temporal tap of each kernel, so it needs 2-D convolutions only, a
third of the work. `tests/tiny/test_training.py` compares both with diffusers.

Shapes: clips (batch, 3, 1 + 4·k, height, width) in [−1, 1]; latents (batch, 16, 1 + k, height/8,
width/8).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanMidBlock,
    WanResample,
    WanResidualBlock,
)
from torch import Tensor, nn


def encode_clip(vae: AutoencoderKLWan, clip: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log-variance of the latents, each (batch, 16, 1 + k, height/8, width/8)."""
    encoder = vae.encoder
    x = _conv(encoder.conv_in, clip)
    for layer in encoder.down_blocks:
        x = _layer(layer, x)
    x = _mid(encoder.mid_block, x)
    x = _conv(encoder.conv_out, F.silu(encoder.norm_out(x)))
    mean, log_variance = _conv(vae.quant_conv, x).chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)


def decode_clip(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Return the clip, not clamped (a clamp has no gradient where it acts)."""
    decoder = vae.decoder
    x = _conv(decoder.conv_in, _conv(vae.post_quant_conv, latents))
    x = _mid(decoder.mid_block, x)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _residual(resnet, x)
        if block.upsamplers is not None:
            x = _resample(block.upsamplers[0], x)
    return _conv(decoder.conv_out, F.silu(decoder.norm_out(x)))


def _layer(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, WanResidualBlock):
        return _residual(layer, x)
    return _resample(layer, x) if isinstance(layer, WanResample) else layer(x)


def _conv(conv: WanCausalConv3d, x: Tensor) -> Tensor:
    if x.shape[2] == 1:
        # The frames before the first are zeros, so only the last temporal tap counts.
        y = F.conv2d(x.squeeze(2), conv.weight[:, :, -1], conv.bias, padding=conv._padding[0])
        return y.unsqueeze(2)
    return F.conv3d(F.pad(x, conv._padding), conv.weight, conv.bias)


def _residual(block: WanResidualBlock, x: Tensor) -> Tensor:
    shortcut = x if isinstance(block.conv_shortcut, nn.Identity) else _conv(block.conv_shortcut, x)
    x = _conv(block.conv1, F.silu(block.norm1(x)))
    return _conv(block.conv2, F.silu(block.norm2(x))) + shortcut


def _mid(mid: WanMidBlock, x: Tensor) -> Tensor:
    x = _residual(mid.resnets[0], x)
    for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
        assert isinstance(attention, WanAttentionBlock)
        x = _residual(resnet, attention(x))
    return x


def _resample(layer: WanResample, x: Tensor) -> Tensor:
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        pairs = _conv(layer.time_conv, x[:, :, 1:]) if x.shape[2] > 2 else _conv_one_frame(layer.time_conv, x[:, :, 1:])
        pairs = pairs.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        x = torch.cat([x[:, :, :1], pairs], dim=2)
    batch, _, frames, _, _ = x.shape
    x = layer.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, frames)).transpose(1, 2)
    if layer.mode == "downsample3d" and frames > 1:
        strided = F.conv3d(x, layer.time_conv.weight, layer.time_conv.bias, stride=(2, 1, 1))
        x = torch.cat([x[:, :, :1], strided], dim=2)
    return x


def _conv_one_frame(conv: WanCausalConv3d, x: Tensor) -> Tensor:
    return F.conv3d(x, conv.weight[:, :, -1:], conv.bias)
