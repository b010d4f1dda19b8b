"""Training where a layer has tensors by timestep bin: each row of a batch has the gradient of its
own bin.
"""

import copy
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import nn
from torch.nn import functional

from tempoquant.calibrate.linear_calibration import InputCalibration
from tempoquant.calibrate.phases import phases_of
from tempoquant.layer import QuantizedLayer
from tempoquant.recipe import Recipe
from tempoquant.runtime import install_layers
from tempoquant.tiny import weights_folder
from tests.quantized_wan import BINS, inputs

RECIPE = Recipe("by bin", rank=4, deflation=True, deflation_by_bin=True, centring=True, centring_by_bin=True)
TIMESTEPS = (990.0, 700.0)  # bins 2 and 0


def quantized(name: str, linear: nn.Linear) -> QuantizedLayer:
    """Return a layer whose bins differ: the input of each has another mean and other directions."""
    generator = torch.Generator().manual_seed(0)
    calibration = InputCalibration({name: linear}, RECIPE.default_format, RECIPE, BINS, [1] * BINS.num_bins)
    parts = []
    for _ in range(BINS.num_bins):
        loud = 1 + 2 * torch.rand(linear.in_features, generator=generator)
        parts.append(torch.randn(400, linear.in_features, generator=generator) * loud
                     + 0.5 * torch.randn(linear.in_features, generator=generator))  # fmt: skip
    for phase in phases_of(RECIPE):
        for timestep_bin, part in enumerate(parts):
            calibration.observe(phase, part, timestep_bin)
        calibration.end_phase(phase)
    (named,) = calibration.finish()
    return named.layer


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """Return the bundled denoiser in 16 bits and in four, LoRAs on both."""
    sixteen = WanTransformer3DModel.from_pretrained(weights_folder() / "transformer")
    four = copy.deepcopy(sixteen)
    linears = {f"blocks.{name}": each for name, each in four.blocks.named_modules() if isinstance(each, nn.Linear)}
    layers = {name: quantized(name, linear) for name, linear in linears.items()}
    assert all(layer.branch is not None and layer.branch.up.dim() == 3 for layer in layers.values())
    install_layers(four, layers, BINS, torch.float32)
    for model in (sixteen, four):
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
        model.train()
    return sixteen, four


def gradient(model: Any, rows: list[int]) -> torch.Tensor:
    """Compute the gradient of all LoRA weights, for some rows of the batch, of a loss that is
    summed over them.
    """
    call = inputs(batch=2, timestep=torch.tensor(TIMESTEPS), dtype=torch.float32)
    call["encoder_hidden_states"] = torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    call = {key: value if key == "return_dict" else value[rows] for key, value in call.items()}
    model(**call)[0].pow(2).sum().backward()
    return torch.cat([parameter.grad.flatten() for name, parameter in model.named_parameters() if "lora" in name])


def test_a_batch_of_two_bins_trains_as_well_as_each_of_its_rows_alone(models: tuple[Any, Any]) -> None:
    found: list[torch.Tensor] = []
    for rows in ([0], [1], [0, 1]):
        wanted, four = (gradient(model, rows) for model in models)
        assert functional.cosine_similarity(wanted, four, 0) > 0.95 and 0.9 < four.norm() / wanted.norm() < 1.1, rows
        found.append(four)
    torch.testing.assert_close(found[2], found[0] + found[1], rtol=1e-4, atol=1e-5 * float(found[2].abs().max()))
