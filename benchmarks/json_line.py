"""A benchmark's result for programs: one line of JSON, printed, and appended to a file on
request.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def publish(record: Mapping[str, Any], file: Path | None = None) -> None:
    """Print a record as the last line, and append it to a file if one is given (`--json`)."""
    line = json.dumps(record)
    print(line, flush=True)
    if file is not None:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
