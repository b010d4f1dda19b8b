import json
import shutil
from pathlib import Path

import pytest

from tempoquant.checkpoint import iter_layers
from tempoquant.errors import CheckpointError
from tempoquant.formats import FORMATS
from tempoquant.hosts.contents import (
    calibration_prompts_of,
    configs_of,
    contents_of,
    num_weight_bytes,
    quantized_components,
)
from tests import quantized_wan
from tests.evaluate.quantized_folder import BINS, COMPONENTS, write_quantized_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quantized_folder(tmp_path_factory.mktemp("quantized"))


def test_experts_are_found_by_what_their_configs_say_and_not_by_their_folders_names(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder / "transformer", copy / "low")
    shutil.copytree(folder / "transformer_2", copy / "zzz")
    (copy / "vae").mkdir()
    (copy / "vae" / "config.json").write_text("{}")
    assert list(quantized_components(copy).items()) == [
        ("high_noise", copy / "low"),
        ("low_noise", copy / "zzz"),
    ]


def test_bits_per_weight_are_those_of_the_layers_that_are_stored(folder):
    contents = contents_of(folder)
    layers = [layer for component in COMPONENTS.values() for _, layer in iter_layers(folder / component)]
    num_weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert contents.bits_per_weight == pytest.approx(8 * sum(layer.num_bytes for layer in layers) / num_weights)
    one = dict(iter_layers(folder / "transformer"))
    num_weights = sum(layer.in_features * layer.out_features for layer in one.values())
    bits = 8 * sum(layer.num_bytes for layer in one.values()) / num_weights
    assert contents.denoisers[0].bits_per_weight == pytest.approx(bits)


def test_clip_ratios_are_summed_up_per_bin(folder):
    for denoiser in contents_of(folder).denoisers:
        layers = [layer for _, layer in iter_layers(folder / denoiser.component)]
        assert [(b.lowest_timestep, b.highest_timestep) for b in denoiser.bins] == list(
            zip((0.0, *BINS[denoiser.denoiser].edges), (*BINS[denoiser.denoiser].edges, 1000.0), strict=True)
        )
        for index, each in enumerate(denoiser.bins):
            ratios = sorted(float(layer.clip_ratio[index]) for layer in layers)
            assert (each.clip_ratio_min, each.clip_ratio_max) == (ratios[0], ratios[-1])
            assert ratios[0] <= each.clip_ratio_median <= ratios[-1]


def test_layers_are_counted(folder):
    high, low = contents_of(folder).denoisers
    assert (high.denoiser, low.denoiser) == ("high_noise", "low_noise")
    assert (high.num_layers, high.num_16bit_linears) == (19, 1)
    assert sum(high.formats.values()) == sum(high.ranks.values()) == 19
    assert set(high.formats) == set(FORMATS)
    assert (high.notes, low.notes) == ((), ("a note",))


def test_sizes_are_those_on_disk(folder):
    files = [file for component in COMPONENTS.values() for file in (folder / component).glob("*.safetensors")]
    assert contents_of(folder).num_bytes == sum(file.stat().st_size for file in files)
    assert num_weight_bytes(folder / "transformer") == files[0].stat().st_size


def test_the_prompts_of_the_calibration_are_found(folder):
    assert calibration_prompts_of(folder) == [quantized_wan.PROMPT] * 2
    assert contents_of(folder).calibration_prompt_ids == (quantized_wan.PROMPT["id"],)


def test_a_pipeline_without_a_quantized_expert_is_told_apart(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    assert configs_of(tmp_path) == {}
    with pytest.raises(CheckpointError, match="holds no quantized denoiser"):
        contents_of(tmp_path)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        contents_of(tmp_path / "missing")


def test_two_components_of_one_expert_are_an_error(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.copytree(copy / "transformer", copy / "transformer_3")
    with pytest.raises(CheckpointError, match="both claim"):
        contents_of(copy)


def test_a_damaged_config_is_an_error(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = copy / "transformer" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["format_version"] = 99
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="upgrade tempoquant"):
        contents_of(copy)
