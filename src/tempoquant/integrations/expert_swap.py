"""One expert on the device at a time, the next one copied to where the first one was while that one is still running.

During the last call of an expert each block leaves as soon as it has run, and the block of the expert that comes next
is copied into the memory it gave back, beside the computation of the blocks that follow. So the experts change places
without waiting, and without room for more than one of them. Whether a call is the last one is foreseen from the
scheduler's timesteps; foreseeing wrongly costs time, never the result: a call brings whatever it lacks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tempoquant.errors import UnsupportedError
from tempoquant.integrations.host_copies import HostCopy, PinnedSlabs, SideStream, tensors_of, unobtrusive
from tempoquant.timesteps import Expert, expert_of


class ExpertSwap:
    """Experts whose weights wait in page-locked host memory, hooked into their calls.

    Args:
        experts: by which half of the trajectory they serve.
        stream: copies to the device.
        foresee: (expert, timestep, calls of that expert at that timestep so far, this one included) to who is called
            next: this expert again, another one, or None for nobody.
    """

    def __init__(
        self,
        experts: Mapping[Expert, Any],
        stream: SideStream,
        foresee: Callable[[Expert, float, int], Expert | None],
    ) -> None:
        self._foresee = foresee
        self._parts = {expert: _parts(model, stream) for expert, model in experts.items()}
        self._calls_so_far: tuple[Expert, float, int] | None = None
        self._next: Expert | None = None
        self._handles: list[Any] = []
        for expert, model in experts.items():
            self._handles.append(model.register_forward_pre_hook(requiring_same_weights(expert, model)))
            begin = model.register_forward_pre_hook(_before_call(self._begin, expert), with_kwargs=True)
            self._handles.append(begin)
            for index, module in enumerate((model, *model.blocks)):
                self._hook(expert, index, module)

    def on_device(self, expert: Expert) -> list[bool]:
        """Whether it is there: first all that is in no block, then each block in order."""
        return [part.is_here for part in self._parts[expert]]

    def remove(self) -> None:
        """Leave plain models on the host."""
        for handle in self._handles:
            handle.remove()
        for parts in self._parts.values():
            _leave(parts)

    def _hook(self, expert: Expert, index: int, module: nn.Module) -> None:
        part = self._parts[expert][index]
        before, after = unobtrusive(lambda *_: part.wait()), unobtrusive(lambda *_: self._exchange(expert, index))
        self._handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def _begin(self, expert: Expert, timestep: float) -> None:
        """Before a call: make room, bring what is missing, and foresee who comes next."""
        for other, parts in self._parts.items():
            if other is not expert:
                _leave(parts)
        for part in self._parts[expert]:
            part.bring()
        last = self._calls_so_far
        count = last[2] + 1 if last is not None and last[:2] == (expert, timestep) else 1
        self._calls_so_far = (expert, timestep, count)
        self._next = self._foresee(expert, timestep, count)

    def _exchange(self, expert: Expert, index: int) -> None:
        """After a part has run: in an expert's last call it makes room for its counterpart."""
        if self._next is expert:
            return
        self._parts[expert][index].leave()
        if self._next is not None and index < len(self._parts[self._next]):
            self._parts[self._next][index].bring()


def next_expert(
    timesteps: Sequence[float], boundary_ratio: float, num_branches: int
) -> Callable[[Expert, float, int], Expert | None]:
    """Who follows in a sampling loop, as `ExpertSwap` asks.

    Args:
        timesteps: of the loop, in order.
        num_branches: calls of a step: two with classifier-free guidance.
    """

    def foresee(expert: Expert, timestep: float, num_calls: int) -> Expert | None:
        if timestep not in timesteps or num_calls % num_branches:
            return expert
        following = timesteps[timesteps.index(timestep) + 1 :]
        return expert_of(following[0], boundary_ratio) if following else None

    return foresee


def _before_call(begin: Callable[[Expert, float], None], expert: Expert) -> Callable[..., None]:
    def hook(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]  # after hidden_states
        begin(expert, float(timestep.flatten()[0]))

    return hook


def requiring_same_weights(expert: Expert, model: nn.Module) -> Callable[..., None]:
    """A hook before the model's calls that raises UnsupportedError once it has other weights than now."""
    known = tensors_of(model).keys()

    def check(*_: Any) -> None:
        if tensors_of(model).keys() != known:
            raise UnsupportedError(
                f"the {expert.value} expert has got other weights since the memory mode was set (by peft, perhaps): "
                "set the mode again after loading."
            )

    return unobtrusive(check)


def _parts(model: Any, stream: SideStream) -> list[HostCopy]:
    """What is in no block, and each block."""
    slabs = PinnedSlabs() if stream.device.type == "cuda" else None
    return [HostCopy(part, stream, slabs) for part in parts_of(model)]


def parts_of(model: Any) -> list[list[torch.Tensor]]:
    """The tensors of an expert: those in no block, then those of each block."""
    blocks = [tensors_of(block) for block in model.blocks]
    rest = {key: tensor for key, tensor in tensors_of(model).items() if not any(key in block for block in blocks)}
    return [list(part.values()) for part in (rest, *blocks)]


def _leave(parts: Sequence[HostCopy]) -> None:
    for part in parts:
        if part.is_here:
            part.leave()
