"""The computation of a model in one call, operation by operation, traced on the meta device.

Products are counted by the formulas of PyTorch's own FlopCounterMode (`torch.utils.flop_counter`),
attention as one kernel. Of all other operations the bytes count: what each reads and writes, and
what is left where neighbours are one kernel.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from tempoquant.planning.gpus import Operand

Kind = Literal["linear", "product", "self-attention", "cross-attention", "other"]

_MAKES_NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "lift_fresh")


@dataclass(frozen=True)
class Traced:
    """One operation that moves bytes.

    Attributes:
        module: that called it, by its name in the model; "" for the model itself.
        kind: of operation; "linear" is the product of an nn.Linear, "product" any other one.
        operand: what a product multiplies; None for other operations.
        operations: two a product.
        reads, writes: bytes by storage, each storage numbered in the order in which it was seen.
        input: of a linear: the number of its input's storage.
        shape: of a linear: rows, in_features, out_features.
    """

    module: str
    kind: Kind
    operand: Operand | None
    operations: float
    reads: Mapping[int, int]
    writes: Mapping[int, int]
    input: int = -1
    shape: tuple[int, int, int] = (0, 0, 0)

    @property
    def num_bytes(self) -> int:
        """Return what is read and written, where it is a kernel of its own."""
        return sum(self.reads.values()) + sum(self.writes.values())


def trace(model: nn.Module, compute: Callable[[], Any]) -> list[Traced]:
    """Return the operations of a computation with a model whose tensors are on the meta device, in
    order.
    """
    tracer = _Tracer()
    with torch.no_grad(), ExitStack() as hooks:
        for name, module in model.named_modules():
            enter = functools.partial(tracer.enter, name)
            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(tracer.leave).remove)
        with tracer, _AsOneKernel(tracer):
            compute()
    return tracer.found


def fused_bytes(found: Sequence[Traced]) -> list[int]:
    """Return the bytes of each operation where neighbours that are no products run as one kernel,
    at its best.

    A run of them reads each tensor from outside once, and writes what is used after it. An
    operation's bytes are what it adds to that; products keep theirs.
    """
    last_read = {storage: index for index, each in enumerate(found) for storage in each.reads}
    bytes_of = []
    for run in _runs(found):
        end, known = run[-1], set[int]()
        for index in run:
            each = found[index]
            if each.kind != "other":
                bytes_of.append(each.num_bytes)
                continue
            read = sum(size for storage, size in each.reads.items() if storage not in known)
            kept = (storage for storage in each.writes if last_read.get(storage, len(found)) > end)
            bytes_of.append(read + sum(each.writes[storage] for storage in kept))
            known |= {*each.reads, *each.writes}
    return bytes_of


def _runs(found: Sequence[Traced]) -> Iterator[list[int]]:
    """Return the indices of products one by one, and of what lies between two of them together."""
    run: list[int] = []
    for index, each in enumerate(found):
        if each.kind == "other":
            run.append(index)
            continue
        if run:
            yield run
        yield [index]
        run = []
    if run:
        yield run


@dataclass
class _Frame:
    """A module that runs.

    Attributes:
        input: of a linear: the number of its input's storage.
        read: rows of each tensor that its linears read, by the number of the storage.
    """

    name: str
    module: Any
    input: int = -1
    read: dict[int, int] = field(default_factory=dict)


class _Tracer(TorchDispatchMode):
    """Notes every operation that moves bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Traced] = []
        self._stack: list[_Frame] = []
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []  # an address is used again once its storage is gone

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note that a module begins: a hook."""
        frame = _Frame(name, module)
        if isinstance(module, nn.Linear) and args:
            frame.input = self.number_of(args[0])
            if self._stack:
                self._stack[-1].read[frame.input] = _num_rows(args[0])
        self._stack.append(frame)

    def leave(self, *_: Any) -> None:
        """Note that a module ends: a hook."""
        self._stack.pop()

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor) -> None:
        """Note scaled dot products as one kernel.

        It is self-attention where as many keys as there are rows read by the module's linears, of
        all tensors together, meet as many queries.
        """
        read = self._stack[-1].read if self._stack else {}
        num_keys, num_queries = (_num_rows(each) // each.shape[1] for each in (key, query))
        is_own = num_keys == num_queries and sum(read.values()) in (0, num_keys)
        operations = sdpa_flop_count(query.shape, key.shape, value.shape)
        self._note("self-attention" if is_own else "cross-attention", (query, key, value), (output,), operations)

    def one_kernel(self, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
        """Note an operation that falls apart on the meta device, and is one kernel elsewhere."""
        self._note("other", inputs, (output,), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = _tensors((args, kwargs))
        before = {self.number_of(each) for each in inputs}
        output = func(*args, **(kwargs or {}))
        outputs = _tensors(output)
        packet = func._overloadpacket
        is_view = not func._schema.is_mutable and all(self.number_of(each) in before for each in outputs)
        if is_view or packet.__name__ in _MAKES_NOTHING:
            return output
        if packet not in flop_registry:
            self._note("other", inputs, outputs, 0)
            return output
        operations = flop_registry[packet](*args, **(kwargs or {}), out_val=output)
        is_linear = bool(self._stack) and isinstance(self._stack[-1].module, nn.Linear)
        self._note("linear" if is_linear else "product", inputs, outputs, operations, "convolution" in packet.__name__)
        return output

    def _note(
        self,
        kind: Kind,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        operations: float,
        is_convolution: bool = False,
    ) -> None:
        operand = None if kind == "other" else _operand(inputs, is_convolution)
        reads = {self.number_of(each): _num_bytes(each) for each in inputs}
        writes = {self.number_of(each): _num_bytes(each) for each in outputs}
        module = self._stack[-1].name if self._stack else ""
        found = Traced(module, kind, operand, float(operations), reads, writes)
        if kind == "linear":
            frame = self._stack[-1]
            rows, linear = max(_num_rows(each) for each in outputs), frame.module
            found = replace(found, input=frame.input, shape=(rows, linear.in_features, linear.out_features))
        self.found.append(found)

    def number_of(self, tensor: torch.Tensor) -> int:
        """Return a storage's number."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._numbers:
            self._numbers[storage._cdata] = len(self._numbers)
            self._alive.append(storage)
        return self._numbers[storage._cdata]


class _AsOneKernel(TorchFunctionMode):
    """Attention and RMS norms are one kernel each, as on a GPU."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            query, key, value = (
                args[i] if len(args) > i else given[n] for i, n in enumerate(("query", "key", "value"))
            )
            output = torch.empty_like(query.transpose(1, 2)).transpose(1, 2)  # as flash answers
            self._tracer.attention(query, key, value, output)
            return output
        if func is functional.rms_norm:
            output = torch.empty_like(args[0])
            self._tracer.one_kernel(_tensors((args, given)), output)
            return output
        return func(*args, **given)


def _operand(inputs: Sequence[torch.Tensor], is_convolution: bool) -> Operand:
    """Return what is multiplied: PyTorch lets float32 convolutions run in TF32, and float32
    products not.
    """
    if any(each.dtype in (torch.bfloat16, torch.float16) for each in inputs):
        return "bf16"
    return "tf32" if is_convolution else "fp32"


def _num_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's numbers; one that is expanded has its storage alone."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _num_rows(tensor: torch.Tensor) -> int:
    return tensor.numel() // max(1, tensor.shape[-1])


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
