"""What ends a command early, each kind with its exit code."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

# Of the user's mod; by name, as the library need not have been loaded.
_REFUSALS = ("TraceError", "KernelError", "ReachError")
_NO_MEMORY = ("MemoryError", "OutOfMemoryError")
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep

FINE, DIFFERS, MISTAKE, UNAVAILABLE, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 4, 130

EXIT_CODES = {
    FINE: "fine: equal, or all checks passed",
    DIFFERS: "the masks differ, or a check failed",
    MISTAKE: "a mistake in the arguments, or in the function that they name",
    UNAVAILABLE: "this machine cannot do it: no GPU, or an optional part is missing",
    INTERNAL: "an error inside flexattn",
    INTERRUPTED: "interrupted by Ctrl-C",
}


class Failure(Exception):
    """A command cannot go on. The text is for the user; `code` is what the process ends with.

    Attributes:
        kind: the same as a word, for --json.
    """

    code = INTERNAL
    kind = "internal"


class Mistake(Failure):
    """The arguments, or what they name, are not what the command takes."""

    code = MISTAKE
    kind = "arguments"


class Unavailable(Failure):
    """What was asked cannot be done on this machine, or with what is installed."""

    code = UNAVAILABLE
    kind = "unavailable"


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Inside, the user's own code runs, or what the user gave is checked: an exception is a `Mistake` about `what`."""
    try:
        yield
    except Failure:
        raise
    except Exception as error:
        if type(error).__name__ in _NO_MEMORY or "can't allocate memory" in str(error):
            raise Unavailable(
                f"{what}: there is not enough memory; choose a smaller shape, or larger blocks"
            ) from error
        where = "" if _is_told(error) else _place(error)
        raise Mistake(f"{what}: {told(error)}{where}") from error


def raised(error: BaseException) -> str:
    """An exception of the user's own code in words: its name, its text, and where it was raised."""
    if is_refusal(error) or isinstance(error, Failure):
        return str(error)
    text = str(error).strip()
    return f"{type(error).__name__}{f': {text}' if text else ''}{_place(error)}"


def told(error: BaseException) -> str:
    """An exception in words: its text, after its name unless the text is made for people."""
    text, name = str(error).strip(), type(error).__name__
    if _is_told(error):
        return text or name
    return f"{name}: {text}" if text else name


def is_refusal(error: BaseException) -> bool:
    """Whether the library refuses a mod that it was given, in a text that says which."""
    return any(c.__name__ in _REFUSALS for c in type(error).__mro__)


def _is_told(error: BaseException) -> bool:
    """Whether the text of an exception is made for people."""
    return isinstance(error, (AssertionError, Failure)) or type(error).__name__ == "ValueError" or is_refusal(error)


def _place(error: BaseException) -> str:
    """ ", at FILE:LINE" of the innermost frame that is the user's."""
    import flexattn
    from flexattn.codegen.diagnose import is_inside

    others = (
        _HERE,
        sysconfig.get_paths()["stdlib"] + os.sep,
        *(f"{folder}{os.sep}" for folder in flexattn.__path__),
        "<",
    )
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not (is_inside(f.filename) or f.filename.startswith(others))]
    own = [f for f in own if "site-packages" not in f.filename]
    return f", at {os.path.basename(own[-1].filename)}:{own[-1].lineno}" if own else ""
