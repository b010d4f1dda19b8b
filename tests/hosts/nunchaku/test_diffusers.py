"""An export meets diffusers' own code: config, strict key check, loader, and modules with stubbed
kernels.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.quantizers.quantization_config import NunchakuLiteQuantizationConfig
from safetensors.torch import load_file, save_file

from tempoquant.checkpoint.files import WEIGHTS_NAME
from tempoquant.errors import CheckpointError
from tempoquant.hosts.nunchaku.export import export
from tempoquant.hosts.nunchaku.reader import ExportedComponent
from tests import quantized_wan
from tests.hosts.nunchaku.stub import diffusers_with_stubbed_kernels

COMPONENTS = ("transformer", "transformer_2")


@pytest.fixture(scope="module", params=["int4", "nvfp4"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    quantized_wan.write_pipeline(folder / "quantized", request.param, deflated=False, centred=False)
    return export(folder / "quantized", folder / "out")


@pytest.fixture
def nunchaku(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield from diffusers_with_stubbed_kernels(monkeypatch)


def config_of(component: Path) -> dict:
    return json.loads((component / "config.json").read_text())


def patched_model(component: Path, nunchaku: ModuleType) -> WanTransformer3DModel:
    """Return the model on the meta device with its targets replaced, by diffusers."""
    config = config_of(component)
    checked = NunchakuLiteQuantizationConfig(**config.pop("quantization_config"))
    with init_empty_weights():
        model = WanTransformer3DModel.from_config(config)
    nunchaku.replace_with_nunchaku_linear(model, checked.to_dict(), checked.compute_dtype)
    return model


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_config_is_valid_and_names_every_linear(exported, component):
    config = NunchakuLiteQuantizationConfig(**config_of(exported / component)["quantization_config"])
    assert config.compute_dtype == torch.bfloat16
    assert len(config.svdq_w4a4["targets"]) == len(quantized_wan.BLOCK_LINEARS)
    assert config.svdq_w4a4["rank"] == 16
    assert config.awq_w4a16 is None


@pytest.mark.parametrize("component", COMPONENTS)
def test_keys_shapes_and_dtypes_are_those_of_diffusers_modules(exported, component, nunchaku):
    model = patched_model(exported / component, nunchaku)
    stored = load_file(exported / component / WEIGHTS_NAME)
    # The check also asks for buffers that no checkpoint of this model holds, ours or diffusers'
    # own.
    saved = set(model.state_dict())
    unsaved = {name: buffer for name, buffer in model.named_buffers() if name not in saved}
    nunchaku.check_strict_state_dict_match(model, stored | unsaved)
    for name, wanted in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name in saved:
            assert stored[name].shape == wanted.shape, name
            is_of_target = isinstance(model.get_submodule(name.rpartition(".")[0]), nunchaku.SVDQW4A4Linear)
            assert stored[name].dtype == (wanted.dtype if is_of_target else torch.bfloat16), name


@pytest.mark.parametrize("component", COMPONENTS)
def test_diffusers_loader_takes_every_tensor_as_it_is(exported, component, nunchaku):
    model = WanTransformer3DModel.from_pretrained(exported / component, dtype=torch.bfloat16)
    assert type(model.hf_quantizer).__module__.startswith("diffusers.")
    assert sum(isinstance(m, nunchaku.SVDQW4A4Linear) for m in model.modules()) == len(quantized_wan.BLOCK_LINEARS)
    state, stored = model.state_dict(), load_file(exported / component / WEIGHTS_NAME)
    assert set(state) == set(stored)
    for name, tensor in stored.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name].contiguous().view(torch.uint8), tensor.view(torch.uint8)), name


def test_diffusers_layers_compute_what_ours_do(exported, nunchaku):
    """The operators read the documented layouts. Both round to bfloat16 at the end, so they may
    differ by an ulp.
    """
    theirs = WanTransformer3DModel.from_pretrained(exported / "transformer", dtype=torch.bfloat16)
    ours = ExportedComponent(exported / "transformer").load(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for name in config_of(exported / "transformer")["quantization_config"]["svdq_w4a4"]["targets"]:
        module = theirs.get_submodule(name)
        x = torch.randn(2, 5, module.in_features, generator=generator).to(torch.bfloat16)
        wanted = module(x).float()
        difference = (ours.get_submodule(name)(x).float() - wanted).abs()
        assert bool((difference <= 2**-7 * wanted.abs().max()).all()), name
        assert wanted.abs().max() > 0.1


@torch.no_grad()
def test_diffusers_expert_predicts_what_ours_does(exported, nunchaku):
    theirs = WanTransformer3DModel.from_pretrained(exported / "transformer", dtype=torch.bfloat16)
    ours = ExportedComponent(exported / "transformer").load(torch.bfloat16)
    wanted, found = (quantized_wan.run(model).float() for model in (theirs, ours))
    # A bfloat16 ulp may change a 4-bit code further on; anything misplaced would leave no likeness
    # at all.
    assert float((found - wanted).square().sum() / wanted.square().sum()) < 1e-2


def test_without_the_kernels_plain_diffusers_says_what_it_needs(exported):
    """TempoQuant does not take the place of diffusers' own quantizer."""
    with pytest.raises(ImportError, match="kernels"):
        WanImageToVideoPipeline.from_pretrained(exported, dtype=torch.bfloat16)


@pytest.mark.parametrize("change", ["missing", "unknown", "dtype", "shape"])
def test_a_tensor_that_does_not_belong_is_refused_by_name(exported, tmp_path, change):
    component = tmp_path / "transformer"
    component.mkdir()
    (component / "config.json").write_text((exported / "transformer" / "config.json").read_text())
    tensors = load_file(exported / "transformer" / WEIGHTS_NAME)
    name = "blocks.0.attn1.to_q.smooth_factor"
    if change == "missing":
        del tensors[name]
    elif change == "unknown":
        tensors["blocks.0.attn1.to_q.smooth_factor_orig"] = tensors[name].clone()
    else:
        tensors[name] = tensors[name].float() if change == "dtype" else tensors[name][:64].clone()
    save_file(tensors, component / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn1\.to_q.*smooth_factor"):
        ExportedComponent(component)
