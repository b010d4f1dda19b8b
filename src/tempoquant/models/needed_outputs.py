"""The blocks of a denoiser that still need earlier blocks' outputs, found by following storages
through one forward.

No block computes: each runs on the meta device for the shapes of its output, and its stand-in
returns zeros that take no memory. Every result computed from a stand-in's output carries the marks
of that block. So the marks on a block's arguments, or on the model's output, show whose outputs
went into them.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tempoquant.calibrate.capture import computing_with
from tempoquant.calibrate.denoiser_model import Carried
from tempoquant.errors import ModelError

Answer = Any
"""The output of a block: a tensor, or a nested structure of tensors and other values."""


class Needed:
    """The blocks whose outputs are carried past each block.

    Args:
        stand_ins: for each block an output of the right structure, dtypes and shapes.
        readers: for each block, and then for the model's output: the blocks whose outputs went into
            its inputs.
    """

    def __init__(self, stand_ins: Sequence[Answer], readers: Sequence[set[int]]) -> None:
        self._stand_ins = list(stand_ins)
        num_blocks = len(stand_ins)
        self.carried_before: list[list[int]] = [
            sorted({block for readers_after in readers[index:] for block in readers_after if block < index})
            for index in range(num_blocks + 1)
        ]
        """For each block, and then for the end, the earlier blocks whose outputs it or a later one
        needs.
        """

    def answers_before(self, index: int, carried: Carried) -> list[Answer]:
        """Return the output of each block before `index`: the carried one, or zeros that nothing
        reads.
        """
        answers, left = self._stand_ins[:index], list(carried)
        for block in self.carried_before[index]:
            leaves, structure = pytree.tree_flatten(self._stand_ins[block])
            filled = [left.pop(0) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            answers[block] = pytree.tree_unflatten(filled, structure)
        return answers

    def carried_after(self, index: int, answers: Sequence[Answer], answer: Answer) -> list[torch.Tensor]:
        """Return the tensors that are carried past block `index`, whose output is `answer`."""
        known = [*answers, answer]
        return [tensor for block in self.carried_before[index + 1] for tensor in _tensors(known[block])]


def what_is_needed(model: nn.Module, blocks: Sequence[nn.Module], inputs: dict[str, Any]) -> Needed:
    """Follow one call of a denoiser whose blocks have no weights in memory.

    Args:
        model: everything outside the blocks is in memory.
        blocks: in the order in which they run.
        inputs: of one call.

    Raises:
        ModelError: blocks run in another order, or more than once; or the model writes into a
            block's output, which would repeat at every replay of that output.
    """
    stand_ins: list[Answer] = []
    readers: list[set[int]] = []
    with _Marks() as marks:

        def stand_in(index: int, block: nn.Module, *args: Any, **kwargs: Any) -> Answer:
            if index != len(stand_ins):
                raise ModelError(
                    f"{type(model).__name__} runs block {index} where block {len(stand_ins)} was expected: its family "
                    "lists blocks in the order in which they run, each once."
                )
            readers.append(marks.of((args, kwargs)))
            shapes = _on_meta(block, args, kwargs)
            device = next(tensor.device for tensor in _tensors((args, kwargs)))
            answer = pytree.tree_map_only(torch.Tensor, functools.partial(_zeros, device), shapes)
            stand_ins.append(answer)
            for tensor in _tensors(answer):
                marks.put_on_answer(tensor, index)
            return answer

        forwards: dict[nn.Module, Callable[..., Any]] = {
            block: functools.partial(stand_in, index, block) for index, block in enumerate(blocks)
        }
        with computing_with(forwards):
            output = model(**inputs)
        readers.append(marks.of(output))
    if len(stand_ins) != len(blocks):
        raise ModelError(f"{type(model).__name__} runs {len(stand_ins)} of its {len(blocks)} blocks.")
    return Needed(stand_ins, readers)


def _on_meta(block: nn.Module, args: Any, kwargs: Any) -> Answer:
    """Run a block without weights for the shapes of its output."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    return type(block).forward(block, *args, **kwargs)


def _zeros(device: torch.device, like: torch.Tensor) -> torch.Tensor:
    """Return zeros of one number's memory."""
    return torch.zeros((), dtype=like.dtype, device=device).expand(like.shape)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class _Marks(TorchDispatchMode):
    """Marks on storages that every operation within this context passes from its inputs to its
    outputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self._marks: dict[int, set[int]] = {}
        self._answers: dict[int, int] = {}

    def of(self, value: Any) -> set[int]:
        """Return the marks of all tensors in a nested structure."""
        keys = [id(tensor.untyped_storage()) for tensor in _tensors(value)]
        return set().union(*(self._marks.get(key, set()) for key in keys))

    def put(self, tensor: torch.Tensor, marks: Iterable[int]) -> None:
        """Add marks to a tensor's storage."""
        storage = tensor.untyped_storage()  # its Python object lives as long as the storage
        key = id(storage)
        if key not in self._marks:
            self._marks[key] = set()
            weakref.finalize(storage, self._marks.pop, key, None).atexit = False
        self._marks[key] |= set(marks)

    def put_on_answer(self, tensor: torch.Tensor, block: int) -> None:
        """Mark a block's output, into which nothing may be written."""
        self.put(tensor, {block})
        key = id(tensor.untyped_storage())
        self._answers[key] = block
        weakref.finalize(tensor.untyped_storage(), self._answers.pop, key, None).atexit = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = _written(func, args, kwargs)
        for tensor in written:
            if (block := self._answers.get(id(tensor.untyped_storage()))) is not None:
                raise ModelError(
                    f"the model writes into what its block {block} answered ({func}), so it cannot be run block by "
                    "block: have its forward make a new tensor instead."
                )
        marks = self.of((args, kwargs))
        result = func(*args, **kwargs)
        if marks:
            for tensor in _tensors((result, written)):
                self.put(tensor, marks)
        return result


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors that an operation writes into."""
    if not func._schema.is_mutable:
        return []
    arguments = func._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    written = [each.name for each in arguments if each.alias_info is not None and each.alias_info.is_write]
    return _tensors([given[name] for name in written if name in given])
