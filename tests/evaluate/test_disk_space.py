"""The disk check of an evaluation: a bound on what a run leaves, and a refusal before any work."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tempoquant.errors import OutputError
from tempoquant.evaluate import disk_space, generation
from tempoquant.evaluate.benchmark_sets import load_benchmark
from tempoquant.evaluate.disk_space import image_bytes, missing_bytes, video_bytes
from tempoquant.evaluate.evaluation import evaluate
from tempoquant.evaluate.evaluation_folder import EvaluationFolder
from tempoquant.evaluate.files import write_lossless, write_mp4, write_png
from tempoquant.evaluate.plan import Model, Plan
from tempoquant.evaluate.request import Request
from tempoquant.models.source import SourceModel
from tempoquant.quantizing import quantize
from tests.recorded import CPU, SETTINGS, SOURCE

STEPS = SETTINGS.replace(num_steps=2)
LABELS = ("16-bit", "rtn")
ITEMS = load_benchmark("tiny", None, 1.0, 3).items


def bytes_in(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def request_of(tmp_path_factory):
    rounded = SourceModel.open(quantize("tiny", tmp_path_factory.mktemp("models") / "rtn", "rtn", device="cpu"))

    def request(**changes):
        models = Model(LABELS[0], SOURCE), [Model(LABELS[1], rounded)]
        return Request(*models, load_benchmark("tiny", None, 1.0, 3), STEPS, **changes)

    return request


@pytest.fixture(scope="module")
def evaluated(request_of, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation") / "out"
    evaluate(request_of(limit=3), out, CPU)
    return out


def plan_of(settings=STEPS, seeds=(0,), items=ITEMS):
    return Plan.of(SOURCE, items, seeds, settings, "cpu")


def missing(folder, **plan):
    return missing_bytes(EvaluationFolder(folder), plan_of(**plan), LABELS, True)


def test_a_run_leaves_no_more_than_was_foreseen_and_its_tensors_just_that(evaluated, tmp_path):
    foreseen = missing(tmp_path) - len(LABELS) * disk_space._MODEL_BYTES
    maps = (evaluated / "maps" / "rtn.json").stat().st_size
    left = bytes_in(evaluated)
    assert 2 * maps < disk_space._MODEL_BYTES
    assert left - 2 * maps < foreseen
    latents, calls = bytes_in(evaluated / "latents"), bytes_in(evaluated / "calls")
    plan = plan_of()
    assert disk_space._latents_bytes(plan) * 6 < latents < (disk_space._latents_bytes(plan) + 2**12) * 6
    assert (disk_space._calls_bytes(plan) - 2**14) * 2 < calls < disk_space._calls_bytes(plan) * 2


def test_what_is_there_is_not_counted_again(evaluated, tmp_path):
    assert missing(evaluated) == 0
    nothing, everything = missing(tmp_path), missing(tmp_path, seeds=(0, 1))
    second_seed = missing(evaluated, seeds=(0, 1))
    calls_and_images = nothing + second_seed - everything
    assert 0 < second_seed < nothing < everything
    # Calls are kept of the first seed alone, which has them; all images are there.
    assert calls_and_images == pytest.approx(len(LABELS) * disk_space._MODEL_BYTES, abs=1)


@pytest.mark.parametrize("size", [(16, 16, 1), (32, 48, 5), (16, 16, 81), (240, 416, 9)])
@pytest.mark.parametrize("kind", ["noise", "black and white"])
def test_noise_takes_no_more_than_the_bound(tmp_path, size, kind):
    """The worst that any model can draw: nothing of it can be compressed."""
    height, width, num_frames = size
    video = np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
    if kind == "black and white":
        video = (video > 127).astype(np.uint8) * 255
    write_lossless(tmp_path / "a.mkv", video, 8)
    write_mp4(tmp_path / "a.mp4", video, 8)
    settings = SETTINGS.replace(height=height, width=width, num_frames=num_frames)
    assert bytes_in(tmp_path) <= video_bytes(settings)
    (tmp_path / "still").mkdir()
    write_png(tmp_path / "still" / "a.png", Image.fromarray(video[0]))
    assert bytes_in(tmp_path / "still") <= image_bytes(settings)


def test_a_disk_without_room_is_noticed_before_any_model_is_loaded(request_of, tmp_path, monkeypatch):
    needed = missing(tmp_path)
    room = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(disk_space, "shutil", SimpleNamespace(disk_usage=lambda _: room))
    monkeypatch.setattr(generation, "load_in_mode", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(OutputError) as refused:
        evaluate(request_of(limit=3), tmp_path / "out", CPU)
    size = f"{needed / 2**20:.1f} MiB"
    assert str(refused.value) == (
        f"6 videos are still to be generated, which with their latents take up to {size}, and the disk of "
        f"{tmp_path / 'out'} has {size} free: free some, give another folder with -o, or ask for fewer items or seeds."
    )
    room.free = needed
    disk_space.check_space(EvaluationFolder(tmp_path / "out"), plan_of(), LABELS, True)


def test_a_finished_evaluation_needs_no_room(request_of, evaluated, monkeypatch):
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    assert evaluate(request_of(limit=3), evaluated, CPU)["items"]


def test_large_numbers_are_in_gib():
    assert (disk_space._size(3 * 2**29), disk_space._size(2**20)) == ("1.5 GiB", "1.0 MiB")


def test_calls_are_kept_of_two_items_however_many_seeds_there_are():
    first, second, *_ = ITEMS
    for seeds in ((0,), (5, 6, 7)):
        assert plan_of(seeds=seeds).mapped_takes == {(first.id, seeds[0]), (second.id, seeds[0])}
    assert plan_of(items=[first], seeds=(5, 6, 7)).mapped_takes == {(first.id, 5)}
