"""The content of the page, and the refusals."""

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest

from tempoquant.errors import EvaluationError, OutputError
from tempoquant.report.build import build_report
from tempoquant.report.evaluation import read_evaluation
from tempoquant.report.merge import merge
from tests.report.evaluation_folder import (
    FAILED,
    IDENTICAL,
    OVERLAP,
    PLAIN,
    PROMPTS,
    REFERENCE,
    TUNED,
    evaluation_document,
    vbench_document,
    write_evaluation,
)

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\u2028&amp;\"'"
NUM_VIDEOS = 3 * len(PROMPTS) - 1 - 1  # one failed, and one is the reference's very video


def write_document(folder: Path, document: object) -> Path:
    """Write evaluation.json alone."""
    folder.mkdir(exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def payload(page: str) -> dict:
    """Return the payload of the page's script for its first part."""
    return json.loads(re.search(r'id="data-0">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_holds_every_video_byte_for_byte(evaluation, page_file):
    page = page_file.read_text(encoding="utf-8")
    items = {item["id"]: item for item in payload(page)["items"]}
    for name in PROMPTS:
        for label in (REFERENCE, PLAIN, TUNED):
            if (name, label) == FAILED:
                assert label not in items[name]["videos"]
                continue
            place = items[name]["videos"][label]["element"]
            text = re.search(rf'id="{place}">([^<]*)<', page)[1]
            assert base64.b64decode(text) == (evaluation / f"videos/{label}/{name}-0.mp4").read_bytes()


def test_the_policy_names_the_only_script_and_style_and_no_host(page_file):
    page = page_file.read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1].replace("&#39;", "'")
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    script = re.search(r'<script type="module">(.*?)</script>', page, re.DOTALL)[1]
    for text, directive in ((style, "style-src"), (script, "script-src")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy and "unsafe" not in policy and "*" not in policy
    assert re.findall(r"""(?:src|href)=["']?(?!#|data:,)[^"'\s>]+""", page.replace(script, "")) == []


def test_hostile_texts_stay_texts(tmp_path):
    document = evaluation_document(num_layers=3)
    label = "<b onclick=alert(1)>"
    text = json.dumps(document).replace(json.dumps(TUNED), json.dumps(label))
    document = json.loads(text.replace(json.dumps(PROMPTS["ball-left"]), json.dumps(HOSTILE)))
    document["notes"] = document["benchmark"]["overlap"] = [HOSTILE]
    document["command"] = document["items"][4]["failed"][label] = document["benchmark"]["name"] = HOSTILE
    for item in document["items"]:
        item |= {"videos": {}, "image": None}
    build_report([write_document(tmp_path / "out", document)], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>window" not in page and "<img src=x" not in page and "<b onclick" not in page
    assert "\u2028" not in re.search(r'id="data-0">.*?</script>', page, re.DOTALL)[0]
    assert payload(page)["items"][0]["prompt"] == HOSTILE
    assert label in payload(page)["labels"]


def test_what_is_beyond_the_budget_lies_beside_and_the_worst_are_inside(evaluation, tmp_path):
    worst = [FAILED[0], "ball-up"]
    sizes = [file.stat().st_size for name in worst for file in evaluation.glob(f"videos/*/{name}-0.mp4")]
    budget = sum((size + 2) // 3 * 4 for size in sizes)
    record = build_report([evaluation], tmp_path / "some.html", budget_mib=budget / 2**20)
    assert record["num_videos_inside"] + record["num_videos_beside"] == NUM_VIDEOS
    assert record["num_videos_inside"] == len(sizes) == 5
    items = payload((tmp_path / "some.html").read_text(encoding="utf-8"))["items"]
    inside = {item["id"] for item in items if all("element" in place for place in item["videos"].values())}
    assert inside == set(worst)
    for item in items:
        for label, place in item["videos"].items():
            if "file" in place:
                copy = (tmp_path / place["file"]).read_bytes()
                assert copy == (evaluation / f"videos/{label}/{item['id']}-0.mp4").read_bytes()


def test_a_budget_of_nothing_puts_every_video_beside_and_says_so_in_the_policy(evaluation, tmp_path):
    record = build_report([evaluation], tmp_path / "none.html", budget_mib=0)
    assert (record["num_videos_inside"], record["num_videos_beside"]) == (0, NUM_VIDEOS)
    assert len(list((tmp_path / "none_videos").iterdir())) == NUM_VIDEOS
    assert "media-src blob: &#39;self&#39; file:;" in (tmp_path / "none.html").read_text(encoding="utf-8")


def test_the_same_evaluation_makes_the_same_page(evaluation, page_file, tmp_path):
    build_report([evaluation], tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == page_file.read_bytes()


def test_evaluations_of_the_same_16_bit_videos_become_one(evaluation, tmp_path):
    document = evaluation_document()
    folder = tmp_path / "second"
    folder.mkdir()
    for name in ("videos", "items"):
        (folder / name).symlink_to(evaluation / name)
    (part,) = merge([read_evaluation(evaluation), read_evaluation(write_document(folder, document))])
    assert part.labels == [REFERENCE, PLAIN, TUNED, f"{PLAIN} (second)", f"{TUNED} (second)"]
    assert len(part.items) == len(PROMPTS)
    assert part.items[0].metrics[f"{TUNED} (second)"] == part.items[0].metrics[TUNED]
    assert [labels for _, labels in part.commands] == [part.labels[:3], part.labels[3:]]
    of_reference = [row for row in document["summary"] if row["label"] == REFERENCE]
    assert len(part.summary) == 2 * len(document["summary"]) - len(of_reference)
    assert [row["second"] for row in part.pairs] == [TUNED, f"{TUNED} (second)"]
    assert part.notes == document["notes"]


def test_merged_vbench_scores_keep_their_labels_and_other_dimensions_are_warned_of(evaluation, tmp_path):
    parts = {}
    for name, changes in (("same", {}), ("other", {"dimensions": ["motion_smoothness"]})):
        scores = {REFERENCE: (0.91, None), PLAIN: (0.8, 0.1)}
        failure = {"dimension": "motion_smoothness", "id": "x", "seed": 0}
        failed = [{**failure, "label": REFERENCE, "why": "not of this part"},
                  {**failure, "label": PLAIN, "why": "no frame"}]  # fmt: skip
        document = {**evaluation_document(), "vbench": vbench_document(scores, failed=failed, **changes)}
        folder = tmp_path / name
        folder.mkdir()
        for media in ("videos", "items"):
            (folder / media).symlink_to(evaluation / media)
        (parts[name],) = merge([read_evaluation(evaluation), read_evaluation(write_document(folder, document))])
    for name, part in parts.items():
        assert list(part.vbench) == [REFERENCE, PLAIN, TUNED, f"{PLAIN} ({name})"]
        drops = {row["label"]: row["mean"] for row in part.vbench_summary if row["metric"] == "vbench_relative_drop"}
        assert drops == {PLAIN: 0.033, TUNED: 0.011, f"{PLAIN} ({name})": 0.1}
        assert "VBench's motion smoothness failed: no frame" in part.notes
        assert not any("not of this part" in note for note in part.notes)
        assert any("their VBench means do not compare" in note for note in part.notes) == (name == "other")


def test_evaluations_of_other_16_bit_videos_stay_apart(evaluation, tmp_path):
    other = write_evaluation(tmp_path / "other")
    reference = other / f"videos/{REFERENCE}/{IDENTICAL}-0.mp4"
    reference.write_bytes((other / f"videos/{PLAIN}/{IDENTICAL}-0.mp4").read_bytes())
    assert len(merge([read_evaluation(evaluation), read_evaluation(other)])) == 2
    build_report([evaluation, other], tmp_path / "two.html")
    page = (tmp_path / "two.html").read_text(encoding="utf-8")
    assert 'id="players-1"' in page and 'id="data-1"' in page


def row_of(page, title):
    """Return the cells of one row of the headline table, as HTML."""
    [row] = re.findall(rf'<tr><th scope="row">{re.escape(title)}<small>.*?</tr>', page, re.DOTALL)
    return re.findall(r"<td>.*?</td>", row, re.DOTALL)


def test_times_have_intervals_memory_its_spread_and_a_cpu_a_warning(page_file):
    page = page_file.read_text(encoding="utf-8")
    reference, plain, _ = row_of(page, "Time per step")
    assert "0.500 s" in reference and "0.800 s" in plain
    assert "0.470 … 0.910" in plain and "6 items" in plain
    reference, plain, _ = row_of(page, f"Time per step against {REFERENCE}")
    assert "–" in reference and "interval" not in reference
    assert "1.60 ×" in plain and "1.25 … 1.75" in plain and "5 items" in plain
    assert all("1.25 GiB" in cell and "1.12 … 1.25 of 6 videos" in cell for cell in row_of(page, "Peak RAM"))
    assert page.count("they say nothing about a GPU") == 1


def test_on_a_gpu_every_phase_has_its_spread_and_there_is_no_warning(tmp_path):
    document = evaluation_document(num_layers=3)
    for item in document["items"]:
        item |= {"videos": {}, "image": None}
    for model in document["models"]:
        model["memory"]["peak_gpu_gib"] = {"denoising": 9.5}
        model["costs"]["peak_gpu_gib"] = {"denoising": {"most": 9.5, "least": 9.25, "n": 6}}
    build_report([write_document(tmp_path / "out", document)], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all("9.50 GiB" in cell and "9.25 … 9.50 of 6 videos" in cell for cell in row_of(page, "Peak GPU, denoising"))
    assert "they say nothing about a GPU" not in page


def test_evaluations_of_earlier_versions_show_their_costs_without_a_spread(tmp_path):
    document = evaluation_document(num_layers=3)
    for item in document["items"]:
        item |= {"videos": {}, "image": None}
    for model in document["models"]:
        del model["costs"]
    build_report([write_document(tmp_path / "out", document)], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [cell.count("interval") for title in ("Time per step", "Peak RAM") for cell in row_of(page, title)] == [
        0
    ] * 6
    assert "0.800 s" in row_of(page, "Time per step")[1] and "1.25 GiB" in row_of(page, "Peak RAM")[0]


def test_within_noise_overlap_failures_and_the_trap_are_said(page_file):
    page = page_file.read_text(encoding="utf-8")
    assert page.count('<span class="chip noise">within noise</span>') == 4  # two of them VBench's
    assert 'Δ −0.0020</span><span class="interval">−0.0024 … −0.0016<' in page
    assert "Overlap with calibration." in page and f'<tr class="overlap"><td>{OVERLAP}' in page
    assert "NaN in the decoded video" in page
    assert "0.8800<span" in page and "subject consistency" in page and "lost 3.30 %" in page  # VBench
    assert "Collapsed videos score high." in page and "collapsed video" in page


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "has schema 2"),
        ({"models": "none"}, "models should be a list"),
        ({"items": [{"id": "a"}]}, "lacks items[0].seed"),
        ({"reference": "32-bit"}, "is no model"),
        ({"settings": {"fps": 0, "num_frames": 5}}, "no frame rate"),
        ({"settings": {"fps": True, "num_frames": 5}}, "fps should be a number"),
        ({"models": [{"label": REFERENCE, "folder": ""}] * 2}, "two models have one label"),
        ({"models": [{"label": REFERENCE, "folder": ""}]}, "none of the models"),
        ({"items": evaluation_document()["items"][:1] * 2}, "occurs twice"),
        ({"vbench": {REFERENCE: {"raw": {}}}}, "lacks vbench.version"),
        ({"vbench": vbench_document({"nobody": (0.9, None)})}, "VBench names 'nobody'"),
    ],
)
def test_a_document_that_makes_no_sense_is_refused(tmp_path, change, words):
    folder = write_document(tmp_path / "out", {**evaluation_document(), **change})
    with pytest.raises(EvaluationError, match=re.escape(words)):
        read_evaluation(folder)


def test_a_map_of_another_shape_is_refused(tmp_path):
    document = evaluation_document()
    document["models"][1]["maps"]["low_noise"]["error_db"].pop()
    with pytest.raises(EvaluationError, match="its error_db is of another shape"):
        read_evaluation(write_document(tmp_path / "out", document))


def test_nan_and_half_a_document_are_refused(tmp_path):
    for text in ('{"schema": NaN}', json.dumps(evaluation_document())[:-100], "\udcff"):
        (tmp_path / "evaluation.json").write_text(text, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(EvaluationError, match="is not JSON"):
            read_evaluation(tmp_path)


def test_a_folder_without_an_evaluation_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match=re.escape("holds no evaluation.json")):
        build_report([tmp_path], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../secret.mp4", "/etc/hostname", "videos/not-there.mp4"])
def test_a_video_outside_the_folder_or_missing_is_refused(tmp_path, name):
    document = evaluation_document()
    document["items"][0]["videos"][REFERENCE] = name
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    with pytest.raises(EvaluationError, match=r"outside its folder|is not there"):
        build_report([write_document(tmp_path / "out", document)], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_is_no_html_file_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(OutputError, match=r"does not end in \.html"):
        build_report([tmp_path], tmp_path / "report.txt")
