"""`flexattn cache list|clear`: the configurations that AUTOTUNE chose by timing."""

from __future__ import annotations

import argparse
import sys

from .failures import FINE, Mistake
from .options import Command, one_of
from .output import Output, table


def add(parser: argparse.ArgumentParser) -> None:
    """Which of the two, and --yes."""
    parser.add_argument(
        "action", type=one_of(("list", "clear")), metavar="list|clear", help="show the entries, or delete them"
    )
    parser.add_argument("--yes", action="store_true", help="clear without asking")


def run(arguments: argparse.Namespace, output: Output) -> int:
    """List or clear."""
    return _clear(arguments.yes, output) if arguments.action == "clear" else _list(output)


def _list(output: Output) -> int:
    from flexattn import tuning_cache

    found, folder = tuning_cache.entries(), str(tuning_cache.folder())
    output.document({"folder": folder, "entries": found})
    output.line(f"{_counted(len(found))} in {folder}")
    for entry in found:
        machine = entry.machine
        output.line(f"\n{machine.gpu}, architecture {machine.architecture}, Triton {machine.triton}")
        fastest = min(entry.milliseconds.values(), default=None)
        rows = [("  facts", _pairs(entry.facts)), ("  choice", _pairs(entry.choice))]
        if fastest is not None:
            rows.append(("  time", f"{fastest:.4g} ms, the fastest of {len(entry.milliseconds)}"))
        for line in table(rows):
            output.line(line)
    return FINE


def _clear(yes: bool, output: Output) -> int:
    from flexattn import tuning_cache

    count, folder = len(tuning_cache.entries()), str(tuning_cache.folder())
    if count and not yes:
        if output.as_json or not sys.stdin.isatty():
            raise Mistake(
                f"clear would delete {_counted(count)} in {folder}, and there is no terminal to ask on; write "
                "flexattn cache clear --yes"
            )
        print(f"Delete {_counted(count)} in {folder}? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            output.line("nothing deleted")
            return FINE
    deleted = tuning_cache.clear()
    output.document({"folder": folder, "deleted": deleted})
    output.line(f"deleted {_counted(deleted)} in {folder}")
    return FINE


def _counted(count: int) -> str:
    return f"{count} tuned configuration{'' if count == 1 else 's'}"


def _pairs(mapping: object) -> str:
    return ", ".join(f"{k}={v}" for k, v in mapping.items()) if isinstance(mapping, dict) else str(mapping)


COMMAND = Command(
    "cache",
    "list or delete tuned configurations",
    "List or delete the configurations that kernel_options={'AUTOTUNE': True} chose by timing.",
    "flexattn cache clear --yes",
    add,
    run,
)
