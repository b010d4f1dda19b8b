"""`--base` and `--expert` as a user types them: the commands do with files what they do with the
model's own folder.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import typer
from diffusers import WanPipeline
from safetensors.torch import load_file

from tempoquant.calibrate.store import SampleStore
from tempoquant.cli.source_options import model_of, reference_and_folders
from tempoquant.models.wan.family import COMPONENTS
from tempoquant.models.with_experts import WithExperts
from tests.cli.typed import assert_refused, run, split
from tests.recorded import TINY, bytes_of, samples_of
from tests.wan_files import state_of, write_fp8, write_single
from tests.wan_pipelines import PIPELINES

SMALL = split("--steps 4 --frames 5 --size 32x32 --device cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the bundled model's denoisers, each in a separate file."""
    folder = tmp_path_factory.mktemp("files")
    return {
        name: write_single(folder / f"{name}.safetensors", state_of(TINY, component), "diffusion_model.")
        for name, component in COMPONENTS.items()
    }


def flags(files: dict[str, Path]) -> list[object]:
    return ["--base", "tiny", *(word for name, file in files.items() for word in ("--expert", f"{name}={file}"))]


@pytest.fixture(scope="module")
def quantized(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quantized") / "out"
    done = run("quantize", *flags(files), "-o", output, "--recipe", "rtn")
    assert done.exit_code == 0, done.output
    return output


def test_files_are_quantized_as_their_model_is_and_the_result_says_where_they_are_from(
    quantized: Path, tmp_path: Path
) -> None:
    assert run("quantize", "tiny", "-o", tmp_path / "own", "--recipe", "rtn").exit_code == 0
    for component in COMPONENTS.values():
        shards = {file.name for file in (quantized / component).glob("*.safetensors")}
        assert shards and all(
            load_file(quantized / component / name).keys() == load_file(tmp_path / "own" / component / name).keys()
            and (quantized / component / name).read_bytes() == (tmp_path / "own" / component / name).read_bytes()
            for name in shards
        )
    assert "- high_noise: the weights are those of high_noise.safetensors.\n" in (quantized / "README.md").read_text()
    assert "the weights are those of" not in (tmp_path / "own" / "README.md").read_text()
    assert "low_noise: the weights are those of low_noise.safetensors" in run("inspect", quantized).stdout


def test_eight_bit_weights_are_said_in_the_result(files: dict[str, Path], tmp_path: Path) -> None:
    file = write_fp8(tmp_path / "fp8.safetensors", state_of(TINY))
    given = {**files, "high_noise": file}
    assert run("quantize", *flags(given), "-o", tmp_path / "out", "--recipe", "rtn").exit_code == 0
    words = "high_noise: from 8-bit weights: "
    assert f"- {words}" in (tmp_path / "out" / "README.md").read_text()
    assert words in run("inspect", tmp_path / "out", "--verify").stdout


def test_every_command_that_takes_a_16_bit_model_takes_files(
    files: dict[str, Path], quantized: Path, tmp_path: Path
) -> None:
    small = ["--prompts", 1, "--samples-per-denoiser", 2, *SMALL]
    for store, named in (("own", ["tiny"]), ("files", flags(files))):
        assert run("record", *named, "-o", tmp_path / store, *small).exit_code == 0
    own, found = (samples_of(SampleStore.open(tmp_path / store)) for store in ("own", "files"))
    assert len(own) == 4 and all(
        mine == other for mine, other in zip(map(numbers, own), map(numbers, found), strict=True)
    )
    for named, store in ((["tiny"], "files"), (flags(files), "own")):
        assert_refused(run("sensitivity", *named, "--store", tmp_path / store), 1, "recorded from another model")
    short = [*SMALL, "--steps", 2]
    task = ["--samples", 1, *short, "--json"]
    own_side, file_side = (
        json.loads(run("compare", *named, quantized, *task).stdout) for named in (["tiny"], flags(files))
    )
    assert own_side["models"][0]["noise_prediction"] == file_side["models"][0]["noise_prediction"] != []
    assert file_side["reference"]["num_bytes"] == sum(file.stat().st_size for file in files.values())
    evaluate = ["--benchmark", "tiny", "--limit", 1, "-o", tmp_path / "evaluation", *short]
    assert run("evaluate", *flags(files), quantized, *evaluate).exit_code == 0


def numbers(sample: object) -> dict[str, object]:
    return {name: tensor.tolist() for name, tensor in sample.inputs.items()}


@pytest.mark.parametrize("link", [[], ["--link"]])
def test_plain_diffusers_loads_what_was_made_of_variants(link: list[str], tmp_path: Path) -> None:
    pipeline = PIPELINES["wan22_t2v"]()
    pipeline.save_pretrained(tmp_path / "source", variant="fp16")
    pipeline.text_encoder.save_pretrained(tmp_path / "sharded", variant="fp16", max_shard_size="20KB")
    shutil.rmtree(tmp_path / "source" / "text_encoder")
    (tmp_path / "sharded").rename(tmp_path / "source" / "text_encoder")
    before = bytes_of(tmp_path / "source")
    done = run("quantize", tmp_path / "source", "-o", tmp_path / "out", "--recipe", "rtn", *link)
    assert done.exit_code == 0, done.output
    loaded = WanPipeline.from_pretrained(tmp_path / "out")
    for name in ("text_encoder", "vae"):
        wanted = getattr(pipeline, name).state_dict()
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in getattr(loaded, name).state_dict().items())
    assert bytes_of(tmp_path / "source") == before


def test_an_output_that_would_swallow_a_file_is_refused(files: dict[str, Path]) -> None:
    folder = files["high_noise"].parent
    for command in (
        ["quantize", *flags(files), "-o", folder, "--recipe", "rtn"],
        ["record", *flags(files), "-o", folder],
    ):
        assert_refused(run(*command), 1, "overlap: choose")


def test_what_is_not_there_or_not_a_file_of_weights_is_refused_before_work(
    files: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    for file, words in ((tmp_path / "model-Q4_K_M.gguf", "is a GGUF file"), (tmp_path / "none", "no file or folder")):
        given = flags({**files, "low_noise": file})
        assert_refused(run("quantize", *given, "-o", tmp_path / "out", "--recipe", "rtn"), 1, words)
        assert_refused(run("quantize", *given, "--dry-run", "--recipe", "rtn"), 1, words)
        assert_refused(run("record", *given, "-o", tmp_path / "store"), 1, words)
        assert_refused(run("compare", *given, tmp_path), 1, words)
    assert_refused(run("quantize", files["low_noise"], "--dry-run"), 1, "is one file of weights")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model-Q4_K_M.gguf"]


@pytest.mark.parametrize(
    ("model", "base", "denoisers", "words"),
    [
        (None, None, None, "name a model"),
        (None, None, ["high_noise=f"], "name their pipeline with --base"),
        ("tiny", "tiny", ["high_noise=f"], "replaces MODEL: leave tiny out"),
        (None, "tiny", None, "goes with --expert: give the model alone as MODEL"),
        (None, "tiny", ["f.safetensors"], "'f.safetensors' is not DENOISER=FILE or DENOISER=FOLDER"),
        (None, "tiny", ["high_noise="], "is not DENOISER=FILE"),
        (None, "tiny", ["high_noise=f", "high_noise=g"], "high_noise is given twice: f and g"),
    ],
)
def test_half_a_model_is_refused(model: str | None, base: str | None, denoisers: list[str] | None, words: str) -> None:
    with pytest.raises(typer.BadParameter, match=words):
        model_of(model, base, denoisers)


def test_a_base_stands_in_the_place_of_a_reference() -> None:
    given = WithExperts("tiny", {"high_noise": "a=b"})
    assert reference_and_folders(["tiny", "x", "y"], None, None) == ("tiny", ["x", "y"])
    assert reference_and_folders(["x"], "tiny", ["high_noise=a=b"]) == (given, ["x"])
    assert str(given) == "tiny"
    with pytest.raises(typer.BadParameter, match="name a quantized pipeline"):
        reference_and_folders(["tiny"], None, None)
