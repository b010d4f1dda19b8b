"""A browser's view of a page: frames read from pixels, rows, and waiting for them."""

import time

from tests.report.evaluation_folder import NUM_BITS, NUM_FRAMES, SQUARE

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
    """Wait until a JavaScript expression is true; Playwright's own waiting needs eval, which the
    page forbids.
    """
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
    """Return the ids of the items in the table, in its order."""
    return [text.split(" · ")[0] for text in page.locator(".item-table .where").all_inner_texts()]
