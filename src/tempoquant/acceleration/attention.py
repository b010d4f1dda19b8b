"""The choice among diffusers' attention kernels: by compute capability, speed, and installed
packages.

The table follows the reports of kernels' authors and users (docs/speed.md names the sources); this
project measured none of it. `tempoquant doctor` shows the choice on a machine.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName

from tempoquant.acceleration.speeds import Speed
from tempoquant.errors import SettingsError, UnsupportedError
from tempoquant.models.families import PipelineFacts
from tempoquant.models.family import ModelFamily

Capability = tuple[int, int]
NATIVE = "native"
BACKENDS = tuple(name.value for name in AttentionBackendName)


class Candidate(NamedTuple):
    """One of diffusers' backends, and the reason for its place in the table.

    Attributes:
        products: what QKᵀ and PV multiply: "bf16" (any 16 bits), "int8", "fp8" or "fp4".
    """

    backend: str
    why: str
    products: tuple[str, str] = ("bf16", "bf16")


_TORCH = Candidate(NATIVE, "PyTorch's own, which takes FlashAttention-2 here: 16 bits")
_FLASH_3 = (
    Candidate("_flash_3", "FlashAttention-3 is written for Hopper: 16 bits"),
    Candidate("_flash_3_hub", "FlashAttention-3 is written for Hopper: 16 bits"),
)
_CUDNN = Candidate("_native_cudnn", "cuDNN's attention, which PyTorch brings: 16 bits")
_SAGE_16 = Candidate("_sage_qk_int8_pv_fp16_cuda", "SageAttention 2: QKᵀ in INT8, PV in FP16", ("int8", "bf16"))
_SAGE_TRITON = Candidate(
    "_sage_qk_int8_pv_fp16_triton", "SageAttention in Triton: QKᵀ in INT8, PV in FP16", ("int8", "bf16")
)
_SAGE_8 = Candidate("_sage_qk_int8_pv_fp8_cuda", "SageAttention 2: QKᵀ in INT8, PV in FP8", ("int8", "fp8"))
_SAGE_HUB = Candidate("sage_hub", "SageAttention 2 from the hub: QKᵀ in INT8", ("int8", "bf16"))
_SAGE_3 = Candidate("sage_blackwell_hub", "SageAttention 3 from the hub: attention in FP4", ("fp4", "fp4"))

SIXTEEN_BITS: Mapping[Capability, tuple[Candidate, ...]] = {
    (7, 5): (_TORCH,),
    (8, 0): (_TORCH,),
    (9, 0): (*_FLASH_3, _CUDNN),
    (10, 0): (_CUDNN,),
    (12, 0): (_TORCH,),
}
"""The backends of 16-bit attention for a compute capability and higher ones up to the next, the
best first.
"""

EIGHT_BITS: Mapping[Capability, tuple[Candidate, ...]] = {
    (7, 5): (),
    (8, 0): (_SAGE_16, _SAGE_HUB),
    (8, 6): (_SAGE_TRITON, _SAGE_HUB),
    (8, 9): (_SAGE_8, _SAGE_HUB),
    (9, 0): (),  # Sage's kernel for it breaks Wan, and its others are no faster than FlashAttention-3
    (12, 0): (_SAGE_8, _SAGE_HUB),
}
FOUR_BITS: Mapping[Capability, tuple[Candidate, ...]] = {(7, 5): (), (12, 0): (_SAGE_3,)}

DISPATCHED: Mapping[Capability, Mapping[str, str]] = {
    (9, 0): dict.fromkeys(("sage", "sage_hub"), "_sage_qk_int8_pv_fp8_cuda_sm90"),
}
"""Backends that choose a kernel themselves, and their choice by compute capability."""

INSTALL = {
    "flash_3": "build FlashAttention-3 from the hopper folder of github.com/Dao-AILab/flash-attention",
    "flash_varlen_3": "build FlashAttention-3 from the hopper folder of github.com/Dao-AILab/flash-attention",
    "flash": "pip install flash-attn --no-build-isolation",
    "hub": "pip install 'kernels>=0.12'",
    "sage": "pip install --no-build-isolation git+https://github.com/thu-ml/SageAttention (PyPI's 1.0.6 is too old)",
    "xformers": "pip install xformers",
    "native": "pip install -U torch",
}
"""The command that installs a backend, by the beginning of its name; the first match counts. Hub
backends share one.
"""


@dataclass(frozen=True)
class AttentionChoice:
    """The backend that a pipeline runs with.

    Attributes:
        backend: diffusers' name.
        reason: the reason for it.
        missing: better ones that are not installed, each with its install command.
    """

    backend: str
    reason: str
    missing: tuple[str, ...] = ()


def choose_attention(
    speed: Speed, family: ModelFamily | None, capability: Capability | None, asked: str | None = None
) -> AttentionChoice:
    """Choose the attention of a pipeline.

    Args:
        family: the family whose deny-list counts; None for no particular family.
        capability: of the GPU; None for a CPU.
        asked: the user's choice in place of the table's.

    Raises:
        SettingsError: diffusers has no such backend.
        UnsupportedError: it breaks this family's videos, is not installed, or needs a GPU.
    """
    if asked is not None:
        return _asked(asked, family, capability)
    if capability is None:
        return AttentionChoice(NATIVE, "on a CPU PyTorch's own attention is the only one")
    missing: list[str] = []
    for candidate in candidates(speed, capability, family):
        if is_installed(candidate.backend):
            return AttentionChoice(candidate.backend, candidate.why, tuple(missing))
        missing.append(f"{candidate.backend} ({candidate.why}): {install_line(candidate.backend)}")
    return AttentionChoice(NATIVE, "PyTorch's own: 16 bits", tuple(missing))


def candidates(speed: Speed, capability: Capability, family: ModelFamily | None = None) -> tuple[Candidate, ...]:
    """Return the backends for a speed, the best first; without those that break a family's
    videos.
    """
    tables = {"exact": (), "fast": (EIGHT_BITS,), "fastest": (FOUR_BITS, EIGHT_BITS)}[speed]
    rows = [each for table in (*tables, SIXTEEN_BITS) for each in _row(table, capability)]
    return tuple(each for each in rows if family is None or denied(each.backend, family, capability) is None)


def denied(backend: str, family: ModelFamily, capability: Capability) -> str | None:
    """Return the reason why a backend must not be used for a family on such a GPU; None if it
    may.
    """
    kernel = _row(DISPATCHED, capability, {}).get(backend, backend)
    return family.denied_attention.get(kernel)


def is_installed(backend: str) -> bool:
    """Return whether diffusers finds a backend's requirements."""
    try:
        attention_dispatch._check_attention_backend_requirements(AttentionBackendName(backend))
    except RuntimeError:
        return False
    return True


def install_line(backend: str) -> str:
    """Return the command that installs a backend."""
    if backend.endswith("_hub"):
        return INSTALL["hub"]
    name = backend.lstrip("_")
    return next((INSTALL[each] for each in INSTALL if name.startswith(each)), "see diffusers' documentation")


def _asked(backend: str, family: ModelFamily | None, capability: Capability | None) -> AttentionChoice:
    if backend not in BACKENDS:
        raise SettingsError(f"diffusers has no attention backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
    if capability is None and backend not in (NATIVE, "_native_math", "flex"):
        raise UnsupportedError(f"attention backend {backend} needs a CUDA GPU: leave --attention out on a CPU.")
    if capability is not None and family is not None and (why := denied(backend, family, capability)) is not None:
        raise UnsupportedError(f"attention backend {backend} is refused here: {why}")
    if not is_installed(backend):
        raise UnsupportedError(f"attention backend {backend} is not installed: {install_line(backend)}.")
    return AttentionChoice(backend, "the user asked for it")


def use_attention(pipeline: Any, facts: PipelineFacts, backend: str) -> ExitStack:
    """Make the denoisers, and no other model of this process, use a backend. Closing the stack
    undoes it.

    Raises:
        UnsupportedError: diffusers refuses it (for example beside context parallelism), or its
            kernel cannot be fetched.
    """
    registry = attention_dispatch._AttentionBackendRegistry
    with ExitStack() as undo:
        for denoiser in facts.denoisers:
            model = getattr(pipeline, denoiser.component)
            for processor in _processors(model):
                undo.callback(setattr, processor, "_attention_backend", processor._attention_backend)
            before, _ = registry.get_active_backend()
            try:
                model.set_attention_backend(backend)
            except (ValueError, RuntimeError, ImportError, OSError) as error:
                raise UnsupportedError(f"diffusers refuses attention backend {backend}: {error}") from error
            finally:
                registry.set_active_backend(before)  # diffusers sets it for every model of the process
        return undo.pop_all()


def capability_of(device: torch.device) -> Capability | None:
    """Return a GPU's compute capability; None of a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _processors(model: Any) -> list[Any]:
    found = (getattr(module, "processor", None) for module in model.modules())
    return [processor for processor in found if hasattr(processor, "_attention_backend")]


def _row(table: Mapping[Capability, Any], capability: Capability, otherwise: Any = ()) -> Any:
    """Return the entry of the highest compute capability that is not above this one."""
    known = [each for each in table if each <= capability]
    return table[max(known)] if known else otherwise
