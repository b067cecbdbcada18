"""From an exception inside a user's mod to the words a user can act on: which file and line, and which construct."""

from __future__ import annotations

import ast
import linecache
import os
from types import TracebackType

import torch

from .errors import TraceError

_OURS = os.path.dirname(os.path.abspath(__file__))
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))

_ONE_ANSWER = "The kernel evaluates a whole tile at once, so the {} has no single answer."


def locate(error: TraceError, traceback: TracebackType | None, role: str, fallback: str) -> TraceError:
    """`error` with the user's file and line, and with the construct that caused it where that can be told."""
    filename, line = None, 0
    while traceback is not None:
        name = traceback.tb_frame.f_code.co_filename
        inside = os.path.abspath(name).startswith((_OURS + os.sep, _TORCH + os.sep)) or name.startswith(
            "<eval_with_key>"
        )
        if not inside:
            filename, line = name, traceback.tb_lineno
        elif filename is not None and os.path.abspath(name).startswith(_OURS + os.sep):
            break
        traceback = traceback.tb_next
    if filename is None or os.path.abspath(filename).startswith(os.path.dirname(_OURS) + os.sep + "flexattn"):
        return error.at(f"{role} {fallback}", "")
    source = linecache.getline(filename, line).strip()
    if "`__bool__`" in error.what:
        error = _explain_truth(filename, line)
    return error.at(f"{role} at {filename}:{line}", source)


def _explain_truth(filename: str, line: int) -> TraceError:
    """Which construct asked a traced tensor for its truth, and what to write in its place."""
    node = _innermost(filename, line)
    match node:
        case ast.If(test=test) | ast.While(test=test):
            kind = "if" if isinstance(node, ast.If) else "while"
            example = f'torch.where({ast.unparse(test)}, score, -float("inf"))'
            return TraceError(f"uses `{kind}` on a traced value", _ONE_ANSWER.format("branch"), example)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            example = f"torch.where({ast.unparse(test)}, {ast.unparse(body)}, {ast.unparse(orelse)})"
            return TraceError("uses `if` on a traced value", _ONE_ANSWER.format("branch"), example)
        case ast.BoolOp(op=op, values=values):
            word, sign = ("and", "&") if isinstance(op, ast.And) else ("or", "|")
            example = f" {sign} ".join(f"({ast.unparse(v)})" for v in values)
            return TraceError(f"uses `{word}` on traced values", _ONE_ANSWER.format(f"`{word}`"), example)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return TraceError("uses `not` on a traced value", _ONE_ANSWER.format("`not`"), f"~({ast.unparse(operand)})")
        case ast.Compare(left=left, comparators=comparators):
            terms = [left, *comparators]
            pairs = [
                ast.unparse(ast.Compare(a, [op], [b])) for a, op, b in zip(terms, node.ops, terms[1:], strict=False)
            ]
            why = "Python joins the two comparisons with `and`. " + _ONE_ANSWER.format("`and`")
            return TraceError("chains comparisons of traced values", why, " & ".join(f"({p})" for p in pairs))
        case ast.Call(func=ast.Name(id=("max" | "min") as name), args=args):
            example = f"torch.{name}imum({', '.join(ast.unparse(a) for a in args)})"
            return TraceError(f"uses the builtin `{name}` on traced values", _ONE_ANSWER.format("comparison"), example)
    return TraceError(
        "asks whether a traced value is true",
        _ONE_ANSWER.format("question"),
        "torch.where(condition, a, b) for `if`; &, |, ~ for `and`, `or`, `not`; torch.maximum for max",
    )


def _innermost(filename: str, line: int) -> ast.AST | None:
    """The smallest construct on that line which takes the truth of a value."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except (SyntaxError, ValueError):
        return None
    found: list[tuple[int, int, ast.AST]] = []
    for node in ast.walk(tree):
        spot = node.test if isinstance(node, (ast.If, ast.While)) else node
        if not _takes_truth(node) or not isinstance(spot, ast.expr) or spot.end_lineno is None:
            continue
        if spot.lineno <= line <= spot.end_lineno:
            size = (spot.end_lineno - spot.lineno) * 1000 + (spot.end_col_offset or 0) - spot.col_offset
            # An `if` whose test is itself `a and b` fails in the `and`.
            found.append((size, isinstance(node, (ast.If, ast.While, ast.IfExp)), node))
    return min(found, key=lambda f: f[:2])[2] if found else None


def _takes_truth(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in ("max", "min")
    if isinstance(node, ast.Compare):
        return len(node.ops) > 1
    return isinstance(node, (ast.If, ast.While, ast.IfExp, ast.BoolOp)) or (
        isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    )
