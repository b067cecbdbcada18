"""Choices made by timing, kept on disk: one JSON file for each GPU and version of Triton, an entry for each kind of call.

The folder is `$FLEXATTN_CACHE_DIR`, or else `flexattn` in the user's cache folder. An entry says in clear what was timed,
what was chosen, and how long each candidate took. Several processes may write: each merges its entry into the file under
a lock. A file that cannot be read or written costs a warning, and the choice is made anew.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from .notices import say_once

FORMAT = 1
PREFIX = "tuning-"
REMEDY = "delete it, or set FLEXATTN_CACHE_DIR to a folder that can be written"


class Machine(NamedTuple):
    """Where times were taken: the GPU's name and architecture ("90", "gfx942"), and the version of Triton."""

    gpu: str
    architecture: str
    triton: str


class Entry(NamedTuple):
    """A choice.

    Attributes:
        machine: where it was made.
        facts: what it depends on.
        choice: the parts of a configuration by name, or which of several alternatives.
        milliseconds: the median time of each candidate.
    """

    machine: Machine
    facts: Mapping[str, Any]
    choice: Mapping[str, Any]
    milliseconds: Mapping[str, float]


def folder() -> Path:
    """Where the files are: `$FLEXATTN_CACHE_DIR`, `$XDG_CACHE_HOME/flexattn`, or `~/.cache/flexattn`."""
    own = os.environ.get("FLEXATTN_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexattn"


def digest(facts: Mapping[str, Any]) -> str:
    """The key of an entry."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def find(machine: Machine, facts: Mapping[str, Any]) -> Entry | None:
    """The entry with these very facts, if there is one."""
    key = digest(facts)
    entry = _read(_path(machine)).get(key)
    return entry if entry is not None and digest(entry.facts) == key else None


def store(entry: Entry) -> None:
    """Add an entry to its file, in place of an older one with the same facts."""
    path = _path(entry.machine)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent / f"{PREFIX}lock"):
            found = _read(path) | {digest(entry.facts): entry}
            _write(path, entry.machine, found)
    except OSError as error:
        say_once(f"the tuned configuration is not kept on disk, since {path} cannot be written: {error}; {REMEDY}")


def entries() -> list[Entry]:
    """All entries of all files, ordered by machine."""
    return [entry for path in _files() for entry in _read(path).values()]


def clear() -> int:
    """Delete all files. The number of entries that they had."""
    count = len(entries())
    for path in _files():
        path.unlink(missing_ok=True)
    return count


def _files() -> list[Path]:
    return sorted(folder().glob(f"{PREFIX}*.json"))


def _path(machine: Machine) -> Path:
    words = "-".join((machine.gpu, machine.architecture, "triton", machine.triton))
    return folder() / f"{PREFIX}{re.sub(r'[^A-Za-z0-9.]+', '-', words)}.json"


def _read(path: Path) -> dict[str, Entry]:
    """The entries of a file by key; none if it does not exist or makes no sense."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return {}
        machine = Machine(**content["machine"])
        return {key: Entry(machine, **entry) for key, entry in content["entries"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        say_once(f"the file of tuned configurations {path} is ignored: {type(error).__name__}: {error}; {REMEDY}")
        return {}


def _write(path: Path, machine: Machine, found: Mapping[str, Entry]) -> None:
    own = {key: {n: v for n, v in entry._asdict().items() if n != "machine"} for key, entry in found.items()}
    text = json.dumps({"format": FORMAT, "machine": machine._asdict(), "entries": own}, indent=1)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.replace(temporary, path)  # so that a reader sees the old file or the new one, never a part
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Inside, no other process merges. Where files have no locks the last writer wins, and some choice is made twice."""
    with open(path, "w") as file:
        with suppress(ImportError, OSError):
            fcntl = importlib.import_module("fcntl")  # not on Windows
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
