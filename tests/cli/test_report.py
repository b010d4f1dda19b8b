import json

from tests.cli.typed import assert_refused, run
from tests.report.evaluation_folder import write_evaluation


def test_report_writes_a_page_and_says_where(tmp_path):
    folder = write_evaluation(tmp_path / "out")
    result = run("report", folder, "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'page.html'}: 6 items" in result.stdout
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not (tmp_path / "page_videos").exists()


def test_report_says_what_has_to_travel_with_the_page(tmp_path):
    folder = write_evaluation(tmp_path / "out")
    result = run("report", folder, "-o", tmp_path / "page.html", "--embed-mib", 0, "--json")
    record = json.loads(result.stdout)
    assert record["folder_beside"] == str(tmp_path / "page_videos")
    assert record["num_videos_inside"] == 0
    assert record["num_videos_beside"] == len(list((tmp_path / "page_videos").iterdir()))
    result = run("report", folder, "-o", tmp_path / "page.html", "--embed-mib", 0)
    assert "keep them together" in " ".join(result.stdout.split())


def test_report_refuses_a_folder_that_is_no_evaluation(tmp_path):
    assert_refused(run("report", tmp_path, "-o", tmp_path / "page.html"), 1, "holds no evaluation.json")


def test_report_refuses_another_kind_of_file(tmp_path):
    assert_refused(run("report", tmp_path, "-o", tmp_path / "page.pdf"), 1, "does not end in .html")


def test_the_default_budget_is_that_of_the_library():
    from tempoquant.cli.report import BUDGET_MIB
    from tempoquant.report import build

    assert BUDGET_MIB == build.BUDGET_MIB
