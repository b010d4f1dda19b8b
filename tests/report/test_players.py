"""The players in a real browser: what they show is read from the pixels."""

from tempoquant.report.build import build_report
from tests.report.evaluation_folder import (
    FAILED,
    FPS,
    IDENTICAL,
    NUM_FRAMES,
    PLAIN,
    TUNED,
    evaluation_document,
    write_evaluation,
)
from tests.report.shown import CANVAS_LEVELS, show, shown_frames, until, wait_for_frame


def test_every_player_shows_the_frame_that_was_asked_for(page_file, open_page):
    page = open_page(page_file).page
    show(page, "ball-left")
    region = page.locator(".players")
    region.focus()
    for key, frame in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", NUM_FRAMES - 1),
                       ("ArrowRight", NUM_FRAMES - 1), ("Home", 0), ("ArrowLeft", 0)):  # fmt: skip
        region.press(key)
        wait_for_frame(page, frame)
        assert shown_frames(page) == [frame] * 3, key
    for frame in range(NUM_FRAMES):
        page.locator("[data-scrub]").fill(str(frame))
        wait_for_frame(page, frame)
        assert shown_frames(page) == [frame] * 3


def test_players_stay_together_while_they_play_and_stop_on_one_frame(page_file, open_page):
    page = open_page(page_file).page
    show(page, "ball-left")
    page.locator("[data-speed]").select_option("0.5")
    page.locator(".players").focus()
    page.keyboard.press("Space")
    until(page, "document.querySelector('.stage figure').dataset.frame > 2")
    spreads = []
    for _ in range(8):
        frames = shown_frames(page)
        spreads.append(max(frames) - min(frames))
        page.wait_for_timeout(100)
    page.keyboard.press("Space")
    until(page, "document.querySelector('[data-do=play]').getAttribute('aria-label') === 'Play'")
    until(page, "[...document.querySelectorAll('.stage video')].every((v) => v.paused && !v.seeking)")
    frames = shown_frames(page)
    # One frame may arrive in one player before the others; the loop's restart takes them all to 0
    # one after the other.
    assert sorted(spreads)[len(spreads) // 2] <= 1, spreads
    assert frames == [frames[0]] * 3
    assert page.locator("[data-readout]").inner_text() == f"frame {frames[0] + 1} of {NUM_FRAMES}"


def test_a_video_that_fell_behind_is_brought_back_when_all_stop(page_file, open_page):
    page = open_page(page_file).page
    show(page, "ball-left")
    page.locator("[data-speed]").select_option("0.25")
    page.locator("[data-scrub]").fill("10")
    wait_for_frame(page, 10)
    page.locator("[data-do=play]").click()
    until(page, "document.querySelector('.stage figure').dataset.frame > 10")
    page.evaluate(f"""() => {{
      document.querySelectorAll('.stage video')[1].currentTime -= 5 / {FPS};
      document.querySelector('[data-do=play]').click();
    }}""")
    until(page, "[...document.querySelectorAll('.stage video')].every((v) => v.paused && !v.seeking)")
    frames = shown_frames(page)
    assert frames == [frames[0]] * 3 and frames[0] > 10


def test_a_video_that_ends_starts_again_with_all_others(page_file, open_page):
    page = open_page(page_file).page
    show(page, "ball-left")
    page.locator("[data-scrub]").fill(str(NUM_FRAMES - 3))
    wait_for_frame(page, NUM_FRAMES - 3)
    page.locator("[data-do=play]").click()
    until(page, "Number(document.querySelector('.stage figure').dataset.frame) < 3")
    assert all(
        not paused for paused in page.evaluate("[...document.querySelectorAll('.stage video')].map((v) => v.paused)")
    )


def test_the_difference_of_identical_videos_is_black_and_of_others_is_not(page_file, open_page):
    page = open_page(page_file).page
    show(page, IDENTICAL)
    page.locator(".players").press("d")
    until(page, "!document.querySelector('figure[data-label=rtn] canvas').hidden")
    same, other = page.evaluate(CANVAS_LEVELS, TUNED), page.evaluate(CANVAS_LEVELS, PLAIN)
    assert not same["hidden"] and same["opaque"] == 1 and same["brightest"] == 0
    assert other["brightest"] > 32
    page.locator(".players").press("d")
    assert page.evaluate(CANVAS_LEVELS, PLAIN)["hidden"]


def test_the_wipe_covers_what_its_slider_says(page_file, open_page):
    page = open_page(page_file).page
    show(page, "ball-left")
    page.locator(".players").press("w")
    for percent in (0, 25, 50, 100):
        page.locator("[data-wipe]").fill(str(percent))
        assert abs(page.evaluate(CANVAS_LEVELS, PLAIN)["opaque"] - percent / 100) < 0.03, percent
    box = page.locator("figure[data-label=rtn] .screen").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    assert page.locator("[data-wipe]").input_value() == "25"


def test_a_failed_video_says_why_in_its_place_and_in_the_list(page_file, open_page):
    page = open_page(page_file).page
    show(page, FAILED[0])
    assert "NaN in the decoded video" in page.locator(f"figure[data-label={FAILED[1]}]").inner_text()
    assert "NaN in the decoded video" in page.locator(".failures").inner_text()


def test_next_and_previous_follow_the_table(page_file, open_page):
    page = open_page(page_file).page
    page.locator("[data-search]").fill("rolls")
    show(page, "ball-left")
    page.locator(".players").press("n")
    until(page, "document.querySelector('.about').textContent.startsWith('ball-right')")
    page.locator("[data-do=previous]").click()
    until(page, "document.querySelector('.about').textContent.startsWith('ball-left')")
    assert page.locator("tr[aria-current] .where").inner_text().startswith("ball-left")


def test_a_key_outside_the_players_does_nothing_and_a_button_keeps_its_own(page_file, open_page):
    page = open_page(page_file).page
    show(page, "ball-left")
    page.locator("[data-search]").focus()
    page.keyboard.type("d w")
    assert page.locator("input[value=side]").is_checked()
    page.locator("[data-search]").fill("")
    page.locator("[data-do=forward]").press("Space")
    wait_for_frame(page, 1)
    assert page.locator("[data-do=play]").get_attribute("aria-label") == "Play"


def test_the_frame_is_announced_once_it_stands(page_file, open_page):
    page = open_page(page_file).page
    show(page, "ball-left")
    page.locator(".players").press("ArrowRight")
    wait_for_frame(page, 1)
    until(page, f"document.querySelector('[data-live]').textContent === 'frame 2 of {NUM_FRAMES}'")
    assert page.locator("[data-live]").get_attribute("aria-live") == "polite"


def test_videos_beside_the_page_play_and_are_compared_like_those_inside(evaluation, tmp_path, open_page):
    build_report([evaluation], tmp_path / "beside.html", budget_mib=0)
    seen = open_page(tmp_path / "beside.html")
    show(seen.page, "ball-left")
    seen.page.locator(".players").press("ArrowRight")
    wait_for_frame(seen.page, 1)
    seen.page.locator(".players").press("d")
    until(seen.page, "!document.querySelector('figure[data-label=rtn] canvas').hidden")
    assert all(url.startswith(tmp_path.as_uri()) for url in seen.requests)
    assert len(seen.requests) >= 4


def test_two_evaluations_on_one_page_play_apart(evaluation, tmp_path, open_page):
    other = write_evaluation(tmp_path / "other", benchmark={**evaluation_document()["benchmark"], "name": "another"})
    build_report([evaluation, other], tmp_path / "two.html")
    page = open_page(tmp_path / "two.html").page
    players = page.locator("#players-1")
    players.focus()
    until(page, "document.querySelector('#players-1 figure').dataset.frame === '0'")
    players.press("ArrowRight")
    until(page, f"document.querySelector('#players-1 [data-readout]').textContent === 'frame 2 of {NUM_FRAMES}'")
    players.press("w")
    assert page.locator("#players-1 input[value=wipe]").is_checked()
    assert page.locator("#players-0 input[value=side]").is_checked()
    assert page.locator("#players-0 [data-readout]").inner_text() == f"frame 1 of {NUM_FRAMES}"


def test_seconds_are_frames_over_the_rate(page_file, open_page):
    page = open_page(page_file).page
    show(page, "ball-left")
    page.locator("[data-scrub]").fill("8")
    wait_for_frame(page, 8)
    assert page.evaluate("document.querySelector('.stage video').currentTime") == (8 + 0.5) / FPS
