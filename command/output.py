"""What a command writes: its result on stdout, as text or as one JSON document, and all else on stderr."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

from .failures import Unavailable

SCHEMA = 1  # of the JSON documents; a key that changes its meaning, or goes, makes it the next number
_NARROWEST, _WIDEST = 40, 160
_PATIENCE = 10.0  # seconds before progress is told where nobody may be watching


class Output:
    """The streams of one command.

    Args:
        command: its name, part of the JSON document.
        as_json: write a JSON document in place of text.
    """

    def __init__(self, command: str, as_json: bool) -> None:
        self.command, self.as_json = command, as_json
        self._stdout = sys.stdout  # with --json, what others print goes elsewhere
        self._is_open = True
        self._started = time.monotonic()

    def line(self, text: str = "") -> None:
        """A line of the result, unless it is JSON."""
        if not self.as_json:
            self._write(text)

    def document(self, content: Mapping[str, Any]) -> None:
        """The result for --json: one document, whose first keys are `schema` and `command`."""
        if self.as_json:
            whole = {"schema": SCHEMA, "command": self.command, **content}
            self._write(json.dumps(plain(whole), allow_nan=False))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, with --json, nothing but the document gets to stdout: what others write there goes to stderr."""
        if not self.as_json:
            yield
            return
        with redirect_stdout(sys.stderr):
            try:
                theirs, ours = self._stdout.fileno(), sys.stderr.fileno()
            except (OSError, ValueError):  # no files, as in a test
                yield
                return
            stdout, kept = self._stdout, os.dup(theirs)
            stdout.flush()
            os.dup2(ours, theirs)  # for what does not go through Python's stdout
            try:
                with os.fdopen(kept, "w", encoding="utf-8", closefd=False) as self._stdout:
                    yield
            finally:
                self._stdout = stdout
                os.dup2(kept, theirs)
                os.close(kept)

    def close(self) -> None:
        """Let go of a stdout that takes nothing any more, so that Python does not complain as it ends."""
        self._is_open = False
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stdout.fileno())

    def _write(self, text: str) -> None:
        if not self._is_open:
            return
        try:
            print(text, file=self._stdout, flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            self.close()
            raise Unavailable(f"the result cannot be written to stdout: {error.strerror}") from None

    def progress(self, text: str) -> None:
        """What is being done, on stderr: for somebody who watches a terminal, or where it takes long."""
        if sys.stderr.isatty() or time.monotonic() - self._started > _PATIENCE:
            print(f"{text} ...", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A warning, on stderr."""
        print(text, file=sys.stderr, flush=True)


def width() -> int:
    """Characters of a line: the terminal's, or 80 where there is none."""
    if not sys.stdout.isatty():
        return 80
    return max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size().columns))


def plain(value: Any) -> Any:
    """A value as JSON has it: mappings and sequences of numbers, strings, booleans and null. A number that is not finite is
    null, and anything else its `str`.

    Example:
        >>> plain({"ms": (1.5, float("nan")), "mask": object})
        {'ms': [1.5, None], 'mask': "<class 'object'>"}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Sequence):
        return [plain(v) for v in value]
    return str(value)


def table(rows: Sequence[Sequence[str]], numbers: frozenset[int] = frozenset()) -> list[str]:
    """Lines of columns; those in `numbers` end at the right."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    made = (
        "  ".join(c.rjust(w) if i in numbers else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return [line.rstrip() for line in made]
