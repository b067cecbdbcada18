"""Files of results: a machine and its records."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]


def save(out: Path, machine: dict[str, Any], records: list[Record], table: str | None = None) -> None:
    """Write what was measured so far, and its table beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"machine": machine, "records": records}, indent=1) + "\n")
    os.replace(unfinished, out)  # a run that is killed leaves whole files
    if table is not None:
        out.with_suffix(".md").write_text(table)


class Content(NamedTuple):
    machine: dict[str, Any]
    records: list[Record]


def load(path: Path) -> Content:
    """What `save` wrote; nothing where there is no such file."""
    if not path.exists():
        return Content({}, [])
    content = json.loads(path.read_text())
    return Content(content["machine"], content["records"])
