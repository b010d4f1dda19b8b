"""Laws of slots: in whatever order parts come and go, what is computed with is there, and nobody
else's is touched.
"""

import itertools
import random
from typing import Any

import hypothesis
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from hypothesis import strategies
from torch import nn

from tempoquant.models.hooks import unobtrusive
from tempoquant.placement import memory_modes
from tempoquant.placement.host_copies import HostCopy, Slot, slot_bytes, starts_of
from tempoquant.placement.memory_modes import set_memory_mode
from tests.placement.queues import Queues
from tests.quantized_wan import generate, write_pipeline

SIZES = ((3, 40, 300), (70, 5, 300, 8))
"""Numbers in each part of two models."""

ACTIONS = ("begin 0", "begin 1", "run", "run and exchange", "run and give back", "fail", "others", "remove")


class Model:
    """Parts that come and go, computed with in order."""

    def __init__(self, number: int, queues: Queues, slots: list[Slot]) -> None:
        self.queues, self.position = queues, 0
        self.values = [torch.full((size,), 10.0 * number + index) for index, size in enumerate(SIZES[number])]
        self.tensors = [value.clone() for value in self.values]
        self.parts = [HostCopy([tensor], queues, slot) for tensor, slot in zip(self.tensors, slots, strict=False)]

    def run_next(self) -> HostCopy | None:
        """Compute with the next part; None after the last one."""
        if self.position == len(self.parts):
            return None
        index = self.position
        part, wanted = self.parts[index], self.values[index]
        part.wait()
        there = self.tensors[index].detach()

        def check() -> None:
            assert torch.equal(there, wanted), f"part {index} was not there, or no longer"

        self.queues.compute(check)
        self.position += 1
        return part


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(strategies.lists(strategies.sampled_from(ACTIONS), max_size=40), strategies.integers(0, 2**32))
def test_no_part_is_overwritten_before_it_was_computed_with(actions: list[str], seed: int) -> None:
    queues = Queues()
    slots = [Slot(queues) for _ in range(max(map(len, SIZES)))]
    models = [Model(number, queues, slots) for number in range(2)]
    current = models[0]

    def leave_all(model: Model) -> None:
        for part in model.parts:
            if part.is_here:
                part.leave()

    def begin(number: int) -> Model:
        leave_all(models[1 - number])
        for part in models[number].parts:
            part.bring()
        models[number].position = 0
        return models[number]

    begin(0)
    for action in actions:
        if action.startswith("begin"):
            current = begin(int(action[-1]))
        elif action.startswith("run") and (part := current.run_next()) is not None:
            other, index = models[1 - models.index(current)], current.position - 1
            if action == "run and exchange" and index < len(other.parts):
                part.leave()
                other.parts[index].bring()
            elif action == "run and give back":
                part.give_back()
        elif action == "fail":
            current.position = len(current.parts)
        elif action == "others":
            queues.use_free_memory()
        elif action == "remove":
            for model in models:
                leave_all(model)
            for part in itertools.chain(*(model.parts for model in models)):
                part.give_back()
            current.position = len(current.parts)
    queues.use_free_memory()
    choices = random.Random(seed)
    queues.run_all(iter(lambda: choices.random() < 0.5, None))


def test_slots_take_one_model_of_the_largest_parts_and_give_all_back() -> None:
    queues = Queues(computes_at_once=True)
    slots = [Slot(queues) for _ in range(4)]
    models = [Model(number, queues, slots) for number in range(2)]
    for model in (models[0], models[1], models[0]):
        for part in model.parts:
            part.bring()
        for part in model.parts:
            part.leave()
    largest = [max(sizes) for sizes in itertools.zip_longest(*SIZES, fillvalue=0)]
    assert queues.most == sum(slot_bytes([4 * size]) for size in largest) == sum(slot.num_bytes for slot in slots)
    for slot in slots:
        slot.give_back()
    assert queues.reserved == 0


def test_a_slot_that_is_in_use_is_not_filled() -> None:
    queues = Queues()
    slot = Slot(queues)
    first, second = (HostCopy([torch.ones(3)], queues, slot) for _ in range(2))
    first.bring()
    with pytest.raises(RuntimeError, match="another part of a model is in it"):
        second.bring()
    assert not second.is_here
    slot.give_back()
    assert queues.reserved == slot.num_bytes, "nor given back"


def test_tensors_lie_in_a_slot_without_overlap_and_aligned() -> None:
    tensors = [torch.empty(n, dtype=dtype) for n in (0, 1, 3, 700) for dtype in (torch.uint8, torch.float32)]
    starts = starts_of(tensors)
    assert all(start % 256 == 0 for start in starts)
    ends = [start + tensor.nbytes for start, tensor in zip(starts, tensors, strict=True)]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    assert ends[-1] <= slot_bytes(tensor.nbytes for tensor in tensors)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_pipeline(tmp_path_factory.mktemp("q") / "pipeline", centred_by_bin=True)


@pytest.fixture
def queues(monkeypatch: pytest.MonkeyPatch) -> Queues:
    """Replace every side stream; copies are done as late as computing allows."""
    made = Queues(computes_at_once=True)
    monkeypatch.setattr(memory_modes, "SideStream", lambda _device: made)
    return made


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_a_video_made_in_slots_is_the_same_and_they_hold_one_expert(folder: Any, queues: Queues, context: Any) -> None:
    pipeline = WanImageToVideoPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    before = generate(pipeline)
    in_force = set_memory_mode(pipeline, "swap", "cpu")
    for _ in range(2):
        with context():
            found = generate(pipeline)
        assert torch.equal(found, before)
        assert queues.reserved == 0, "the autoencoder has the device to itself"
    one = sum(slot_bytes(host.nbytes for _, host in part._tensors) for part in in_force.swap._parts["high_noise"])
    assert queues.most == one
    in_force.remove()
    assert torch.equal(generate(pipeline), before)


@pytest.mark.parametrize("component", ["transformer", "transformer_2"])
def test_a_call_that_fails_and_a_mode_taken_off_midway_spoil_nothing(
    folder: Any, queues: Queues, component: str
) -> None:
    pipeline = WanImageToVideoPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    before = generate(pipeline)
    set_memory_mode(pipeline, "swap", "cpu")

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    def broken() -> None:
        model: nn.Module = getattr(pipeline, component)
        handle = model.blocks[0].ffn.register_forward_pre_hook(unobtrusive(fail))
        with pytest.raises(ZeroDivisionError):
            generate(pipeline)
        handle.remove()

    broken()
    assert torch.equal(generate(pipeline), before)
    broken()
    set_memory_mode(pipeline, "resident", "cpu")
    assert queues.reserved == 0 and torch.equal(generate(pipeline), before)
    set_memory_mode(pipeline, "swap", "cpu")
    assert torch.equal(generate(pipeline), before)
