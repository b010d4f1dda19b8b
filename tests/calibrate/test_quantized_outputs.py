"""Block by block through quantized blocks: the next one sees what the runtime will compute."""

from pathlib import Path

import pytest
import torch

from tempoquant.calibrate.hidden_states import HiddenStates
from tempoquant.calibrate.linear_calibration import InputCalibration
from tempoquant.calibrate.named_layer import NamedLayer
from tempoquant.calibrate.sequential import quantize_denoiser
from tempoquant.calibrate.stopwatch import Stopwatch
from tempoquant.recipe import Recipe
from tempoquant.runtime.bin_clock import BinClock
from tempoquant.runtime.linear import QuantizedLinear
from tests.calibrate.test_sequential import BINS, ToyTransformer, samples
from tests.random_layers import by_bin

RECIPE = Recipe.load("default").replace(rank=2, block_inputs="quantized")


@pytest.mark.parametrize("has_bins", [False, True], ids=["plain layers", "layers with tensors by bin"])
def test_the_next_block_sees_what_the_runtime_computes_in_each_samples_bin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_bins: bool
) -> None:
    finish = InputCalibration.finish

    def finish_by_bin(self: InputCalibration, watch: Stopwatch | None = None) -> list[NamedLayer]:
        return [named._replace(layer=by_bin(named.layer)) for named in finish(self, watch)]

    if has_bins:
        monkeypatch.setattr(InputCalibration, "finish", finish_by_bin)
    states, clock, block = HiddenStates(tmp_path, 2**30), BinClock(BINS), ToyTransformer().blocks[0]
    for named in next(quantize_denoiser(ToyTransformer(), samples(), RECIPE, BINS, states)).layers:
        block.set_submodule(named.name.rpartition(".")[2], QuantizedLinear.from_layer(named.layer, clock))
    for number, sample in enumerate(samples()):
        with clock.at(sample.timestep), torch.no_grad():
            wanted = block(sample.inputs["hidden"], shift=sample.timestep / 1000)
        torch.testing.assert_close(states.read(1, number), [wanted], rtol=1e-5, atol=1e-5)
