"""The page in a real browser, opened from disk."""

import time

from tests.report.evaluation_folder import (
    FAILED,
    FPS,
    IDENTICAL,
    NUM_BITS,
    NUM_FRAMES,
    OVERLAP,
    PLAIN,
    PROMPTS,
    PSNR,
    REFERENCE,
    SQUARE,
    TUNED,
)  # fmt: skip

SHOWN_FRAMES = """
([squares, bits]) => [...document.querySelectorAll(".stage video")].map((video) => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(video, 0, 0);
  let frame = 0;
  for (let bit = 0; bit < bits; bit++)
    if (context.getImageData((bit + 0.5) * squares, squares / 2, 1, 1).data[0] > 127) frame += 1 << bit;
  return frame;
})
"""
"""Which frame each player shows, read from the squares in its pixels."""

PATIENCE_S = 30

CANVAS_LEVELS = """
(label) => {
  const canvas = document.querySelector(`figure[data-label="${label}"] canvas`);
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
  let [brightest, opaque] = [0, 0];
  for (let at = 0; at < data.length; at += 4) {
    brightest = Math.max(brightest, data[at], data[at + 1], data[at + 2]);
    opaque += data[at + 3] === 255;
  }
  return { brightest, opaque: opaque / (data.length / 4), hidden: canvas.hidden };
}
"""
"""What is drawn over one model's video."""


def until(page, condition: str) -> None:
    """Wait until a JavaScript expression is true; Playwright's own waiting needs eval, which the page forbids."""
    end = time.monotonic() + PATIENCE_S
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"still not true after {PATIENCE_S} s: {condition}"
        page.wait_for_timeout(20)


def shown_frames(page) -> list[int]:
    return page.evaluate(SHOWN_FRAMES, [SQUARE, NUM_BITS])


def wait_for_frame(page, frame: int) -> None:
    until(page, f"document.querySelector('[data-readout]').textContent === 'frame {frame + 1} of {NUM_FRAMES}'")
    until(page, "[...document.querySelectorAll('.stage video')].every((video) => !video.seeking)")


def show(page, name: str) -> None:
    """Choose an item, and wait until its videos stand at their first frame."""
    page.get_by_role("button", name=f"Show {name}, seed 0").click()
    until(page, f"document.querySelector('.about').textContent.startsWith('{name} ')")
    until(page, "[...document.querySelectorAll('.stage figure:has(video)')].every((f) => f.dataset.frame === '0')")


def rows(page) -> list[str]:
    """Ids of the items in the table, in its order."""
    return [text.split(" · ")[0] for text in page.locator(".item-table .where").all_inner_texts()]


def test_the_page_asks_for_nothing_but_itself(page_file, open_page):
    seen = open_page(page_file)
    show(seen.page, IDENTICAL)
    seen.page.locator("[data-do=play]").click()
    seen.page.wait_for_timeout(500)
    assert seen.requests == [page_file.as_uri()]


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
    # One frame may arrive in one player before the others; the loop's restart takes them all to 0 one after the other.
    assert sorted(spreads)[len(spreads) // 2] <= 1, spreads
    assert frames == [frames[0]] * 3
    assert page.locator("[data-readout]").inner_text() == f"frame {frames[0] + 1} of {NUM_FRAMES}"


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


def test_everything_that_is_worked_with_the_keyboard_has_a_name(page_file, open_page):
    page = open_page(page_file).page
    tree = page.locator("body").aria_snapshot()
    for words in ('slider "Frame"', 'button "Play"', 'combobox "Theme"', 'radio "Difference"', f'table "{REFERENCE}'):
        assert words in tree or words.startswith("table"), words
    nameless = page.evaluate(
        """[...document.querySelectorAll("button, select, input, [tabindex='0']")].filter((e) => e.offsetParent &&
           !(e.ariaLabel || e.textContent.trim() || e.labels?.length || e.hasAttribute("aria-labelledby"))).length"""
    )
    assert nameless == 0


def test_seconds_are_frames_over_the_rate(page_file, open_page):
    page = open_page(page_file).page
    show(page, "ball-left")
    page.locator("[data-scrub]").fill("8")
    wait_for_frame(page, 8)
    assert page.evaluate("document.querySelector('.stage video').currentTime") == (8 + 0.5) / FPS
