import json
import os

import pytest
import torch

from tempoquant.errors import OutputError
from tempoquant.evaluate.evaluation_folder import MANIFEST, EvaluationFolder, Take, file_name, read_latents
from tempoquant.evaluate.files import whole_file

IDENTITY = {"benchmark": "tiny", "settings": {"num_steps": 4, "fps": 8}, "models": {"a": "1"}, "items": {"i": "x"}}
COSTS = {"seconds_per_step": 0.5, "peak_gpu_gib": None, "peak_rss_gib": 1.0}
TAKE = Take("a", "item/1", 0)


@pytest.fixture
def folder(tmp_path):
    found = EvaluationFolder(tmp_path / "out")
    with found.claimed(IDENTITY):
        pass
    return found


def finish(folder, take=TAKE):
    for kind in ("videos", "lossless"):
        folder.place(kind, take).parent.mkdir(parents=True, exist_ok=True)
        folder.place(kind, take).write_bytes(b"video")
    folder.note(folder.finish(take, {"low_noise bin 0": torch.ones(2)}, COSTS))


def test_the_same_settings_are_welcome_again_and_models_and_items_may_be_added(folder):
    with folder.claimed({**IDENTITY, "models": {"b": "2"}, "items": {"j": "y"}}):
        pass
    for changed in ({"models": {"a": "2"}}, {"items": {"j": "z"}}):
        with pytest.raises(OutputError, match="differs in"), folder.claimed({**IDENTITY, **changed}):
            pass


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"benchmark": "opens2v"}, "differs in benchmark"),
        ({"settings": {"num_steps": 5, "fps": 8}}, "differs in settings num_steps"),
        ({"models": {"a": "9"}}, "differs in models a"),
        ({"items": {"i": "changed"}}, "differs in items i"),
        ({"dtype": "bfloat16"}, "differs in dtype"),
    ],
)
def test_other_settings_are_refused_in_a_sentence_and_change_nothing(folder, changes, words):
    before = (folder.path / "settings.json").read_bytes()
    with pytest.raises(OutputError, match=words), folder.claimed({**IDENTITY, **changes}):
        pass
    assert (folder.path / "settings.json").read_bytes() == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match="no evaluation"), EvaluationFolder(tmp_path).claimed(IDENTITY):
        pass
    with pytest.raises(OutputError, match="is a file"), EvaluationFolder(tmp_path / "thesis.tex").claimed(IDENTITY):
        pass


def test_two_runs_do_not_share_a_folder(folder):
    with (
        folder.claimed(IDENTITY),
        pytest.raises(OutputError, match="another evaluation is writing"),
        EvaluationFolder(folder.path).claimed(IDENTITY),
    ):
        pass


def test_a_finished_take_is_known_with_its_costs(folder):
    finish(folder)
    assert folder.takes() == {TAKE: {**TAKE._asdict(), **COSTS}}
    assert torch.equal(read_latents(folder.place("latents", TAKE))["low_noise bin 0"], torch.ones(2))


def test_a_take_that_was_finished_but_not_noted_is_not_lost(folder):
    """Killed between the rename of the latents and the manifest."""
    finish(folder)
    (folder.path / MANIFEST).unlink()
    assert folder.takes() == {TAKE: {**TAKE._asdict(), **COSTS}}
    assert len((folder.path / MANIFEST).read_text().splitlines()) == 1


def test_a_torn_line_is_dropped_and_the_next_one_starts_anew(folder):
    finish(folder)
    with (folder.path / MANIFEST).open("a") as stream:
        stream.write('{"label": "a", "id": "ite')
    other = Take("a", "item 2", 0)
    assert set(folder.takes()) == {TAKE}
    finish(folder, other)
    assert set(folder.takes()) == {TAKE, other}


def test_a_damaged_line_is_an_error(folder):
    (folder.path / MANIFEST).write_text("nonsense\n")
    with pytest.raises(OutputError, match="is damaged"):
        folder.takes()


def test_a_take_whose_video_was_removed_is_not_done(folder):
    finish(folder)
    folder.place("lossless", TAKE).unlink()
    assert folder.takes() == {}


def test_success_after_a_failure_counts(folder):
    folder.note({**TAKE._asdict(), "failed": "out of memory"})
    assert folder.takes()[TAKE]["failed"] == "out of memory"
    finish(folder)
    assert "failed" not in folder.takes()[TAKE]


def test_metrics_are_kept_and_added_to(folder):
    folder.measure(TAKE, {"psnr_db": 30.0})
    folder.measure(TAKE, {"ssim": 0.9})
    assert folder.measured() == {TAKE: {"psnr_db": 30.0, "ssim": 0.9}}


def test_half_written_files_of_a_killed_run_go(folder):
    place = folder.path / "lossless" / "a"
    place.mkdir(parents=True)
    (place / ".my-notes").write_text("somebody else's")
    with pytest.raises(ZeroDivisionError), whole_file(place / "item-0.mkv") as temporary:
        killed = temporary.rename(place / f"{temporary.stem}.kept")
        raise ZeroDivisionError
    killed.rename(temporary)
    with folder.claimed(IDENTITY):
        assert [file.name for file in place.iterdir()] == [".my-notes"]


@pytest.mark.parametrize("text", ["a/b", "../x", "ä", "x" * 300, "a b", ".hidden", "con:1", ""])
def test_any_id_makes_a_safe_name_of_its_own(text):
    name = file_name(text)
    assert len(name) < 100 and name.isascii() and not set(name) & set('/\\: *?"<>|') and not name.startswith(".")
    assert name != file_name(text + "!")
    assert file_name("plain_id-1.x") == "plain_id-1.x"


def test_settings_are_plain_json(folder):
    assert json.loads((folder.path / "settings.json").read_text()) == IDENTITY


def test_a_line_that_finds_no_room_leaves_no_half_of_itself(folder, monkeypatch):
    finish(folder)
    write = os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda handle, content: write(handle, content[:10]))
        with pytest.raises(OutputError, match="is the disk full"):
            folder.measure(TAKE, {"psnr_db": 30.0})
        with pytest.raises(OutputError, match="is the disk full"):
            folder.note({**TAKE._asdict(), "failed": "x"})
    folder.measure(TAKE, {"psnr_db": 31.0})
    assert folder.measured() == {TAKE: {"psnr_db": 31.0}}
    assert set(folder.takes()) == {TAKE}
