"""Laws of a denoiser that is run block by block: it computes what the whole model computes, and
keeps what it needs.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import WanVACETransformer3DModel
from torch import nn
from torch.utils import _pytree as pytree

from tempoquant.calibrate.capture import watching_inputs
from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.errors import ModelError
from tempoquant.models.family import ModelFamily
from tempoquant.models.needed_outputs import what_is_needed
from tempoquant.models.replay import ReplayedDenoiser
from tempoquant.models.wan.family import WAN, WAN_VACE
from tempoquant.models.weights import DenoiserWeights
from tests.recorded import SOURCE

WIDTH = 6
TOY = dataclasses.replace(WAN, block_lists=("doubles", "singles"))


class Double(nn.Module):
    """A block of two streams; its answer has a structure."""

    def __init__(self) -> None:
        super().__init__()
        self.to_video, self.to_text = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, video: torch.Tensor, *, text: torch.Tensor, time: torch.Tensor) -> dict[str, Any]:
        both = torch.cat([video, text.mean(1, keepdim=True).expand_as(video)], dim=-1)
        return {"video": video + time * self.to_video(both).tanh(), "text": (self.to_text(text), None)}


class Single(nn.Module):
    """A block of one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, states: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return states + time * self.linear(states).relu()


class Toy(nn.Module):
    """Two blocks of two streams, then four of one. What the second answered skips the third and the
    fourth, and the first one's video skips all of the others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.doubles = nn.ModuleList(Double() for _ in range(2))
        self.singles = nn.ModuleList(Single() for _ in range(4))

    def forward(
        self, hidden_states: torch.Tensor, text: torch.Tensor, timestep: torch.Tensor, return_dict: bool
    ) -> Any:
        time, video = (timestep / 1000).view(-1, 1, 1), self.embed(hidden_states)
        first = self.doubles[0](video, text=text, time=time)
        second = self.doubles[1](first["video"], text=first["text"][0], time=time)
        states = skipping = torch.cat([second["text"][0], second["video"]], dim=1)
        states = self.singles[0](states, time)
        states = self.singles[1](states, time=time)
        states = self.singles[2](states + 0.5 * skipping, time)
        states = states * 2
        shift = text.mean(1, keepdim=True)
        states.add_(shift)  # into a tensor of its own, and shift stays what it was
        states = self.singles[3](states.transpose(0, 1).contiguous().transpose(0, 1), time)
        return (self.head(states[:, text.shape[1] :] * first["video"].sigmoid() + shift),)


class Held(DenoiserWeights):
    """Weights of a model in memory, in the place of its files."""

    def __init__(self, model: nn.Module, family: ModelFamily) -> None:
        self.denoiser, self.dtype, self.device = "transformer", torch.float32, "cpu"
        self.family, self.blocks, self.whole = family, family.blocks_of(model), model

    def empty_model(self) -> Any:
        model = copy.deepcopy(self.whole)
        for prefix in ("", *(f"{block}." for block in self.blocks)):
            self.release(model.get_submodule(prefix.removesuffix(".")), prefix)
        return model

    def dtype_of(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str) -> torch.Tensor:
        return self.whole.state_dict()[name]


def sample(inputs: dict[str, tuple[int, ...]], seed: int = 0, denoiser: str = "transformer") -> CalibrationSample:
    """Return a call of random inputs of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in inputs.items()}
    timestep = 950.0 - seed
    tensors["timestep"] = torch.tensor([timestep])
    return CalibrationSample("random", denoiser, timestep, seed, "conditional", tensors)


LATENTS = {"hidden_states": (1, 36, 2, 8, 8), "encoder_hidden_states": (1, 12, 128)}
TOY_INPUTS = {"hidden_states": (1, 5, 3), "text": (1, 4, WIDTH)}


def toy() -> tuple[DenoiserWeights, nn.Module, dict[str, tuple[int, ...]]]:
    torch.manual_seed(0)
    model = Toy().requires_grad_(False)
    return Held(model, TOY), model, TOY_INPUTS


def wan() -> tuple[DenoiserWeights, nn.Module, dict[str, tuple[int, ...]]]:
    weights = DenoiserWeights(SOURCE, "high_noise", torch.float32, "cpu")
    model = weights.empty_model()
    for prefix in ("", *(f"{block}." for block in weights.blocks)):
        weights.fill(model.get_submodule(prefix.removesuffix(".")), prefix)
    return weights, model, LATENTS


def vace() -> tuple[DenoiserWeights, nn.Module, dict[str, tuple[int, ...]]]:
    """Make a model whose hints from one list of blocks are added to the outputs of the other
    list.
    """
    torch.manual_seed(0)
    model = WanVACETransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8, ffn_dim=32,
        num_layers=4, rope_max_seq_len=16, vace_layers=[0, 2], vace_in_channels=6,
    )  # fmt: skip
    model.requires_grad_(False).eval()
    shapes = {
        "hidden_states": (1, 4, 2, 4, 4), "encoder_hidden_states": (1, 5, 8), "control_hidden_states": (1, 6, 2, 4, 4),
        "control_hidden_states_scale": (2,),
    }  # fmt: skip
    return Held(model, WAN_VACE), model, shapes


def tensors_of(answer: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(answer) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("made", [toy, wan, vace])
@torch.no_grad()
def test_block_by_block_it_computes_what_the_whole_model_computes(made: Callable[[], Any]) -> None:
    weights, whole, shapes = made()
    model = ReplayedDenoiser(weights)
    samples = [sample(shapes, seed, weights.denoiser) for seed in range(2)]
    answers: list[list[torch.Tensor]] = []  # of each block, sample after sample
    for block in weights.blocks:
        whole.get_submodule(block).register_forward_hook(lambda *call: answers.append(tensors_of(call[-1])))
    wanted = [whole(**each.inputs, return_dict=False)[0] for each in samples]
    carried: list[Any] = [(), ()]
    with model.running(samples):
        for index in range(model.num_blocks):
            with model.block(index):
                carried = [model.run_block(index, *each) for each in zip(samples, carried, strict=True)]
            for number, found in enumerate(carried):
                last = answers[number * model.num_blocks + index]
                assert all(map(torch.equal, found[-len(last) :], last))
        for each, found, noise in zip(samples, carried, wanted, strict=True):
            assert torch.equal(model.finish(each, found), noise)


def needed(weights: DenoiserWeights, shapes: dict[str, tuple[int, ...]]) -> list[list[int]]:
    model = weights.empty_model()
    weights.fill(model, "")
    blocks = [model.get_submodule(name) for name in weights.blocks]
    return what_is_needed(model, blocks, {**sample(shapes).inputs, "return_dict": False}).carried_before


def test_what_a_block_answered_is_kept_as_long_as_it_is_needed_and_no_longer() -> None:
    weights, _, shapes = toy()
    assert needed(weights, shapes) == [[], [0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 4], [0, 5]]
    weights, _, shapes = vace()  # two blocks of hints, the second one's made of the first one's; then blocks 0 … 3
    assert needed(weights, shapes) == [[], [0], [0, 1], [0, 1, 2], [1, 3], [1, 4], [5]]


def test_nothing_is_in_memory_but_the_block_that_runs_and_what_is_in_none() -> None:
    weights, _, shapes = toy()
    model = ReplayedDenoiser(weights)
    only = sample(shapes)

    def in_memory() -> set[str]:
        return {name.split(".")[0] for name, each in model._model.named_parameters() if not each.is_meta}

    assert in_memory() == set()
    with torch.no_grad(), model.running([only]):
        assert in_memory() == {"embed", "head"}
        with model.block(0):
            assert in_memory() == {"embed", "head", "doubles"}
            carried = model.run_block(0, only, ())
        with pytest.raises(RuntimeError):  # the block is gone
            model.run_block(0, only, ())
        assert in_memory() == {"embed", "head"}
    assert in_memory() == set() and [tensor.shape for tensor in carried] == [(1, 5, WIDTH), (1, 4, WIDTH)]
    with pytest.raises(RuntimeError):
        model.finish(only, [*carried, torch.zeros(1, 9, WIDTH)])


def test_what_comes_after_the_last_block_can_be_differentiated() -> None:
    weights, _, shapes = wan()
    model = ReplayedDenoiser(weights)
    only = sample(shapes, denoiser="high_noise")
    with model.running([only]):
        carried: Any = ()
        for index in range(model.num_blocks):
            with torch.no_grad(), model.block(index):
                carried = model.run_block(index, only, carried)
        [states] = carried
        model.finish(only, [states.requires_grad_()]).sum().backward()
    assert states.grad is not None and bool((states.grad != 0).any())


class Chain(nn.Module):
    """Blocks in a row, in an order of their own."""

    def __init__(self, order: tuple[int, ...], in_place: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.singles = nn.ModuleList(Single() for _ in range(3))
        self._order, self._in_place = order, in_place

    def forward(
        self, hidden_states: torch.Tensor, text: torch.Tensor, timestep: torch.Tensor, return_dict: bool
    ) -> Any:
        states = self.embed(hidden_states)
        for index in self._order:
            states = self.singles[index](states, timestep)
            if self._in_place:
                states[:, :1] += 1
        return (states,)


@pytest.mark.parametrize(
    ("order", "in_place", "words"),
    [
        ((0, 2, 1), False, "Chain runs block 2 where block 1 was expected"),
        ((0, 1, 1, 2), False, "Chain runs block 1 where block 2 was expected"),
        ((0, 1, 2, 0), False, "Chain runs block 0 where block 3 was expected"),
        ((0, 1), False, "Chain runs 2 of its 3 blocks"),
        ((0, 1, 2), True, "writes into what its block 0 answered .*have its forward make a new tensor"),
    ],
)
def test_a_model_that_cannot_be_run_block_by_block_is_refused(
    order: tuple[int, ...], in_place: bool, words: str
) -> None:
    model = ReplayedDenoiser(Held(Chain(order, in_place).requires_grad_(False), TOY))
    with pytest.raises(ModelError, match=words), model.running([sample(TOY_INPUTS)]):
        pass
    assert all(parameter.is_meta for parameter in model._model.parameters())


def test_each_expert_has_ten_linears_a_block_and_those_of_one_input_stand_together() -> None:
    model = ReplayedDenoiser(DenoiserWeights(SOURCE, "low_noise", torch.float32, "cpu"))
    for index in range(model.num_blocks):
        assert model.shared_inputs(index) == [
            ("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn1.to_out.0",), ("attn2.to_q",),
            ("attn2.to_k", "attn2.to_v"), ("attn2.to_out.0",), ("ffn.net.0.proj",), ("ffn.net.2",),
        ]  # fmt: skip
    assert model.name_of(3, "attn1.to_out.0") == "blocks.3.attn1.to_out.0"


@torch.no_grad()
def test_linears_said_to_share_an_input_do() -> None:
    weights, _, shapes = wan()
    model, only = ReplayedDenoiser(weights), sample(shapes, denoiser="high_noise")
    with model.running([only]), model.block(0) as block:
        inputs: dict[str, torch.Tensor] = {}
        linears = {name: block.get_submodule(name) for group in model.shared_inputs(0) for name in group}
        with watching_inputs(linears, lambda name, x: inputs.setdefault(name, x.clone())):
            model.run_block(0, only, ())
    groups = model.shared_inputs(0)
    for group in groups:
        assert all(torch.equal(inputs[name], inputs[group[0]]) for name in group)
    first = [inputs[group[0]] for group in groups]
    assert not any(a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
