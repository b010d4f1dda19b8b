"""Denoisers that read what they need from their files: what lies outside the blocks while this
denoiser and no other runs, each block while it runs.

Nothing stays: a file is open while a part is read, and what was read is let go of when the block
has run. While generating, a thread reads the block that comes next beside the computation of this
one, so two blocks are the most there is.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from tempoquant.errors import UnsupportedError
from tempoquant.models.hooks import unobtrusive

Tensors = Mapping[str, torch.Tensor]


class PartsOnDisk(Protocol):
    """One denoiser's files. A part is a block, or all that is in no block: the model itself with
    the prefix "".

    Attributes:
        blocks: names, in the order in which they run.
    """

    @property
    def blocks(self) -> Sequence[str]: ...

    def empty_model(self) -> Any:
        """Return the denoiser without weights."""

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor computes in."""

    def read_part(self, module: nn.Module, prefix: str) -> Tensors:
        """Return a part's tensors on the host, by the module's own names."""

    def put_part(self, module: nn.Module, prefix: str, tensors: Tensors) -> None:
        """Put what was read into its module, on the device."""

    def release(self, module: nn.Module, prefix: str) -> None:
        """Let go of what was put there."""


class _Part(NamedTuple):
    """A block of a denoiser that is read ahead."""

    weights: PartsOnDisk
    module: nn.Module
    prefix: str


class DiskDenoisers:
    """Denoisers whose weights are on the meta device between calls, hooked into their calls.

    Args:
        weights: of each denoiser, by its name.
        models: without weights, by the same names.
        ahead: whether the next block is read while one computes.
    """

    def __init__(self, weights: Mapping[str, PartsOnDisk], models: Mapping[str, Any], ahead: bool) -> None:
        self._weights, self._models = weights, models
        self._running: str | None = None
        self._reader = ThreadPoolExecutor(1, "next block") if ahead else None
        self._next: tuple[_Part, Future[Tensors]] | None = None
        self._handles: list[Any] = []
        for name, model in models.items():
            self._handles.append(model.register_forward_pre_hook(self._before_model(name, model)))
            blocks = weights[name].blocks
            parts = [_Part(weights[name], model.get_submodule(block), f"{block}.") for block in blocks]
            for part, following in zip(parts, (*parts[1:], None), strict=True):
                self._hook(part, following)

    def remove(self) -> None:
        """Take the hooks off, let go of what is there, and end the thread; the models have no
        weights then.
        """
        for handle in self._handles:
            handle.remove()
        if self._running is not None:
            self._weights[self._running].release(self._models[self._running], "")
            self._running = None
        self._next = None
        if self._reader is not None:
            self._reader.shutdown()

    def _before_model(self, denoiser: str, model: nn.Module) -> Callable[..., None]:
        known = model.state_dict().keys()

        def begin(*_: Any) -> None:
            if model.state_dict().keys() != known:
                raise UnsupportedError(
                    f"the {denoiser} denoiser has got other weights than its files (by peft, perhaps), which the "
                    "memory mode disk cannot read: choose swap or lean, or fuse LoRAs before quantizing."
                )
            if self._running == denoiser:
                return
            if self._running is not None:
                self._weights[self._running].release(self._models[self._running], "")
            self._running = None
            _fill(_Part(self._weights[denoiser], model, ""))
            self._running = denoiser

        return unobtrusive(begin)

    def _hook(self, part: _Part, following: _Part | None) -> None:
        def bring(*_: Any) -> None:
            part.weights.put_part(part.module, part.prefix, self._read(part))
            if self._reader is not None and following is not None:
                self._next = (following, self._reader.submit(_read, following))

        leave = unobtrusive(lambda *_: part.weights.release(part.module, part.prefix))
        self._handles.append(part.module.register_forward_pre_hook(unobtrusive(bring)))
        self._handles.append(part.module.register_forward_hook(leave, always_call=True))

    def _read(self, part: _Part) -> Tensors:
        """Return a block's tensors: those that were read ahead, if it was this block."""
        ahead, self._next = self._next, None
        if ahead is not None and ahead[0].module is part.module:
            return ahead[1].result()
        if ahead is not None:
            ahead[1].cancel()
        return _read(part)


def typed_model(weights: PartsOnDisk) -> Any:
    """Return a denoiser without weights, in the dtypes that it computes in: the pipeline asks
    before any is read.
    """
    model = weights.empty_model()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(weights.dtype_of(name))
    return model


def _read(part: _Part) -> Tensors:
    return part.weights.read_part(part.module, part.prefix)


def _fill(part: _Part) -> None:
    part.weights.put_part(part.module, part.prefix, _read(part))
