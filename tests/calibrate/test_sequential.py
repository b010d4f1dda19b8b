"""Laws of block-by-block quantization, on a toy denoiser: calibration must not need a Wan."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tempoquant import quantize_linear
from tempoquant.calibrate.capture import watching_calls, watching_inputs
from tempoquant.calibrate.hidden_states import HiddenStates
from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.calibrate.sequential import quantize_denoiser
from tempoquant.errors import CalibrationError, ModelError
from tempoquant.layer import QuantizedLayer
from tempoquant.recipe import LayerRule, Recipe
from tempoquant.timesteps import TimestepBins
from tests.toy_denoiser import WIDTH, ToyBlock, ToyTransformer, sample, samples

PAPER = Recipe.load("paper").replace(rank=2)
BINS = TimestepBins((500.0,))


@pytest.fixture
def quantized(tmp_path: Path) -> Callable[..., dict[str, QuantizedLayer]]:
    """Quantize a toy denoiser with fresh hidden states; return layers by name."""
    counter = itertools.count()

    def run(recipe: Recipe = PAPER, calls: Sequence[CalibrationSample] | None = None,
            model: ToyTransformer | None = None, bins: TimestepBins = BINS,
            ram_bytes: int = 2**30) -> dict[str, QuantizedLayer]:  # fmt: skip
        calls = samples() if calls is None else calls
        states = HiddenStates(tmp_path / str(next(counter)), ram_bytes)
        blocks = quantize_denoiser(model or ToyTransformer(), calls, recipe, bins, states)
        return {named.name: named.layer for block in blocks for named in block.layers}

    return run


Quantized = Callable[..., dict[str, QuantizedLayer]]


def same(one: dict[str, QuantizedLayer], other: dict[str, QuantizedLayer]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].packed, other[name].packed) and torch.equal(one[name].clip_ratio, other[name].clip_ratio)
        for name in one
    )


def test_every_layer_comes_once_in_block_order(quantized: Quantized) -> None:
    assert list(quantized()) == [f"blocks.{i}.{part}" for i in range(3) for part in ("up", "gate", "down")]


def test_a_layer_equals_the_one_quantized_alone_on_the_inputs_it_sees(quantized: Quantized) -> None:
    """The plain way: hooks on the whole model in memory, one layer at a time."""
    model, calls = ToyTransformer(), samples()[::3]  # one call in each bin, so that sums are made in the same order
    seen: dict[str, dict[int, list[torch.Tensor]]] = {}
    for call in calls:
        hidden, shift = call.inputs["hidden"], call.timestep / 1000
        for index, block in enumerate(model.blocks):
            linears = {f"blocks.{index}.{name}": block.get_submodule(name) for name in ("up", "gate", "down")}

            def observe(name: str, x: torch.Tensor, call: CalibrationSample = call) -> None:
                by_bin = seen.setdefault(name, {})
                by_bin.setdefault(BINS.of(call.timestep), []).append(x.detach().reshape(-1, x.shape[-1]).clone())

            with watching_inputs(linears, observe):
                hidden = block(hidden, shift=shift)
    recipe = PAPER.replace(clip_search_tokens_per_bin=10**6)
    for name, layer in quantized(recipe, calls).items():
        _, index, linear = name.split(".")
        module = model.blocks[int(index)].get_submodule(linear)
        inputs = {timestep_bin: torch.cat(parts) for timestep_bin, parts in seen[name].items()}
        alone = quantize_linear(module.weight, module.bias, inputs, recipe)
        assert torch.equal(layer.packed, alone.packed)
        assert torch.equal(layer.clip_ratio, alone.clip_ratio.view(torch.float32))


def test_where_hidden_states_wait_changes_nothing(quantized: Quantized) -> None:
    assert same(quantized(ram_bytes=0), quantized(ram_bytes=2**30))


@pytest.mark.parametrize("ram_bytes", [0, 2**30])
def test_a_run_that_begins_in_the_middle_ends_with_the_same_layers(
    quantized: Quantized, tmp_path: Path, ram_bytes: int
) -> None:
    whole = quantized()
    states = HiddenStates(tmp_path / "resumed", ram_bytes)
    interrupted = quantize_denoiser(ToyTransformer(), samples(), PAPER, BINS, states)
    layers = next(interrupted).layers + next(interrupted).layers
    interrupted.close()
    again = HiddenStates(tmp_path / "resumed", ram_bytes)
    again.keep_only(2)
    rest = quantize_denoiser(ToyTransformer(), samples(), PAPER, BINS, again, first_block=2)
    layers += [named for block in rest for named in block.layers]
    assert same({named.name: named.layer for named in layers}, whole)


def test_a_weight_alone_is_rounded_against_the_inputs_it_sees_as_they_are(quantized: Quantized) -> None:
    model, calls, recipe = ToyTransformer(), samples(), PAPER.replace(modulation_format="int4")
    model.modulating = ["down"]
    layers = quantized(recipe, calls, model)
    alone = [name for name, layer in layers.items() if layer.weights_alone]
    assert alone == [f"blocks.{index}.down" for index in range(3)]
    seen: list[torch.Tensor] = []
    with watching_inputs({"down": model.blocks[0].down}, lambda _, x: seen.append(x.reshape(-1, 2 * WIDTH))):
        for call in calls:
            model.run_block(0, call, [])
    weight, inputs = model.blocks[0].down.weight, torch.cat(seen)
    by_gptq, rounded = (
        torch.linalg.norm(inputs @ (found["blocks.0.down"].dequantize() - weight).T)
        for found in (layers, quantized(recipe.replace(gptq=False), calls, model))
    )
    assert by_gptq < 0.9 * rounded
    assert layers["blocks.0.down"].smoothing_factor is layers["blocks.0.down"].branch is None


@pytest.mark.parametrize("block_inputs", ["16bit", "quantized"])
def test_a_linear_is_let_go_once_it_is_rounded_and_its_block_runs_no_more(tmp_path: Path, block_inputs: str) -> None:
    model, recipe = ToyTransformer(), PAPER.replace(block_inputs=block_inputs)
    next(iter(quantize_denoiser(model, samples(), recipe, BINS, HiddenStates(tmp_path))))
    in_turn = [(0, ()), (0, ("up",)), (0, ("up", "gate"))]
    assert model.let_go_of == (in_turn if block_inputs == "16bit" else [])


def test_hidden_states_that_are_gone_are_an_error(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path / "none")
    with pytest.raises(CalibrationError, match="hidden states before block 2 of low_noise are gone"):
        list(quantize_denoiser(ToyTransformer(), samples(), PAPER, BINS, states, first_block=2))


def test_only_the_boundary_that_is_needed_stays_on_the_disk(tmp_path: Path) -> None:
    for block in quantize_denoiser(ToyTransformer(), samples(), PAPER, BINS, HiddenStates(tmp_path)):
        # Those before the block are needed until its layers are safe; nothing is before the first.
        kept = sorted(folder.name for folder in tmp_path.iterdir()) if tmp_path.is_dir() else []
        assert kept == {0: ["0001"], 1: ["0001", "0002"], 2: ["0002"]}[block.index]


def test_no_hook_is_left_behind(quantized: Quantized) -> None:
    model = ToyTransformer()
    quantized(PAPER.replace(block_inputs="quantized"), model=model)
    for module in model.blocks.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks and "forward" not in vars(module)


def test_hooks_are_gone_after_an_error_too(quantized: Quantized) -> None:
    model, spoiled = ToyTransformer(), samples()
    spoiled[0].inputs["hidden"][0, 3, 4] = torch.nan
    with pytest.raises(CalibrationError, match=r"input of blocks\.0\.up holds NaN"):
        quantized(calls=spoiled, model=model)
    assert not any(module._forward_pre_hooks for module in model.blocks.modules())


def test_a_bad_sample_of_the_other_guidance_branch_is_found_too(quantized: Quantized) -> None:
    spoiled = [*samples(), sample(500.0, 9, "unconditional")]
    spoiled[-1].inputs["hidden"][0, 3, 4] = torch.inf
    with pytest.raises(CalibrationError, match="holds NaN or Inf"):
        quantized(PAPER.replace(statistics_branches="conditional"), spoiled)


def test_a_damaged_weight_is_named(quantized: Quantized) -> None:
    model = ToyTransformer()
    with torch.no_grad():
        model.blocks[2].down.weight[0, 0] = torch.inf
    with pytest.raises(ModelError, match=r"weight of blocks.2.down holds NaN or Inf"):
        quantized(model=model)


def test_layer_rules_and_kept_blocks_leave_layers_in_16_bits(quantized: Quantized) -> None:
    recipe = PAPER.replace(layers=(LayerRule("*.down", "16bit"),), keep_16bit_blocks=(1, 0))
    assert list(quantized(recipe)) == [f"blocks.{i}.{part}" for i in (1, 2) for part in ("up", "gate")]


def test_an_expert_without_samples_is_an_error_that_says_so(quantized: Quantized) -> None:
    with pytest.raises(CalibrationError, match="no calibration sample belongs to low_noise"):
        quantized(calls=[])


def test_a_bin_without_samples_is_an_error_that_says_so(quantized: Quantized) -> None:
    with pytest.raises(CalibrationError, match="timestep bin 0 of 2 of low_noise has no calibration sample"):
        quantized(calls=samples()[2:])


def test_round_to_nearest_runs_no_block(quantized: Quantized) -> None:
    model = ToyTransformer()
    for block in model.blocks:
        block.forward = None
    assert len(quantized(Recipe.load("rtn"), [], model, TimestepBins())) == 9


def test_a_clip_search_without_gptq_still_searches(quantized: Quantized) -> None:
    recipe = PAPER.replace(gptq=False, clip_ratios=(0.5, 0.7), exponent_offsets=(0,))
    chosen = {round(ratio, 4) for layer in quantized(recipe).values() for ratio in layer.clip_ratio.tolist()}
    assert chosen <= {0.5, 0.7}


def test_statistics_of_the_conditional_branch_alone_do_not_see_the_other(quantized: Quantized) -> None:
    both = [*samples(), sample(450.0, 7, "unconditional")]
    recipe = PAPER.replace(clip_ratios=(), statistics_branches="both")
    conditional = quantized(recipe.replace(statistics_branches="conditional"), both)
    assert same(conditional, quantized(recipe, samples()))
    assert not same(conditional, quantized(recipe, both))


def test_linears_that_share_smoothing_share_everything_their_input_decides(quantized: Quantized) -> None:
    apart, shared = quantized(), quantized(PAPER.replace(share_smoothing=True))
    for i in range(3):
        up, gate = shared[f"blocks.{i}.up"], shared[f"blocks.{i}.gate"]
        assert torch.equal(up.smoothing_factor, gate.smoothing_factor)
        assert torch.equal(up.clip_ratio, gate.clip_ratio)
        alone = apart[f"blocks.{i}.up"].smoothing_factor, apart[f"blocks.{i}.gate"].smoothing_factor
        assert not torch.equal(*alone)
        weights = [getattr(ToyTransformer().blocks[i], name).weight.abs().amax(0) for name in ("up", "gate")]
        stacked = torch.where(weights[0] > weights[1], *alone)  # a larger weight means a smaller factor: amax decides
        assert torch.equal(up.smoothing_factor, stacked)


def test_layers_of_different_formats_do_not_share(quantized: Quantized) -> None:
    recipe = PAPER.replace(share_smoothing=True, layers=(LayerRule("*.gate", "int4"),))
    layers = quantized(recipe)
    assert not torch.equal(layers["blocks.0.up"].smoothing_factor, layers["blocks.0.gate"].smoothing_factor)


def test_quantized_block_inputs_change_all_blocks_but_the_first(quantized: Quantized) -> None:
    one, other = quantized(), quantized(PAPER.replace(block_inputs="quantized"))
    differ = [name for name in one if not torch.equal(one[name].packed, other[name].packed)]
    assert differ and all(not name.startswith("blocks.0.") for name in differ)


@pytest.mark.parametrize(
    ("changes", "units"),
    [
        ({}, 3 * (2 * 4 + 3)),
        ({"block_inputs": "quantized"}, 3 * (2 * 4 + 3) + 2 * 4),
        ({"layers": (LayerRule("*.down", "16bit"),)}, 3 * (2 * 4 + 2)),
        ({"keep_16bit_blocks": (1, 1)}, (2 * 4) + (2 * 4 + 3)),
    ],
)
def test_progress_counts_what_is_done(tmp_path: Path, changes: dict[str, object], units: int) -> None:
    counted: list[int] = []

    class Counting:
        def start(self, description: str, total: int, done: int = 0) -> Callable[[], None]:
            counted.extend([total, 0])
            return lambda: counted.__setitem__(1, counted[1] + 1)

    recipe = PAPER.replace(**changes)
    list(quantize_denoiser(ToyTransformer(), samples(), recipe, BINS, HiddenStates(tmp_path), progress=Counting()))
    assert counted == [units, units]


def test_watching_calls_sees_keyword_arguments_and_the_answer() -> None:
    block = ToyBlock()
    calls = []
    with watching_calls(block, lambda inputs, output: calls.append((inputs, output))):
        output = block(hidden=torch.ones(1, WIDTH), shift=0.5)
    block(hidden=torch.ones(1, WIDTH), shift=0.1)
    assert len(calls) == 1 and calls[0][0]["shift"] == 0.5 and calls[0][1] is output
