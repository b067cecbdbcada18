"""Running the command line in this process: the exit code, what it printed, and its JSON document."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest

from flexattn.command.main import main


class Ran(NamedTuple):
    """What came of a command."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """What --json wrote, all of stdout. A bare NaN or Infinity is refused."""

        def refuse(word: str) -> None:
            raise AssertionError(f"{word} is no JSON")

        found = json.loads(self.out, parse_constant=refuse)
        assert isinstance(found, dict) and found["schema"] == 1
        return found


class Runner:
    """Runs commands and takes what they print."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: str) -> Ran:
        self.capsys.readouterr()
        code = main(words)
        printed = self.capsys.readouterr()
        return Ran(code, printed.out, printed.err)

    def json(self, *words: str) -> dict[str, Any]:
        ran = self(*words, "--json")
        assert ran.document["command"] == words[0]
        return ran.document
