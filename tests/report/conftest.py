"""One evaluation, one page and one browser for all tests of the report."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tempoquant.report.build import build_report
from tests.report.evaluation_folder import write_evaluation


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that no test changes."""
    return write_evaluation(tmp_path_factory.mktemp("evaluation") / "out")


@pytest.fixture(scope="session")
def page_file(evaluation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return its page, everything embedded."""
    output = tmp_path_factory.mktemp("page") / "report.html"
    build_report([evaluation], output)
    return output


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """Start Chromium once a module: Playwright's event loop should not outlive the tests that need
    it.
    """
    pytest.importorskip("playwright", reason="Playwright is in the extra `test`")
    from tests.report.browser import launched

    with launched() as running:
        yield running


@pytest.fixture
def open_page(browser) -> Iterator[Callable]:
    """Open a page from disk in a fresh profile, and check afterwards that it logged no error."""
    from tests.report.browser import Watched

    contexts, watched = [], []

    def open_(file: Path, *, height: int = 900, width: int = 1280, **options):
        context = browser.new_context(viewport={"height": height, "width": width}, **options)
        contexts.append(context)
        seen = Watched(context)
        watched.append(seen)
        seen.page.goto(file.as_uri())
        seen.page.wait_for_selector("html[data-ready]")
        return seen

    yield open_
    for context in contexts:
        context.close()
    assert [seen.complaints for seen in watched if seen.complaints] == []
