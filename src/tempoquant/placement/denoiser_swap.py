"""One denoiser on the device at a time; the next one is copied into its place while it still runs.

During the last call of a denoiser each block leaves once it has run. The block of the next denoiser
is copied into its slot, in parallel with the computation of the following blocks. Slots are
allocated once, so the denoisers change places without waiting, and without room for more than one
of them. The scheduler's timesteps predict the last call. A wrong prediction costs time, and never
changes the result: a call brings every part that it lacks.
"""

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tempoquant.errors import UnsupportedError
from tempoquant.models.family import ModelFamily
from tempoquant.models.hooks import unobtrusive
from tempoquant.placement.compiled_blocks import around_calls
from tempoquant.placement.host_copies import HostCopy, PinnedSlabs, SideStream, Slot, tensors_of
from tempoquant.timesteps import Denoiser, denoiser_at


@dataclass(frozen=True, eq=False)
class Placed:
    """A denoiser whose parts come and go.

    Attributes:
        family: of its pipeline.
        model: the denoiser.
        blocks: of it, in the order in which they run.
    """

    family: ModelFamily
    model: Any
    blocks: tuple[nn.Module, ...]

    @classmethod
    def of(cls, family: ModelFamily, model: Any) -> "Placed":
        """Return a denoiser with the blocks of its family."""
        return cls(family, model, tuple(model.get_submodule(name) for name in family.blocks_of(model)))


class DenoiserSwap:
    """Denoisers whose weights wait in page-locked host memory, with hooks on their calls.

    Args:
        denoisers: by their names.
        stream: copies to the device.
        foresee: maps (denoiser, timestep, calls of that denoiser at that timestep so far, this one
            included) to the next denoiser: this one again, another one, or None for none.
        timestep_of: maps a call's arguments by name to its timestep; None for the family's
            function, which waits for the device.
    """

    def __init__(
        self,
        denoisers: Mapping[str, Placed],
        stream: SideStream,
        foresee: Callable[[str, float, int], str | None],
        timestep_of: Callable[[Mapping[str, Any]], float] | None = None,
    ) -> None:
        self._foresee = foresee
        slots: list[Slot] = []
        self._parts = {denoiser: _parts(placed, stream, slots) for denoiser, placed in denoisers.items()}
        self._calls_so_far: tuple[str, float, int] | None = None
        self._next: str | None = None
        self._handles: list[Any] = []
        self._undo: list[Callable[[], None]] = []
        for denoiser, placed in denoisers.items():
            model = placed.model
            self._handles.append(model.register_forward_pre_hook(requiring_same_weights(denoiser, model)))
            before = _before_call(self._begin, denoiser, placed, timestep_of or placed.family.timestep_of)
            self._handles.append(model.register_forward_pre_hook(before, with_kwargs=True))
            for index, module in enumerate((model, *placed.blocks)):
                self._hook(denoiser, index, module)

    def on_device(self, denoiser: str) -> list[bool]:
        """Return whether each part is on the device: first everything outside the blocks, then each
        block in order.
        """
        return [part.is_here for part in self._parts[denoiser]]

    def remove(self) -> None:
        """Restore plain models on the host."""
        for handle in self._handles:
            handle.remove()
        for undo in reversed(self._undo):
            undo()
        for parts in self._parts.values():
            _leave(parts)
        for part in itertools.chain.from_iterable(self._parts.values()):
            part.give_back()

    def _hook(self, denoiser: str, index: int, module: nn.Module) -> None:
        part = self._parts[denoiser][index]
        before, after = unobtrusive(lambda *_: part.wait()), unobtrusive(lambda *_: self._exchange(denoiser, index))
        self._undo.append(around_calls(module, before, after))

    def _begin(self, denoiser: str, timestep: float) -> None:
        """Prepare a call: make room, bring missing parts, and predict the next denoiser."""
        own = self._parts[denoiser]
        for other, parts in self._parts.items():
            if other != denoiser:
                _leave(parts)
                for part in parts[len(own) :]:
                    part.give_back()
        for part in own:
            part.bring()
        last = self._calls_so_far
        count = last[2] + 1 if last is not None and last[:2] == (denoiser, timestep) else 1
        self._calls_so_far = (denoiser, timestep, count)
        self._next = self._foresee(denoiser, timestep, count)

    def _exchange(self, denoiser: str, index: int) -> None:
        """Replace a part that has run by its counterpart, in a denoiser's last call."""
        if self._next == denoiser:
            return
        part = self._parts[denoiser][index]
        if self._next is not None and index < len(self._parts[self._next]):
            part.leave()
            self._parts[self._next][index].bring()
        else:
            part.give_back()


def next_denoiser(
    timesteps: Sequence[float], denoisers: Sequence[Denoiser], num_branches: int
) -> Callable[[str, float, int], str | None]:
    """Return the function that predicts the next denoiser in a sampling loop, for `DenoiserSwap`.

    Args:
        timesteps: of the loop, in order.
        denoisers: of the pipeline, the noisiest first.
        num_branches: calls of a step: two with classifier-free guidance.
    """

    def foresee(denoiser: str, timestep: float, num_calls: int) -> str | None:
        if timestep not in timesteps or num_calls % num_branches:
            return denoiser
        following = timesteps[timesteps.index(timestep) + 1 :]
        return denoiser_at(denoisers, following[0]).name if following else None

    return foresee


def _before_call(
    begin: Callable[[str, float], None],
    denoiser: str,
    placed: Placed,
    timestep_of: Callable[[Mapping[str, Any]], float],
) -> Callable[..., None]:
    signature = inspect.signature(type(placed.model).forward)

    def hook(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begin(denoiser, timestep_of(signature.bind(model, *args, **kwargs).arguments))

    return hook


def requiring_same_weights(denoiser: str, model: nn.Module) -> Callable[..., None]:
    """Return a hook before the model's calls that raises UnsupportedError once the model's weights
    have changed.
    """
    known = tensors_of(model).keys()

    def check(*_: Any) -> None:
        if tensors_of(model).keys() != known:
            raise UnsupportedError(
                f"the {denoiser} denoiser has got other weights since the memory mode was set (by peft, perhaps): "
                "set the mode again after loading."
            )

    return unobtrusive(check)


def _parts(placed: Placed, stream: SideStream, slots: list[Slot]) -> list[HostCopy]:
    """Return the parts outside blocks, and each block; parts at the same place in the order share a
    slot.
    """
    slabs = PinnedSlabs() if stream.device.type == "cuda" else None
    parts = parts_of(placed)
    slots += [Slot(stream) for _ in range(len(slots), len(parts))]
    return [HostCopy(part, stream, slot, slabs) for part, slot in zip(parts, slots, strict=False)]


def parts_of(placed: Placed) -> list[list[torch.Tensor]]:
    """Return the tensors of a denoiser: those outside blocks, then those of each block."""
    blocks = [tensors_of(block) for block in placed.blocks]
    rest = {
        key: tensor for key, tensor in tensors_of(placed.model).items() if not any(key in block for block in blocks)
    }
    return [list(part.values()) for part in (rest, *blocks)]


def _leave(parts: Sequence[HostCopy]) -> None:
    for part in parts:
        if part.is_here:
            part.leave()
