"""Write the tables of docs/compile.md: features from the records in docs/features, one for each version of PyTorch, and
the private names of PyTorch from `flexattn.codegen.private`.

A record is written by the tests:   scripts/test tests/cpu tests/compiled --features docs/features/torch-2.13.0.json
The tables from the records:        python scripts/feature_table.py
"""

from __future__ import annotations

import json
from pathlib import Path

from flexattn.codegen.private import USES

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, FOLDER = DOCS / "compile.md", DOCS / "features"


def records() -> list[dict]:
    """The records, by version."""
    found = [json.loads(path.read_text()) for path in FOLDER.glob("torch-*.json")]
    return sorted(found, key=lambda record: [int(part) for part in record["torch"].split(".")])


def cell(counts: dict[str, int] | None) -> str:
    """What the tests of a feature say."""
    if counts is None:
        return ""
    if counts["failed"]:
        return f"**no**: {counts['failed']} of {counts['failed'] + counts['passed']} tests fail"
    if not counts["passed"]:
        return "not run"
    return f"yes ({counts['passed']})"


def table() -> str:
    """Features and versions, in Markdown."""
    made = records()
    features = sorted({name for record in made for name in record["features"]})
    lines = ["| feature | " + " | ".join(f"torch {record['torch']}" for record in made) + " |"]
    lines.append("|---" * (len(made) + 1) + "|")
    for name in features:
        lines.append(f"| {name} | " + " | ".join(cell(record["features"].get(name)) for record in made) + " |")
    return "\n".join(lines)


def private_names() -> str:
    """Private names of PyTorch, in Markdown."""
    lines = ["| name | needed for | its absence is noticed | and then |", "|---|---|---|---|"]
    for use in USES.values():
        when = "at import" if use.when == "import" else f"by `{use.when}`"
        lines.append(f"| `{use.name}` | {use.purpose} | {when} | {use.instead} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its tables as they should be."""
    for name, made in (("features", table()), ("private names", private_names())):
        start, end = f"<!-- {name}: scripts/feature_table.py -->\n", f"<!-- end of {name} -->"
        head, rest = text.split(start)
        text = f"{head}{start}{made}\n{end}{rest.split(end, 1)[1]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
