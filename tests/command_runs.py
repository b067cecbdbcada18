"""Running the command line in this process: the exit code, what it printed, and its JSON document."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flexattn_command.main import main

MODULE = """
import torch
print("a module that prints")
slopes = torch.tensor([0.5, 0.25])
ids = torch.tensor([0, 0, 1, 1, 1])


def alibi(score, b, h, q_idx, kv_idx):
    return score + slopes[h] * (kv_idx - q_idx)


def cubic(score, b, h, q_idx, kv_idx):
    return score * score * score


def per_head(b, h, q_idx, kv_idx):
    return kv_idx <= h


def same(b, h, q_idx, kv_idx):
    return ids[q_idx] == ids[kv_idx]


def window(size):
    return lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < size)


def branches(b, h, q_idx, kv_idx):
    if q_idx > kv_idx:
        return q_idx == 0
    return q_idx == kv_idx
"""


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


def runner(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch, modules: Mapping[str, str]
) -> Runner:
    """Commands that run in a folder with these modules."""
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("FLEXATTN_DEBUG", raising=False)
    monkeypatch.setenv("FLEXATTN_CACHE_DIR", str(folder / "cache"))
    return Runner(capsys)
