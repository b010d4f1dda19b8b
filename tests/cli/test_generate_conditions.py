"""`generate` takes what the model is conditioned on, and refuses what it lacks or would ignore
before it is loaded.
"""

import pytest

from tempoquant.placement import memory_modes
from tests.cli.typed import assert_refused, run
from tests.conditioned import write_prompts
from tests.wan_pipelines import write


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: write(folder / name, name) for name in ("wan21_t2v", "wan21_i2v", "animate")}


@pytest.fixture
def given(tmp_path):
    """Return an image and two clips."""
    write_prompts(tmp_path, ("image", "pose", "face"))
    return {"--image": tmp_path / "image-0.png", "--pose": tmp_path / "pose-0", "--face": tmp_path / "face-0"}


def generate(model, output, given):
    flags = [each for pair in given.items() for each in pair]
    return run("generate", model, "--prompt", "go", "-o", output, "--device", "cpu", *flags)


@pytest.mark.parametrize(
    ("model", "names"), [("wan21_t2v", ()), ("wan21_i2v", ("--image",)), ("animate", ("--image", "--pose", "--face"))]
)
def test_each_model_gets_what_it_needs(models, given, tmp_path, model, names):
    found = generate(models[model], tmp_path / "a.mp4", {name: given[name] for name in names})
    assert found.exit_code == 0, found.output
    assert "5 frames of 32×32" in found.stdout and (tmp_path / "a.mp4").stat().st_size > 0


@pytest.mark.parametrize(
    ("model", "names", "words"),
    [
        ("wan21_t2v", ("--image",), "a WanPipeline takes no image: leave --image out"),
        ("wan21_t2v", ("--pose",), "a WanPipeline takes no pose clip: leave --pose out"),
        ("wan21_i2v", (), "a WanImageToVideoPipeline needs an image: give --image"),
        ("animate", ("--image", "--pose"), "needs a face clip: give --image and --pose and --face"),
    ],
)
def test_what_is_missing_or_ignored_is_refused_before_loading(
    models, given, tmp_path, monkeypatch, model, names, words
):
    monkeypatch.setattr(memory_modes, "load_in_mode", lambda *_: pytest.fail("a model was loaded"))
    assert_refused(generate(models[model], tmp_path / "a.mp4", {name: given[name] for name in names}), 1, words)
    assert not (tmp_path / "a.mp4").exists()


def test_a_clip_that_is_not_there_is_named(models, given, tmp_path):
    wrong = {**given, "--pose": tmp_path / "gone.mp4"}
    assert_refused(generate(models["animate"], tmp_path / "a.mp4", wrong), 1, "there is no pose clip")
