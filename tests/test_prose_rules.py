"""Rules for the texts that people read: lines that fit a screen, and no phrase that a reader must
decode.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from tempoquant.recipe import Recipe, tomllib

ROOT = Path(__file__).parent.parent
WIDTH = 100
GENERATED = {"docs/cli.md"}  # by `make docs`
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "training/*.md", "comfyui/*.md")
    for path in ROOT.glob(pattern)
    if path.relative_to(ROOT).as_posix() not in GENERATED
)
COMMENTED = sorted((ROOT / "src/tempoquant/recipes").glob("*.toml"))
BANNED = re.compile(
    r"""
      \bin\ silence\b                     # silently
    | \bgo(?:es)?\ on\ (?:where|from|at|there)\b | \bcommand\ goes\ on\b   # resumes
    | \bheld\ (?:to|against)\b            # compared with
    | \b(?:taken?|takes)\ off\b           # subtracted, removed
    | \ball\ but\ silent\b                # almost silent
    | \bas\ people\ have\ them\b
    | \bnobody\ must\b | \bcarry\ neither\b
    | \bknows?\ nothing\ of\b             # does not know
    | \bwhoever\b | \bwhosoever\b         # anyone who, if you
    | \bwhat\ (?:\w+\ )?knows\ of\b
    | \bby\ its\ own\ code\b
    | \bforet(?:ell|old)                  # predict
    | \bof\ no\ account\b | \bwithout\ a\ word\b | \bis\ for\ a\ \w+\ to\ (?:say|judge)\b
    | [.!?]\ (?:Of\ (?:their|its|whose|them|it)|Those\ of|By\ [a-z]+,\ to)\b
    """,
    re.IGNORECASE | re.VERBOSE,
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def sentences_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a page that are neither code nor a table nor a front matter."""
    fenced, previous, in_front = False, "", False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if number == 1 and line == "---":
            in_front = True
        elif in_front:
            in_front = line != "---"
        elif line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not (line.startswith("    ") and previous in ("", "code")):
            if not line.lstrip().startswith(("|", "![", "<!--")):
                yield number, line
            previous = line
            continue
        previous = "code" if line.startswith("    ") and previous in ("", "code") else previous and line
    assert not fenced, name_of(path)


def without_addresses(line: str) -> str:
    return re.sub(r"https?://\S+", "", re.sub(r"\]\([^)]*\)", "]", line))


def test_there_are_pages():
    assert len(PAGES) > 20 and len(COMMENTED) > 5


def test_lines_of_pages_fit_a_screen():
    """Code, tables and addresses may be wider."""
    long = [
        f"{name_of(path)}:{number} has {len(line)} characters"
        for path in PAGES
        for number, line in sentences_of(path)
        if len(without_addresses(line)) > WIDTH
    ]
    long += [
        f"{name_of(path)}:{number}"
        for path in COMMENTED
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if len(line) > WIDTH
    ]
    assert long == []


def test_pages_use_no_phrase_that_a_reader_must_decode():
    found = [
        f"{name_of(path)}:{number}: {match[0]}"
        for path in PAGES
        for number, line in sentences_of(path)
        if (match := BANNED.search(line))
    ]
    assert found == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def rows_under(page: str, heading: str) -> list[list[str]]:
    """Return the rows of the table in one section of a page whose first cell is code."""
    section = page.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = (line for line in section.splitlines() if line.startswith("| `"))
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_of_recipes_shows_the_built_in_ones_and_settings_that_exist():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    shown = {name: (format, rank) for name, format, rank, _ in rows_under(page, "Built-in recipes")}
    recipes = {path.stem: Recipe.load(path.stem) for path in COMMENTED}
    assert shown == {name: (recipe.format, str(recipe.rank)) for name, recipe in recipes.items()}
    settings = {name.strip("`") for row in rows_under(page, "Settings") for name in row[0].split(", ")}
    used = {name for path in COMMENTED for name in tomllib.loads(path.read_text(encoding="utf-8"))}
    assert used <= settings == {field.name for field in dataclasses.fields(Recipe)}
