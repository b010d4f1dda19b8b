"""Chromium, as Debian packages it, driven by Playwright; nothing is downloaded by Playwright
itself.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

NAMES = ("chromium", "chromium-browser")
NEEDED = "TEMPOQUANT_NEEDS_CHROMIUM"
"""Environment variable that .ci/run sets: there, a missing browser is a failure."""


def chromium() -> str:
    """Return the browser's path. Without one the test is skipped, or fails if NEEDED is set."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        reason = "there is no Chromium here: run .ci/install-chromium (make browser)"
        if os.environ.get(NEEDED):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@contextmanager
def launched() -> Iterator[Browser]:
    """Launch a headless Chromium."""
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


class Watched:
    """A page whose console and requests are remembered.

    Attributes:
        complaints: console errors and warnings, and exceptions that nothing caught.
        requests: addresses, those inside the page (data:, blob:) left out.
    """

    def __init__(self, context: BrowserContext) -> None:
        self.page: Page = context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", self._remember_console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._remember_request(request.url))

    def _remember_console(self, message: object) -> None:
        if message.type in ("error", "warning"):  # type: ignore[attr-defined]
            self.complaints.append(message.text)  # type: ignore[attr-defined]

    def _remember_request(self, url: str) -> None:
        if not url.startswith(("data:", "blob:")):
            self.requests.append(url)
