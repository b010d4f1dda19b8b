"""The page in a real browser, opened from disk."""

import json

import pytest

from tempoquant.report.build import build_report
from tests.report.evaluation_folder import (
    FAILED,
    IDENTICAL,
    OVERLAP,
    PLAIN,
    PROMPTS,
    PSNR,
    TUNED,
    evaluation_document,
)
from tests.report.shown import rows, show

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the extra `test`")


def test_the_page_asks_for_nothing_but_itself(page_file, open_page):
    seen = open_page(page_file)
    show(seen.page, IDENTICAL)
    seen.page.locator("[data-do=play]").click()
    seen.page.wait_for_timeout(500)
    assert seen.requests == [page_file.as_uri()]


def test_items_that_lost_most_come_first(page_file, open_page):
    page = open_page(page_file).page
    by_loss = sorted(
        (name for name in PROMPTS if name != FAILED[0]), key=lambda name: PSNR[PLAIN][list(PROMPTS).index(name)]
    )
    assert rows(page) == [FAILED[0], *by_loss]
    page.locator("[data-model]").select_option(TUNED)
    assert rows(page)[0] == "ball-up" and rows(page)[-1] == "ball-still"
    page.get_by_role("button", name="Item", exact=True).click()
    assert rows(page) == sorted(PROMPTS)
    assert page.locator("th[aria-sort=ascending]").inner_text() == "Item"


def test_filters_filter(page_file, open_page):
    page = open_page(page_file).page
    page.locator("[data-search]").fill("ROLLS")
    assert sorted(rows(page)) == ["ball-left", "ball-right"]
    assert page.locator("[data-count]").inner_text().startswith("2 of 6 items")
    page.locator("[data-search]").fill("")
    page.locator("[data-category]").select_option("other")
    assert len(rows(page)) == 4
    page.locator("[data-category]").select_option("")
    for shown, names in (("failed", [FAILED[0]]), ("overlap", [OVERLAP]), ("quarter", [FAILED[0], "ball-up"])):
        page.locator("[data-show]").select_option(shown)
        assert rows(page) == names


def test_a_heat_map_is_read_with_the_arrow_keys(page_file, open_page):
    page = open_page(page_file).page
    page.locator("[data-map-model]").select_option(PLAIN)
    map_ = page.get_by_role("application", name=f"Error of {PLAIN}, low_noise")
    map_.focus()
    map_.press("ArrowRight")
    map_.press("ArrowDown")
    read = page.locator(".map", has=map_).locator(".read").inner_text()
    assert read == "blocks.0.attn1.to_k, timesteps 300–600: error −12.1 dB"
    assert page.locator("[data-map-live]").inner_text() == read


def test_vbench_stands_after_the_measures_against_16_bit_with_the_trap_and_falls_where_they_fall(page_file, open_page):
    page = open_page(page_file).page
    headline = page.locator("table.headline").first
    groups = [text.strip() for text in headline.locator("tr.group").all_inner_texts()]
    assert groups[:2] == ["Quality against 16-bit", "VBench"]
    body = headline.locator("tbody", has=page.locator("tr.group", has_text="VBench"))
    titles = [text.splitlines()[0].strip() for text in body.locator("th[scope=row]").all_inner_texts()]
    assert titles == ["VBench raw mean ↑", "VBench relative drop ↓"]
    cells = body.locator("tr", has_text="VBench relative drop").locator("td")
    assert [text.split("\n")[0].strip() for text in cells.all_inner_texts()] == ["–", "3.30 %", "1.10 %"]
    assert "collapsed video" in body.locator("tr.warning").inner_text()
    table = page.get_by_role("region", name="VBench scores")
    assert table.locator("tr.sum td").nth(1).inner_text().split() == ["0.9150", "0.8950", "lost", "3.30", "%"]


def test_an_evaluation_of_nothing_but_failures_opens(tmp_path, open_page):
    """The evaluation was interrupted after the reference, and nothing could be measured."""
    document = evaluation_document()
    reference = document["reference"]
    document |= {"models": document["models"][:1], "summary": [], "pairs": [], "vbench": None}
    for item in document["items"]:
        item |= {"videos": {}, "metrics": {}, "failed": {reference: "out of memory"}, "image": None}
    (tmp_path / "evaluation.json").write_text(json.dumps(document), encoding="utf-8")
    build_report([tmp_path], tmp_path / "report.html")
    page = open_page(tmp_path / "report.html").page
    assert len(rows(page)) == len(PROMPTS)
    page.locator(".players").press("Space")
    page.locator(".players").press("d")
    assert "out of memory" in page.locator(".stage").inner_text()


def test_the_theme_follows_the_system_and_the_choice(page_file, open_page):
    def is_dark(page) -> bool:
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return int(color.removeprefix("rgb(").split(",")[0]) < 128

    assert not is_dark(open_page(page_file, color_scheme="light").page)
    page = open_page(page_file, color_scheme="dark").page
    assert is_dark(page)
    page.locator("#theme").select_option("light")
    assert not is_dark(page)


def test_a_phone_scrolls_down_only(page_file, open_page):
    for width in (320, 390):
        page = open_page(page_file, width=width, height=700, has_touch=True, is_mobile=True).page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        left, right = page.locator(".stage").evaluate(
            "(e) => [e.getBoundingClientRect().left, e.getBoundingClientRect().right]"
        )
        assert left >= 0 and right <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_no_barrier(page_file, open_page, scheme, width):
    """Names, roles, contrast, order of headings: what axe-core can tell of WCAG 2.2 A and AA and of
    good practice.
    """
    page = open_page(page_file, color_scheme=scheme, width=width).page
    show(page, FAILED[0])
    page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_hostile_texts_run_nothing_and_are_shown_as_they_are(evaluation, tmp_path, open_page):
    hostile = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>\u2028&amp;"
    document = evaluation_document()
    texts = (PROMPTS["ball-left"], PROMPTS[OVERLAP], "NaN in the decoded video", document["notes"][0], TUNED)
    text = json.dumps(document)
    for word in texts:
        text = text.replace(json.dumps(word), json.dumps(hostile))
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("videos", "items"):
        (folder / name).symlink_to(evaluation / name)
    (folder / "evaluation.json").write_text(text, encoding="utf-8")
    build_report([folder], tmp_path / "report.html")
    seen = open_page(tmp_path / "report.html")
    show(seen.page, "ball-left")
    assert seen.page.locator(".prompt").evaluate("(e) => e.textContent") == hostile
    assert seen.page.locator("thead button").last.evaluate("(e) => e.textContent") == hostile
    assert seen.page.locator("[data-map-model] option").last.evaluate("(e) => e.textContent") == hostile
    assert seen.page.evaluate("window.hacked") is None
    assert seen.requests == [(tmp_path / "report.html").as_uri()]
