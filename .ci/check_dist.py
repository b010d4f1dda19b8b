"""Check that the wheel and the source distribution in a folder hold what users need."""

import sys
import tarfile
import zipfile
from pathlib import Path

NEEDED = (
    "tempoquant/py.typed", "tempoquant/recipes/default.toml", "tempoquant/report/page.html",
    "tempoquant/tiny/weights/model_index.json", "tempoquant_command/__init__.py",
)  # fmt: skip
SOURCE_ALONE = ("LICENSE", "CITATION.cff", "CHANGELOG.md", "Makefile", "tests/conftest.py", "docs/method.md")
MAX_MIB = 100
"""The package index's own limit for a file."""


def names_in(file: Path) -> set[str]:
    """Return the names in an archive, without the folder that a source distribution puts all in."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel:
            return set(wheel.namelist())
    with tarfile.open(file) as source:
        return {name.partition("/")[2].removeprefix("src/") for name in source.getnames()}


def main(folder: Path) -> None:
    """Check both archives; exit with what is missing."""
    [wheel], [source] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    if not wheel.name.endswith("-py3-none-any.whl"):
        sys.exit(f"{wheel.name} is for one platform, and nothing in the package is")
    for file, needed in ((wheel, NEEDED), (source, (*NEEDED, *SOURCE_ALONE))):
        names, mib = names_in(file), file.stat().st_size / 2**20
        if missing := [name for name in needed if name not in names]:
            sys.exit(f"{file.name} lacks {', '.join(missing)}")
        if stray := [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".env"))]:
            sys.exit(f"{file.name} holds {stray[0]}")
        if mib > MAX_MIB:
            sys.exit(f"{file.name} has {mib:.0f} MiB, and the package index takes {MAX_MIB}")
        print(f"{file.name}: {len(names)} files, {mib:.1f} MiB")


main(Path(sys.argv[1]))
