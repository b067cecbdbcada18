"""Tuned choices on disk: found again, merged by several processes, and nothing breaks where a file does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexattn import tuning_cache
from flexattn.tuning_cache import Entry, Machine

HOPPER = Machine("NVIDIA H200", "90", "3.7.1")
FACTS = {"pass": "forward", "program": ["flexattn 1", "return score score"], "D": 64, "blocks": None}
ENTRY = Entry(HOPPER, FACTS, {"BLOCK_M": 64, "num_warps": 4}, {"BLOCK_M=64": 0.25, "BLOCK_M=128": 0.5})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLEXATTN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_entry_is_found_by_its_facts_and_its_machine() -> None:
    assert tuning_cache.find(HOPPER, FACTS) is None
    tuning_cache.store(ENTRY)
    assert tuning_cache.find(HOPPER, FACTS) == ENTRY
    for machine in (HOPPER._replace(gpu="NVIDIA H100"), HOPPER._replace(triton="3.8.0")):
        assert tuning_cache.find(machine, FACTS) is None
    for name, value in {"pass": "dq", "program": [], "D": 128, "blocks": {"attended": "1/2"}}.items():
        assert tuning_cache.find(HOPPER, {**FACTS, name: value}) is None, name


def test_the_file_is_text_that_says_what_was_timed(folder: Path) -> None:
    tuning_cache.store(ENTRY)
    (path,) = folder.glob("*.json")
    assert path.name == "tuning-NVIDIA-H200-90-triton-3.7.1.json"
    (stored,) = json.loads(path.read_text())["entries"].values()
    assert stored == {"facts": FACTS, "choice": ENTRY.choice, "milliseconds": ENTRY.milliseconds}


def test_entries_are_listed_replaced_and_cleared() -> None:
    other = ENTRY._replace(machine=HOPPER._replace(gpu="NVIDIA A100", architecture="80"))
    newer = ENTRY._replace(choice={"BLOCK_M": 128, "num_warps": 8})
    for entry in (ENTRY, other, newer):
        tuning_cache.store(entry)
    assert tuning_cache.entries() == [other, newer]
    assert tuning_cache.clear() == 2
    assert tuning_cache.entries() == [] and tuning_cache.clear() == 0


BROKEN = {
    "empty": "",
    "no JSON": "{",
    "no object": "[1]",
    "no machine": '{"format": 1, "entries": {}}',
    "entries of another kind": '{"format": 1, "machine": {"gpu": "", "architecture": "", "triton": ""}, "entries": {"x": 1}}',
    "an entry without facts": '{"format": 1, "machine": {"gpu": "", "architecture": "", "triton": ""}, "entries": {"x": {}}}',
}


@pytest.mark.parametrize("text", list(BROKEN.values()), ids=list(BROKEN))
def test_a_corrupt_file_costs_one_warning_and_is_replaced(text: str, folder: Path) -> None:
    tuning_cache.store(ENTRY)
    (path,) = folder.glob("*.json")
    path.write_text(text)
    with pytest.warns(UserWarning, match=r"tuning-.*\.json is ignored: \w+Error: .*; delete it") as warned:
        assert tuning_cache.find(HOPPER, FACTS) is None
        assert tuning_cache.entries() == []
    assert len(warned) == 1
    tuning_cache.store(ENTRY)
    assert tuning_cache.find(HOPPER, FACTS) == ENTRY


def test_a_file_of_another_format_is_not_read(folder: Path) -> None:
    tuning_cache.store(ENTRY)
    (path,) = folder.glob("*.json")
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    assert tuning_cache.find(HOPPER, FACTS) is None


def test_an_entry_whose_facts_were_edited_does_not_count(folder: Path) -> None:
    tuning_cache.store(ENTRY)
    (path,) = folder.glob("*.json")
    path.write_text(path.read_text().replace('"D": 64', '"D": 32'))
    assert tuning_cache.find(HOPPER, FACTS) is None


def test_a_folder_that_cannot_be_written_costs_one_warning(folder: Path) -> None:
    folder.write_text("a file in its place")
    with pytest.warns(UserWarning, match="is not kept on disk, since .* set FLEXATTN_CACHE_DIR") as warned:
        tuning_cache.store(ENTRY)
        tuning_cache.store(ENTRY)
    assert len(warned) == 1


WRITER = """
import sys
from flexattn.tuning_cache import Entry, Machine, store
machine = Machine("NVIDIA H200", "90", "3.7.1")
print("ready", flush=True)
sys.stdin.readline()
for n in range(40):
    store(Entry(machine, {"writer": sys.argv[1], "n": n}, {"BLOCK_M": n}, {}))
"""


def test_two_processes_that_write_at_once_keep_the_entries_of_both(folder: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": dict(os.environ)}
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, name], **pipes) for name in "ab"]  # type: ignore[call-overload]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    found = {(e.facts["writer"], e.facts["n"]) for e in tuning_cache.entries()}
    assert found == {(name, n) for name in "ab" for n in range(40)}
    assert {path.suffix for path in folder.iterdir()} == {".json", ""}, "no temporary file is left"


def test_the_folder_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tuning_cache.folder() == tmp_path / "cache"
    monkeypatch.delenv("FLEXATTN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning_cache.folder() == tmp_path / "xdg" / "flexattn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning_cache.folder() == Path.home() / ".cache" / "flexattn"
