"""Laws of block-by-block quantization, on a toy expert that is no Wan: calibration must not need one."""

import pytest
import torch
from torch import nn

from tempoquant import quantize_linear
from tempoquant.calibrate.capture import first_call, watching_calls, watching_inputs
from tempoquant.calibrate.sample import CalibrationSample, CalibrationSet
from tempoquant.calibrate.sequential import BlockCall, quantize_expert
from tempoquant.errors import CalibrationError, ModelError
from tempoquant.kernels.reference import dequantize_residual
from tempoquant.methods import ClipSearch
from tempoquant.recipe import LayerRule, Recipe
from tempoquant.timesteps import Expert, TimestepBins

WIDTH = 64
PAPER = Recipe.load("paper").replace(rank=2)
BINS = TimestepBins((500.0,))


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor, *, shift: float) -> torch.Tensor:
        return hidden + self.down(torch.relu(self.up(hidden + shift)))


class ToyExpert:
    """Three blocks; the first block's input is the sample's own, shifted by its timestep."""

    expert = Expert.LOW_NOISE
    num_blocks = 3

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(self.num_blocks))
        self.num_block_calls = 0

    def first_block_call(self, sample: CalibrationSample) -> BlockCall:
        return ((sample.inputs["hidden"],), {"shift": sample.timestep / 1000})

    def block(self, index: int) -> nn.Module:
        return self.blocks[index]

    def linears(self, index: int) -> dict[str, nn.Linear]:
        block = self.blocks[index]
        return {f"blocks.{index}.up": block.up, f"blocks.{index}.down": block.down}

    def next_block_call(self, call: BlockCall, output: torch.Tensor) -> BlockCall:
        return ((output,), call[1])


def sample(timestep: float, seed: int, expert: Expert = Expert.LOW_NOISE) -> CalibrationSample:
    hidden = torch.randn(1, 50, WIDTH, generator=torch.Generator().manual_seed(seed))
    return CalibrationSample(f"prompt-{seed}", expert, timestep, 0, "conditional", {"hidden": hidden}, hidden)


def samples() -> CalibrationSet:
    calls = [sample(timestep, seed) for seed, timestep in enumerate((100.0, 400.0, 600.0, 800.0))]
    return CalibrationSet(calls, calls[:1] + calls[-1:])


def test_every_layer_comes_once_in_block_order() -> None:
    names = [layer.name for layer in quantize_expert(ToyExpert(), samples(), PAPER, BINS)]
    assert names == [f"blocks.{i}.{part}" for i in range(3) for part in ("up", "down")]


def test_a_layer_equals_the_one_quantized_alone_on_the_inputs_it_sees() -> None:
    model, calibration = ToyExpert(), samples()
    seen: dict[str, list[torch.Tensor]] = {}
    with watching_inputs(model.linears(1), lambda name, x: seen.setdefault(name, []).append(x.detach().clone())):
        for call in calibration.statistics:
            hidden, shift = call.inputs["hidden"], call.timestep / 1000
            for block in model.blocks:
                hidden = block(hidden, shift=shift)
    by_name = {layer.name: layer.layer for layer in quantize_expert(model, calibration, PAPER, BINS)}
    for name, linear in model.linears(1).items():
        inputs = [x.reshape(-1, x.shape[-1]) for x in seen[name]]
        alone = quantize_linear(linear.weight, linear.bias, torch.cat(inputs), PAPER.replace(clip_ratios=()))
        assert torch.equal(by_name[name].packed, alone.packed)
        # The clip search reads its own samples, here the first and the last, one in each bin.
        layer = by_name[name]
        residual = dequantize_residual(layer.tensors, layer.format)
        search = ClipSearch(residual, layer.format, layer.activation_scale_rule, PAPER.clip_candidates(), 2, 4096)
        for timestep_bin, x in enumerate((inputs[0], inputs[-1])):
            search.add(x / layer.smoothing_factor.float(), timestep_bin)
        assert torch.equal(layer.clip_ratio, search.best())


def test_no_hook_is_left_behind() -> None:
    model = ToyExpert()
    list(quantize_expert(model, samples(), PAPER, BINS))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.blocks.modules())


def test_hooks_are_gone_after_an_error_too() -> None:
    model = ToyExpert()
    spoiled = samples()
    spoiled.statistics[0].inputs["hidden"][0, 3, 4] = torch.nan
    with pytest.raises(CalibrationError, match=r"input of blocks\.0\.up holds NaN"):
        list(quantize_expert(model, spoiled, PAPER, BINS))
    assert not any(module._forward_pre_hooks for module in model.blocks.modules())


def test_a_damaged_weight_is_named() -> None:
    model = ToyExpert()
    with torch.no_grad():
        model.blocks[2].down.weight[0, 0] = torch.inf
    with pytest.raises(ModelError, match=r"weight of blocks.2.down holds NaN or Inf"):
        list(quantize_expert(model, samples(), PAPER, BINS))


def test_layer_rules_and_kept_blocks_leave_layers_in_16_bits() -> None:
    recipe = PAPER.replace(layers=(LayerRule("*.down", "16bit"),), keep_16bit_blocks=(1, 0))
    names = [layer.name for layer in quantize_expert(ToyExpert(), samples(), recipe, BINS)]
    assert names == ["blocks.1.up", "blocks.2.up"]


def test_an_expert_without_samples_is_an_error_that_says_so() -> None:
    other = CalibrationSet([sample(950.0, 0, Expert.HIGH_NOISE)], [])
    with pytest.raises(CalibrationError, match="no calibration sample belongs to the low_noise expert"):
        list(quantize_expert(ToyExpert(), other, PAPER, BINS))


def test_round_to_nearest_runs_no_block() -> None:
    model = ToyExpert()
    for block in model.blocks:
        block.forward = None
    assert len(list(quantize_expert(model, CalibrationSet(), Recipe.load("rtn"), TimestepBins()))) == 6


def test_a_clip_search_without_gptq_still_searches() -> None:
    recipe = PAPER.replace(gptq=False, clip_ratios=(0.5, 0.7), exponent_offsets=(0,))
    layers = list(quantize_expert(ToyExpert(), samples(), recipe, BINS))
    chosen = {round(ratio, 4) for layer in layers for ratio in layer.layer.clip_ratio.tolist()}
    assert chosen <= {0.5, 0.7}


def test_first_call_catches_the_arguments_and_stops() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 4))
    x = torch.ones(2, 4)
    args, kwargs = first_call(model[1], lambda: model(x))
    assert torch.equal(args[0], x) and kwargs == {}
    assert not model[1]._forward_pre_hooks
    with pytest.raises(RuntimeError, match="without calling Linear"):
        first_call(model[1], lambda: None)


def test_watching_calls_sees_keyword_arguments_and_the_answer() -> None:
    block = ToyBlock()
    calls = []
    with watching_calls(block, lambda inputs, output: calls.append((inputs, output))):
        output = block(hidden=torch.ones(1, WIDTH), shift=0.5)
    block(hidden=torch.ones(1, WIDTH), shift=0.1)
    assert len(calls) == 1 and calls[0][0]["shift"] == 0.5 and calls[0][1] is output
