"""Single model files of other projects: each is the same model as its diffusers folder, or refused
by its kind.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tempoquant.errors import ModelError
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.models.fingerprint import fingerprint, outline
from tempoquant.models.pipeline_configs import read_configs
from tempoquant.models.source import SourceModel
from tempoquant.models.weights import DenoiserWeights
from tempoquant.models.with_experts import WithExperts
from tests.hub import Hub
from tests.models.conftest import KINDS
from tests.wan_files import as_bytes, is_scaled, state_of, wan_name, write_fp8, write_single
from tests.wan_pipelines import PIPELINES

Tensors = dict[str, torch.Tensor]
NAMES = {"transformer": "high_noise", "transformer_2": "low_noise"}


def denoisers_of(folder: Path) -> dict[str, str]:
    """Return components by their denoisers' names."""
    source = SourceModel.open(folder)
    return {each.name: each.component for each in source.denoisers}


def read_all(source: SourceModel, name: str, dtype: torch.dtype = torch.float32) -> Tensors:
    weights = DenoiserWeights(source, name, dtype, "cpu")
    return dict(weights.stored(lambda _: True))


def without_weights(folder: Path) -> Path:
    """Return a base whose denoisers were not fetched."""
    for file in folder.glob("transformer*/*.safetensors*"):
        file.unlink()
    return folder


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("kind", KINDS)
def test_single_files_are_the_same_model(kind: str, prefix: str, folders: dict[str, Path], tmp_path: Path) -> None:
    states = {name: state_of(folders[kind], component) for name, component in denoisers_of(folders[kind]).items()}
    denoisers = {name: write_single(tmp_path / f"{name}.safetensors", state, prefix) for name, state in states.items()}
    base = without_weights(Path(shutil.copytree(folders[kind], tmp_path / "base")))
    source, own = SourceModel.open(WithExperts(base, denoisers)), SourceModel.open(folders[kind])
    for name, state in states.items():
        found = read_all(source, name)
        assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
        assert source.linears(name) == own.linears(name) and source.blocks(name) == own.blocks(name)
        assert source.component_of(name).notes == (f"the weights are those of {name}.safetensors",)
        assert not source.component_of(name).has_8_bits
    assert source.weight_bytes == sum(file.stat().st_size for file in denoisers.values())
    ours, theirs = load_pipeline(source, "cpu", torch.float32), load_pipeline(own, "cpu", torch.float32)
    for component in own.denoiser_components:
        wanted, loaded = getattr(theirs, component).state_dict(), getattr(ours, component).state_dict()
        assert all(torch.equal(loaded[key], wanted[key]) and loaded[key].dtype == wanted[key].dtype for key in wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_keeps_its_dtype(dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in state_of(folder).items()}
    file = write_single(tmp_path / "high.safetensors", state)
    source = SourceModel.open(WithExperts(folder, {"high_noise": file}))
    found = read_all(source, "high_noise")
    assert all(torch.equal(found[name], state[name]) and found[name].dtype == dtype for name in state)
    own = state_of(folder, "transformer_2")  # which the base has
    assert all(torch.equal(tensor, own[name]) for name, tensor in read_all(source, "low_noise").items())


@pytest.mark.parametrize("scales", ["scale_weight", "weight_scale", None])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_weights_are_multiplied_by_their_scales(
    scales: str | None, dtype: torch.dtype, folder: Path, tmp_path: Path
) -> None:
    state = state_of(folder)
    file = write_fp8(tmp_path / "high.safetensors", state, scales, dtype)
    stored = load_file(file)
    source = SourceModel.open(WithExperts(folder, {"high_noise": file}))
    found = read_all(source, "high_noise")
    assert found.keys() == state.keys()
    for name, tensor in found.items():
        wanted = stored[wan_name(name)].float()
        if scales is not None and is_scaled(name, tensor):
            wanted = wanted * stored[wan_name(name).replace(".weight", f".{scales}")]
        assert torch.equal(tensor.float(), wanted)
        assert source.forms("high_noise")[name][1] == (tensor.dtype, tuple(tensor.shape))
        torch.testing.assert_close(tensor.float(), state[name], rtol=0.15, atol=2e-3 if scales else 2e-2)
    count = sum(is_scaled(name, tensor) for name, tensor in state.items())
    words = f"from 8-bit weights: {count} tensors were float8, {count if scales else 0} of them with scales"
    assert source.component_of("high_noise").notes[1:] == (words,) and count > 20
    assert source.bits_per_weight == 12 and SourceModel.open(folder).bits_per_weight == 16
    loaded = load_pipeline(source, "cpu", torch.float32).transformer.state_dict()
    assert all(torch.equal(loaded[name].float(), found[name].float()) for name in found)


def test_a_scale_for_each_row_multiplies_its_row(folder: Path, tmp_path: Path) -> None:
    name = "blocks.0.ffn.net.0.proj.weight"
    file = write_fp8(tmp_path / "high.safetensors", state_of(folder))
    stored = load_file(file)
    rows = torch.arange(1.0, 257.0)
    for shape in ((256,), (256, 1)):
        save_file({**stored, "blocks.0.ffn.0.scale_weight": rows.reshape(shape)}, file)
        source = SourceModel.open(WithExperts(folder, {"high_noise": file}))
        found = source.component_of("high_noise").tensors[name].read()
        assert torch.equal(found, stored["blocks.0.ffn.0.weight"].float() * rows[:, None])


def test_a_folder_of_shards_is_an_expert(folder: Path, tmp_path: Path) -> None:
    state = state_of(folder)
    names = sorted(state)
    release = tmp_path / "release" / "high_noise_model"
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, half in shards.items():
        write_single(release / file, {name: state[name] for name in half})
    places = {wan_name(name): file for file, half in shards.items() for name in half}
    index = release / "diffusion_pytorch_model.safetensors.index.json"
    for indexed in (True, False):
        index.write_text(json.dumps({"metadata": {}, "weight_map": places})) if indexed else index.unlink()
        source = SourceModel.open(WithExperts(folder, {"high_noise": release}))
        assert all(torch.equal(tensor, state[name]) for name, tensor in read_all(source, "high_noise").items())
    (release / next(iter(shards))).unlink()
    with pytest.raises(ModelError, match=r"high_noise_model.* lacks \d+ weight\(s\), such as"):
        SourceModel.open(WithExperts(folder, {"high_noise": release}))
    shutil.copyfile(release / list(shards)[1], release / "other.safetensors")
    with pytest.raises(ModelError, match=r"high_noise_model holds 2 models .*give a file"):
        SourceModel.open(WithExperts(folder, {"high_noise": release}))


def test_what_tells_a_model_from_another_are_the_files_that_are_read(folder: Path, tmp_path: Path) -> None:
    state = state_of(folder)
    file = write_single(tmp_path / "high.safetensors", state)
    source = SourceModel.open(WithExperts(folder, {"high_noise": file}))
    prints = [fingerprint(source)]
    without = without_weights(Path(shutil.copytree(folder, tmp_path / "base")))
    shutil.copytree(folder / "transformer_2", without / "transformer_2", dirs_exist_ok=True)
    assert fingerprint(SourceModel.open(WithExperts(without, {"high_noise": file}))) == prints[0]
    assert outline(SourceModel.open(WithExperts(without, {"high_noise": file}))) == outline(source)
    prints.append(fingerprint(SourceModel.open(folder)))
    write_single(file, {**state, "proj_out.bias": state["proj_out.bias"] + 1})
    prints.append(fingerprint(SourceModel.open(WithExperts(folder, {"high_noise": file}))))
    assert len({*prints}) == 3
    assert source.places == (folder, file)


def test_a_link_to_a_file_on_another_disk_is_that_file(folder: Path, tmp_path: Path) -> None:
    file = write_single(tmp_path / "disk" / "high.safetensors", state_of(folder))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "link.safetensors").symlink_to(file)
    source = SourceModel.open(WithExperts(folder, {"high_noise": tmp_path / "models" / "link.safetensors"}))
    assert read_all(source, "high_noise").keys() == state_of(folder).keys()


def test_a_file_of_the_other_experts_name_is_questioned(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [write_single(tmp_path / f"wan2.2_{n}-noise_14B.safetensors", state_of(folder)) for n in ("low", "high")]
    SourceModel.open(WithExperts(folder, {"low_noise": files[0], "high_noise": files[1]}))
    assert caplog.text == ""
    SourceModel.open(WithExperts(folder, {"high_noise": files[0]}))
    assert "low-noise_14B.safetensors is given as high_noise, and its name says low_noise: is that" in caplog.text


def swap_names(component: Path) -> None:
    """Rename a component's tensors to the original release's."""
    for file in component.glob("*.safetensors"):
        save_file({wan_name(name): tensor for name, tensor in load_file(file).items()}, file)


def test_original_names_in_a_diffusers_folder_are_read(folder: Path, folders: dict[str, Path]) -> None:
    swap_names(folder / "transformer")
    source, own = SourceModel.open(folder), SourceModel.open(folders["wan22_t2v"])
    found, wanted = read_all(source, "high_noise"), read_all(own, "high_noise")
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    loaded = load_pipeline(source, "cpu", torch.float32).transformer.state_dict()
    assert all(torch.equal(loaded[key], wanted[key]) for key in wanted)
    assert read_configs(str(folder)).denoiser("high_noise").config["num_layers"] == 2


def rename_to_variant(component: Path, variant: str) -> None:
    for file in component.glob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", f".{variant}.safetensors")))


@pytest.mark.parametrize("sharded", [False, True])
def test_variants_are_read_where_no_plain_files_are(sharded: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    size = {"max_shard_size": "100KB"} if sharded else {}
    pipeline = PIPELINES["wan22_t2v"]()
    folder = tmp_path / "model"
    pipeline.save_pretrained(folder, variant="fp16", **size)
    pipeline.vae.save_pretrained(folder / "vae", variant="bf16")
    names = sorted(file.name for file in (folder / "text_encoder").iterdir())
    assert not list(folder.glob("*/model.safetensors")) and any("fp16" in name for name in names)
    source, own = SourceModel.open(folder), SourceModel.open(folders["wan22_t2v"])
    assert source.components["vae"].variant == "bf16" and source.components["text_encoder"].variant == "fp16"
    found, wanted = load_pipeline(source, "cpu", torch.float32), load_pipeline(own, "cpu", torch.float32)
    for name in ("transformer", "transformer_2", "text_encoder", "vae"):
        state = getattr(wanted, name).state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in getattr(found, name).state_dict().items())
    assert read_all(source, "low_noise").keys() == read_all(own, "low_noise").keys()


def test_a_layer_of_float8_that_says_so_is_read(folder: Path, tmp_path: Path) -> None:
    file = write_fp8(tmp_path / "high.safetensors", state_of(folder), "weight_scale")
    format = as_bytes({"format": "float8_e4m3fn", "full_precision_matrix_mult": True})
    save_file({**load_file(file), "blocks.0.ffn.0.comfy_quant": format}, file)
    assert SourceModel.open(WithExperts(folder, {"high_noise": file})).component_of("high_noise").has_8_bits


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> Hub:
    hub = Hub(folder, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    return hub


def test_of_a_base_on_the_hub_only_what_is_needed_is_fetched(hub: Hub, folder: Path, tmp_path: Path) -> None:
    states = {name: state_of(folder, component) for component, name in NAMES.items()}
    files = {name: write_single(tmp_path / f"{name}.safetensors", state) for name, state in states.items()}
    source = SourceModel.open(WithExperts("someone/some-model", files))
    assert (
        source.hub_id == "someone/some-model" and read_all(source, "high_noise").keys() == states["high_noise"].keys()
    )
    assert [name for name in hub.fetched if name.endswith(".safetensors")] == [
        "model.safetensors", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    SourceModel.open(WithExperts("someone/some-model", {"low_noise": files["low_noise"]}))
    assert (hub.cache / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    assert not (hub.cache / "transformer_2" / "diffusion_pytorch_model.safetensors").is_file()


def test_a_file_that_does_not_fit_is_refused_before_anything_large_is_fetched(hub: Hub, tmp_path: Path) -> None:
    file = write_single(tmp_path / "high.safetensors", {"proj_out.bias": torch.ones(64)})
    with pytest.raises(ModelError, match=r"high\.safetensors lacks"):
        SourceModel.open(WithExperts("someone/some-model", {"high_noise": file}))
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


@pytest.mark.parametrize(
    ("hub_id", "words"),
    [
        (
            "Wan-AI/Wan2.2-I2V-A14B",
            r"Wan2.2-I2V-A14B is the original release, .* Wan-AI/Wan2.2-I2V-A14B-Diffusers\.",
        ),
        ("Wan-AI/Wan2.1-VACE-14B", r": give Wan-AI/Wan2.1-VACE-14B-diffusers\."),
        ("someone/repackaged", r"someone/repackaged is not a complete diffusers pipeline.*with --base and --expert"),
    ],
)
def test_a_repository_that_is_no_pipeline_is_named_before_anything_large_is_fetched(
    hub: Hub, hub_id: str, words: str
) -> None:
    (hub.repository / "model_index.json").unlink()
    with pytest.raises(ModelError, match=words):
        SourceModel.open(hub_id)
    assert not any(name.endswith(".safetensors") for name in hub.fetched)
