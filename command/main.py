"""`flexattn COMMAND ...`: from the words of the command line to an exit code.

The arguments are read before PyTorch is loaded; each command's file has its options and imports what it needs in `run`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Sequence

from . import bench, cache, check, diff, explain, info, show
from .failures import EXIT_CODES, FINE, INTERNAL, INTERRUPTED, MISTAKE, Failure, Mistake, is_refusal, told
from .options import Command, Parser
from .output import Output

COMMANDS: dict[str, Command] = {
    c.name: c for c in (m.COMMAND for m in (info, show, diff, explain, check, bench, cache))
}
_BROKEN_PIPE = 141  # 128 + SIGPIPE, what a shell gives a command whose reader went away


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    version = importlib.metadata.version("flexattn")  # that of the package would load PyTorch
    codes = "\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items())
    made = Parser(
        prog="flexattn",
        description="Look at masks and mods of attention, compare, test and time them.",
        epilog=f"exit codes:\n{codes}\n\n--json writes one JSON document on stdout; all else goes to stderr.",
    )
    made.add_argument("--version", action="version", version=f"flexattn {version}")
    commands = made.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=Parser)
    for command in COMMANDS.values():
        own = commands.add_parser(
            command.name, help=command.summary, description=command.description, epilog=f"example: {command.example}"
        )
        command.add(own)
        own.add_argument(
            "--json", action="store_true", help="write one JSON document on stdout, and nothing else there"
        )
        own.add_argument(
            "--debug", action="store_true", help="show the traceback of an error; also by FLEXATTN_DEBUG=1"
        )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after `flexattn`. Default: those of the process.

    Returns:
        The exit code, see `flexattn --help`. Nothing is raised but for a mistake of Python's own.

    Example:
        >>> from flexattn_command.main import main
        >>> main(["explain", "sliding_window(64)", "--section", "blocks"])
        keys of a query: kv_idx >= q_idx - 63 and kv_idx <= q_idx
        0
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if argv is None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # pictures on a terminal that has no such characters
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or os.environ.get("FLEXATTN_DEBUG", "0") not in ("0", "")
    name = next((w for w in words if not w.startswith("-")), "")
    output = Output(name, "--json" in words)
    try:
        return _run(words, name, output)
    except KeyboardInterrupt:
        output.note("interrupted")
        output.document({"error": {"kind": "interrupted", "message": "interrupted", "exit_code": INTERRUPTED}})
        return INTERRUPTED
    except BrokenPipeError:
        output.close()
        return _BROKEN_PIPE
    except SystemExit as error:
        return _tell(Mistake(f"the code that is named ends Python by sys.exit({error.code!r})"), name, output, debug)
    except Exception as error:
        return _tell(error, name, output, debug)


def _run(words: list[str], name: str, output: Output) -> int:
    if name and name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        said = f"did you mean `flexattn {close[0]}`?" if close else "flexattn --help describes each"
        raise Mistake(f"there is no command {name!r}; the commands are {', '.join(COMMANDS)}; {said}")
    try:
        arguments = parser().parse_args(words)
    except SystemExit:  # --help and --version have answered
        return FINE
    if not name:
        parser().print_help(sys.stderr)
        return MISTAKE
    with output.alone():
        return COMMANDS[name].run(arguments, output)


def _tell(error: Exception, name: str, output: Output, debug: bool) -> int:
    """Say what went wrong, on stderr and in the JSON document; the exit code."""
    prefix = f"flexattn {name}" if name in COMMANDS else "flexattn"
    if isinstance(error, Failure):
        code, kind = error.code, error.kind
    elif is_refusal(error):  # other exceptions of the user's code are mistakes only inside `reading`
        code, kind = MISTAKE, Mistake.kind
    else:
        code, kind = INTERNAL, Failure.kind
    message = told(error)
    if debug or code == INTERNAL:
        traceback.print_exception(error)
    output.note(f"{prefix}: {'error' if code != INTERNAL else 'error inside flexattn'}: {message}")
    if code != INTERNAL and not debug and (error.__cause__ is not None or not isinstance(error, Failure)):
        output.note("--debug shows where it was raised")
    output.document({"error": {"kind": kind, "message": message, "exit_code": code}})
    return code
