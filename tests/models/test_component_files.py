"""A missing, truncated or misshapen file is named before any weight is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tempoquant
from tempoquant.errors import CheckpointError, ModelError
from tempoquant.models.pipeline_configs import read_configs
from tempoquant.models.source import SourceModel
from tempoquant.tiny import weights_folder
from tests.cli.typed import assert_refused, run
from tests.hub import Hub

TEXT = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
DENOISER = "transformer_2/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the bundled pipeline that a test may damage."""
    return Path(shutil.copytree(weights_folder(), tmp_path / "model"))


def shard(file: Path) -> dict[str, str]:
    """Split a weight file in two, as the hub does with large ones; return the index's
    weight_map.
    """
    tensors = load_file(file)
    stem, names = file.name.removesuffix(".safetensors"), sorted(tensors)
    halves = {f"{stem}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for name, half in halves.items():
        save_file({key: tensors[key] for key in half}, file.parent / name)
    places = {key: name for name, half in halves.items() for key in half}
    write_index(file, places)
    file.unlink()
    return places


def write_index(file: Path, places: object) -> None:
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def change(file: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Write a weight file anew with other tensors."""
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def cut(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])


def second_shard(file: Path) -> Path:
    shard(file)
    return file.with_name(file.name.replace(".safetensors", "-00002-of-00002.safetensors"))


def move_a_tensor(file: Path) -> None:
    places = shard(file)
    first, second = sorted(places)[:2]  # they lie in different shards
    write_index(file, {**places, first: places[second]})


def set_value(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def write_pieces(file: Path, content: bytes) -> None:
    """Write the vocabulary that T5's tokenizer has beside its tokenizer.json."""
    set_value(file.parents[1] / "model_index.json", tokenizer=["transformers", "T5TokenizerFast"])
    file.write_bytes(content)


def dangle(file: Path) -> None:
    file.unlink()
    file.symlink_to("../../blobs/pruned")


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    (TEXT, Path.unlink, "text_encoder has no weights, neither model.safetensors nor"),
    (VAE, Path.unlink, "vae has no weights, neither diffusion_pytorch_model.safetensors nor"),
    (DENOISER, Path.unlink, "transformer_2 has no weights"),
    (TEXT, lambda file: second_shard(file).unlink(), "model-00002-of-00002.safetensors is missing, which .*index.json"),
    (VAE, lambda file: second_shard(file).unlink(), "model-00002-of-00002.safetensors is missing"),
    (TEXT, lambda file: cut(second_shard(file), 5000), "model-00002-of-00002.safetensors is not a whole"),
    (DENOISER, lambda file: cut(file, -1), "transformer_2/.*safetensors is not a whole safetensors file"),
    (VAE, lambda file: cut(file, 0), "vae/.*safetensors is not a whole safetensors file"),
    (VAE, dangle, r"vae/.*safetensors is a link to \.\./\.\./blobs/pruned, which is not there"),
    ("tokenizer/tokenizer.json", dangle, "tokenizer/tokenizer.json is a link to"),
    ("sampling.json", dangle, "sampling.json is a link to"),
    (TEXT, move_a_tensor, r"index.json says that model-0000\d-of-00002.safetensors holds .*, which it does not"),
    (VAE, lambda file: write_index(file, {}), "has no weight_map"),
    (VAE, lambda file: write_index(file, {"x": "../vae/x.safetensors"}), "not the name of a safetensors file beside"),
    (TEXT, lambda file: change(file, lambda t: t.pop("shared.weight")), "text_encoder lacks 2 weight.*fetch"),
    (VAE, lambda file: change(file, lambda t: t.pop("decoder.conv_in.bias")), "lacks 1 .* decoder.conv_in.bias"),
    (DENOISER, lambda file: change(file, lambda t: t.update({"proj_out.bias": torch.ones(3)})),
     r"proj_out.bias in .*transformer_2 is \[3\], but \[64\] in the model"),
    ("vae/config.json", Path.unlink, "vae/config.json is missing"),
    ("text_encoder/config.json", lambda file: cut(file, 40), "text_encoder/config.json is not readable JSON"),
    ("vae/config.json", lambda file: file.write_text('{"z_dim": "many"}'), "does not describe a AutoencoderKLWan"),
    ("scheduler/scheduler_config.json", Path.unlink, "scheduler_config.json is missing"),
    ("tokenizer/tokenizer.json", Path.unlink, "tokenizer holds none of .*tokenizer.json"),
    ("tokenizer/tokenizer.json", lambda file: cut(file, 0), "tokenizer/tokenizer.json is empty"),
    ("tokenizer/tokenizer.json", lambda file: cut(file, -9), "tokenizer/tokenizer.json is not a tokenizer"),
    ("tokenizer/tokenizer.json", lambda file: file.write_text("{}"), "tokenizer/tokenizer.json is not a tokenizer"),
    ("tokenizer/spiece.model", lambda file: write_pieces(file, b""), "tokenizer/spiece.model is empty"),
    ("tokenizer/spiece.model", lambda file: write_pieces(file, b"version https://git-lfs.github.com"), "Git LFS"),
    ("tokenizer/tokenizer_config.json", lambda file: cut(file, 7), "tokenizer_config.json is not readable JSON"),
    ("tokenizer/special_tokens_map.json", lambda file: file.write_text(""), "special_tokens_map.json is not readable"),
    ("scheduler/scheduler_config.json", lambda file: cut(file, -3), "scheduler_config.json is not readable JSON"),
    ("scheduler/scheduler_config.json", lambda file: file.write_text('{"num_train_timesteps": "many"}'),
     "scheduler_config.json does not describe a UniPC"),
    ("vae/config.json", lambda file: set_value(file, latents_mean=[0.0] * 3), "vae/config.json .* latents_mean has 3 "),
    ("vae/config.json", lambda file: set_value(file, latents_std=[1.0] * 17), "vae/config.json .* latents_std has 17 "),
    ("vae/config.json", lambda file: set_value(file, latents_std=[0.0] * 16), "latents_std holds something other"),
    ("vae/config.json", lambda file: set_value(file, latents_mean=0.0), "latents_mean has no list"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGE)
def test_what_is_missing_or_damaged_is_named_with_its_remedy(folder, name, damage, words):
    damage(folder / name)
    with pytest.raises(ModelError, match=words):
        SourceModel.open(folder)


def test_shards_are_as_good_as_one_file_and_tied_weights_are_stored_once(folder):
    for name in (TEXT, VAE, DENOISER):
        shard(folder / name)
    assert "encoder.embed_tokens.weight" not in load_file(weights_folder() / TEXT)
    SourceModel.open(folder)


def test_transformers_takes_a_single_file_before_an_index_and_diffusers_does_not(folder):
    write_index(folder / TEXT, {"x": "gone.safetensors"})
    SourceModel.open(folder)
    write_index(folder / VAE, {"x": "gone.safetensors"})
    with pytest.raises(ModelError, match=r"gone\.safetensors is missing"):
        SourceModel.open(folder)


def test_a_class_that_no_library_has_is_named(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", "AutoencoderKLUnheardOf"]}))
    with pytest.raises(ModelError, match="vae is a AutoencoderKLUnheardOf, which the diffusers installed here"):
        SourceModel.open(folder)


def test_every_command_refuses_a_half_fetched_source_and_writes_nothing(folder, tmp_path):
    (folder / VAE).unlink()
    (tmp_path / "set.jsonl").write_text("")
    for command in (
        ["quantize", folder, "-o", tmp_path / "out", "--recipe", "rtn"],
        ["quantize", folder, "--dry-run", "--recipe", "rtn"],
        ["record", folder, "-o", tmp_path / "store"],
        ["plan", folder],
    ):
        assert_refused(run(*command), 1, "vae has no weights")
    assert sorted(tmp_path.iterdir()) == [folder, tmp_path / "set.jsonl"]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tempoquant.quantize("tiny", tmp_path_factory.mktemp("quantized") / "out", "rtn")


SHOWN_DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    (VAE, Path.unlink, "is missing"),
    ("tokenizer/tokenizer.json", Path.unlink, "is missing"),
    ("tokenizer/tokenizer.json", lambda file: cut(file, 0), "tokenizer.json is empty"),
    (VAE, lambda file: change(file, lambda t: t.update({"decoder.conv_in.bias": torch.ones(3)})),
     "decoder.conv_in.bias"),
    ("transformer", lambda folder: cut(next(folder.glob("*.safetensors")), -1), "not a whole"),
    ("transformer", lambda folder: change_one(folder, ".packed", lambda t: t[:, :1]), ".packed"),
    ("transformer_2", lambda folder: change_one(folder, "proj_out.bias", lambda t: t[:3]), "proj_out.bias"),
    ("transformer_2", lambda folder: change_one(folder, "proj_out.bias", lambda t: None), "proj_out.bias"),
    ("model_index.json", lambda file: rename_component(file, "../elsewhere"), "could lie outside"),
    ("model_index.json", lambda file: rename_component(file, "/etc"), "could lie outside"),
]  # fmt: skip


def change_one(folder: Path, suffix: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Change a tensor of a component, without its values, in file and index."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith(suffix)][:1]:
            changed = edit(tensors.pop(name))
            save_file(tensors if changed is None else {**tensors, name: changed.contiguous()}, file)
            if changed is None:
                index = next(folder.glob("*.index.json"))
                record = json.loads(index.read_text())
                del record["weight_map"][name]
                index.write_text(json.dumps(record))
            return
    raise AssertionError(f"{folder} holds no {suffix}")


def rename_component(index: Path, name: str) -> None:
    record = json.loads(index.read_text())
    record[name] = record.pop("vae")
    index.write_text(json.dumps(record))


@pytest.mark.parametrize(("name", "damage", "words"), SHOWN_DAMAGE)
def test_inspect_tells_what_headers_tell_without_being_asked_to_verify(quantized, tmp_path, name, damage, words):
    copy = Path(shutil.copytree(quantized, tmp_path / "copy"))
    assert run("inspect", copy).exit_code == 0
    damage(copy / name)
    assert_refused(run("inspect", copy), 1, words)
    (copy / "tempoquant.json").unlink()  # whose hashes would tell anyway
    assert_refused(run("inspect", copy, "--verify"), 1, words if words != "is missing" else "")


def test_damage_of_a_quantized_expert_is_a_checkpoint_error(quantized, tmp_path):
    copy = Path(shutil.copytree(quantized, tmp_path / "copy"))
    change_one(copy / "transformer", "proj_out.bias", lambda tensor: tensor[:3])
    with pytest.raises(CheckpointError, match=r"proj_out\.bias"):
        SourceModel.open(copy)


@pytest.fixture
def hub(monkeypatch, folder, tmp_path) -> Hub:
    hub = Hub(folder, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    return hub


def test_small_files_come_from_the_hub_before_large_ones(hub):
    SourceModel.open("someone/some-model")
    large = [name.endswith(".safetensors") for name in hub.fetched]
    assert large == sorted(large) and sum(large) == 4


def no_config(repository: Path) -> None:
    (repository / "vae" / "config.json").unlink()


def other_class(repository: Path) -> None:
    index = json.loads((repository / "model_index.json").read_text())
    (repository / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))


def lacking_index(repository: Path) -> None:
    places = shard(repository / DENOISER)
    del places["proj_out.bias"]
    write_index(repository / DENOISER, places)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_config, "component .*vae is named in its pipeline's index but missing"),
        (other_class, "is a FluxPipeline"),
        (lacking_index, "proj_out.bias"),
    ],
)
def test_what_small_files_tell_is_told_before_large_ones_are_fetched(hub, damage, words):
    damage(hub.repository)
    with pytest.raises(ModelError, match=words):
        SourceModel.open("someone/some-model")
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


def test_a_plan_of_a_hub_id_minds_no_weights_that_were_fetched_by_half(hub):
    (hub.cache / "vae").mkdir(parents=True)
    (hub.cache / VAE).symlink_to("gone")
    assert read_configs("someone/some-model").autoencoder.config["z_dim"] == 16
    assert not any(name.endswith(".safetensors") for name in hub.fetched)
