"""Rules for docstrings: a verb first, no word that leaves its subject out, no phrase to decode.

Ruff holds their width (W505).
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.test_prose_rules import BANNED, ROOT, name_of

CODE = sorted(path for folder in ("src", "benchmarks", "training", "comfyui") for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
VERBS = frozenset(
    """
    Accept Add Adopt Allocate Allow Answer Append Apply Ask Assert Attend Average Begin Bound Build
    Call Change Check Choose Claim Classify Collect Combine Commit Compare Compile Complete Compute
    Convert Copy Count Create Decide Declare Decode Describe Direct Do Draw Drop Embed Enable Encode
    End Enlarge Estimate Evaluate Exchange Exit Expand Factor Fetch Files Fill Find Finish Fit Flip
    Flush Follow Free Generate Give Group Hash Have Hold Ignore Import Insert Install Interpolate
    Invert Join Judge Keep Kill Label Launch Lay Leave Let Limit List Load Log Look Make Map Mark
    Measure Merge Mix Move Multiply Name Names Normalize Note Observe Offload Open Order Own Pack
    Paint Parse Place Plan Plant Predict Prepare Pretend Print Project Promote Propagate Publish Put
    Quantize Queue Raise Read Rebuild Recommend Record Refuse Register Relay Release Remove Rename
    Render Reorder Repeat Replace Replay Request Reset Reshape Restore Return Rewrite Rotate Round
    Run Save Say Scale Score Search Select Send Serve Set Show Shrink Silence Skip Sort Split Start
    Store Sum Summarize Suspend Take Tell Time Trace Train Try Turn Unpack Update Upload Wait Warn
    Watch Wrap Write Yield
    """.split()  # noqa: SIM905 (a list of words that anyone may lengthen)
)
DANGLING = re.compile(
    r"(?:As|At|Beside|Beyond|By|For|From|How|In|Like|Of|On|Such|Than|That|Those|To|Under|What"
    r"|Whatever|When|Where|Whether|Which|Who|Whoever|Whose|Why|With|Within|Without)\b"
)
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Docstring(NamedTuple):
    """One docstring, and whether it belongs to a function that is no test."""

    where: str
    text: str
    is_of_function: bool


def docstrings_of(path: Path) -> Iterator[Docstring]:
    """Yield every docstring of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        text = ast.get_docstring(node) if isinstance(node, DEFINITIONS) else None
        if text:
            name = getattr(node, "name", "the module")
            is_of_function = isinstance(node, FUNCTIONS) and not name.startswith("test_")
            yield Docstring(f"{name_of(path)}: {name}: {text.splitlines()[0]}", text, is_of_function)


@functools.cache
def all_docstrings() -> list[Docstring]:
    """Return every docstring that these rules cover."""
    return [docstring for path in (*CODE, *TESTS) for docstring in docstrings_of(path)]


def first_word(text: str) -> str:
    return text.split()[0].rstrip(".,;:")


def test_docstrings_of_functions_begin_with_a_verb():
    """A new verb is one more word of VERBS."""
    assert [each.where for each in all_docstrings() if each.is_of_function and first_word(each.text) not in VERBS] == []


def test_no_docstring_begins_with_a_word_that_leaves_its_subject_out():
    assert [each.where for each in all_docstrings() if DANGLING.match(each.text)] == []


def test_docstrings_use_no_phrase_that_a_reader_must_decode():
    found = [
        f"{each.where} ({match[0]})"
        for each in all_docstrings()
        if (match := BANNED.search(" ".join(each.text.split())))
    ]
    assert found == []
