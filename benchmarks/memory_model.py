"""A Wan pipeline of given configs with random weights, made on the device, kept in host memory.

It serves measurements of memory: its numbers are random, of the right dtypes, and valid.
"""

import contextlib
import struct
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from tempoquant.formats import scale_to_bytes
from tempoquant.models.pipeline_configs import PipelineConfigs
from tempoquant.models.wan.pipelines import HIGH_NOISE, LOW_NOISE
from tempoquant.planning.generation_memory import QuantizedLayers, empty_denoiser
from tempoquant.runtime.convert import quantized_linears, replace_linears
from tempoquant.runtime.linear import QuantizedLinear
from tempoquant.timesteps import TimestepBins

TEXT = "a red boat leaves the harbour"
BOUNDARY_RATIO = 0.9
FLOW_SHIFT = 5.0
_STD = 0.02


def random_pipeline(
    configs: PipelineConfigs, layers: dict[str, QuantizedLayers | None], device: torch.device
) -> WanImageToVideoPipeline:
    """Return a pipeline on the CPU: 4-bit layers where there are some, bfloat16 otherwise, the
    autoencoder float32.
    """
    denoisers = [_denoiser(configs, name, layers[name], device) for name in (HIGH_NOISE, LOW_NOISE)]
    text_encoder, vae = configs.text_encoder.build().to(torch.bfloat16), configs.autoencoder.build()
    for model in (text_encoder, vae):
        fill(model, device)
    return WanImageToVideoPipeline(
        tokenizer=_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        transformer=denoisers[0],
        transformer_2=denoisers[1],
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
        ),
        boundary_ratio=BOUNDARY_RATIO,
        image_encoder=None,
        image_processor=None,
    )


def _denoiser(configs: PipelineConfigs, name: str, layers: QuantizedLayers | None, device: torch.device) -> Any:
    model = empty_denoiser(configs, name)
    rope = model.rope
    model.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)  # from numbers, not random
    if layers is not None:
        edges = TimestepBins(tuple(float(100 * index) for index in range(1, layers.num_bins)))
        replace_linears(model, layers.entries, edges, torch.bfloat16)
    fill(model, device)
    return model


def fill(model: nn.Module, device: torch.device) -> None:
    """Fill everything on the meta device with random values, made on the device and moved to the
    CPU one by one.
    """
    for linear in quantized_linears(model).values():
        for key, tensor in valid_tensors(linear, device).items():
            setattr(linear, key, nn.Parameter(tensor.cpu(), requires_grad=False))
    tied: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                made = torch.empty(parameter.shape, dtype=parameter.dtype, device=device).normal_(0, _STD).cpu()
                tied.setdefault(id(parameter), nn.Parameter(made, requires_grad=False))
                module._parameters[name] = tied[id(parameter)]
    model.requires_grad_(False)


def valid_tensors(linear: QuantizedLinear, device: torch.device) -> dict[str, torch.Tensor]:
    """Make random codes and the other tensors that a checkpoint may hold with them."""
    made = {}
    for key, empty in linear.state_dict().items():
        if key == "packed":
            made[key] = torch.randint(256, empty.shape, dtype=torch.uint8, device=device) & 0x77  # no code is below 0
        elif key == "scale":
            one = scale_to_bytes(torch.full((1, 1), 2.0**-6), linear.entry.format).flatten().tolist()
            made[key] = _repeated(bytes(one), empty, device)
        elif key in ("clip_ratio", "tensor_scale"):
            made[key] = _repeated(struct.pack("<f", 1.0), empty, device)
        elif key == "smoothing_factor":
            made[key] = _repeated(b"\x80\x3f", empty, device)  # 1 in bfloat16
        else:
            made[key] = torch.empty(empty.shape, dtype=empty.dtype, device=device).normal_(0, _STD)
    return made


def _repeated(value: bytes, empty: torch.Tensor, device: torch.device) -> torch.Tensor:
    number = torch.tensor(list(value), dtype=torch.uint8, device=device)
    return number.repeat(empty.numel() // len(value)).view(empty.shape)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {token: index for index, token in enumerate(("<pad>", "</s>", "<unk>", *TEXT.split()))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@contextlib.contextmanager
def entering_phases(pipeline: Any, enter: Callable[[str], None]) -> Iterator[None]:
    """Call `enter(name)` at the begin of each phase of a generation within this context; names as
    in memory_plan.
    """
    from tempoquant.models.hooks import unobtrusive
    from tempoquant.planning.memory_plan import IMAGE, TEXT, VIDEO, denoising_name

    def announced(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            enter(name)
            return call(*args, **kwargs)

        return wrapped

    denoisers = (
        (pipeline.transformer, denoising_name(HIGH_NOISE)),
        (pipeline.transformer_2, denoising_name(LOW_NOISE)),
    )
    methods = [(pipeline, "encode_prompt", TEXT), (pipeline, "prepare_latents", IMAGE), (pipeline.vae, "decode", VIDEO)]
    with contextlib.ExitStack() as undo:
        for model, name in denoisers:
            handle = model.register_forward_pre_hook(unobtrusive(lambda *_, name=name: enter(name)))
            model._forward_pre_hooks.move_to_end(handle.id, last=False)  # before the mode's own, which brings weights
            undo.callback(handle.remove)
        for owner, method, name in methods:  # the mode's own may be there, and comes back
            undo.enter_context(mock.patch.object(owner, method, announced(getattr(owner, method), name)))
        yield
