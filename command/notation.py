"""The notation of masks and mods on the command line, as a tree: `parse("causal_mask & ~sliding_window(64)")`.

Names of `flexattn.masks` and `flexattn.mods` with literal arguments, MODULE:NAME and PATH.py:NAME, `&`, `|`, `~` and
parentheses. Python's own parser reads the text, a table says which of its nodes mean something here, and nothing is
evaluated. Neither PyTorch nor what is named is imported: see `build`.
"""

from __future__ import annotations

import ast
import difflib
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

# What `flexattn.masks` and `flexattn.mods` have, which are not imported here, and what is a name of this notation only.
MASKS = (
    "and_masks", "block_diffusion", "causal", "causal_mask", "chunked", "dilated", "document_mask", "global_tokens",
    "natten_2d", "noop_mask", "not_mask", "or_masks", "padding", "prefix_lm", "shared_prefix", "sliding_window",
    "streaming", "transfusion", "tree", "window",
)  # fmt: skip
MODS = ("alibi", "alibi_slopes", "compose", "identity", "relative_bias", "softcap")
OWN = ("documents",)
NAMES = tuple(sorted((*MASKS, *MODS, *OWN)))
METHODS = ("causal.bottom_right", "tree.from_parents")
_BODY = ("b", "h", "q_idx", "kv_idx", "score", "lambda")

# A string, which may hold anything; else PATH.py:NAME or MODULE:NAME, where a ~ of the path is the home folder.
_REFERENCE = re.compile(
    r"""(?P<string>'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")"""
    r"""|(?P<source>(?:[A-Za-z]:(?=[\\/])|~(?=/))?[^\s:&|~(),'"\[\]{}=]+\.py|(?<![\w.])[A-Za-z_]\w*(?:\.\w+)*)"""
    r""":(?P<name>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)"""
)
_UNNAMED = re.compile(r"[\w./\\-]*[\w]:(?=\s*($|[)&|,]))")  # in what Python's parser refuses: no slice, no dict
_FILE = re.compile(r"(?P<stem>[\w./-]+?)(?:\.py)?(?::(?P<name>[\w.]+))?(?=$|[\s&|)])")
FORMS = (
    "a mask of flexattn.masks (causal_mask, 'sliding_window(64)', 'document_mask([0, 0, 1])', 'documents(3, 2, 5)'), a mod of "
    "flexattn.mods ('softcap(30)'), MODULE:NAME, PATH.py:NAME, a factory of these with literal arguments "
    "('my.masks:window(64)'), or masks combined by & | ~"
)


class Literal(NamedTuple):
    """A number, string, boolean, None, or a list, tuple or dict of them."""

    value: Any
    place: int


class Name(NamedTuple):
    """A name of `flexattn.masks`, of `flexattn.mods`, or of the notation."""

    name: str
    place: int


class Reference(NamedTuple):
    """`source` is a module or the path of a file, `name` an attribute path in it."""

    source: str
    name: str
    place: int


class Call(NamedTuple):
    """A factory and its arguments."""

    function: Name | Reference
    arguments: tuple[Tree, ...]
    keywords: Mapping[str, Tree]
    place: int


class Combined(NamedTuple):
    """`operator` is "&", "|" or "~"; "~" has one operand."""

    operator: str
    operands: tuple[Tree, ...]
    place: int


Tree: TypeAlias = "Literal | Name | Reference | Call | Combined"


class NotationError(ValueError):
    """A text that is not in the notation. The message quotes it and points at the place.

    Args:
        message: what is wrong there, and what to write.
        text: the whole.
        place: where, in characters.
    """

    def __init__(self, message: str, text: str, place: int) -> None:
        super().__init__(f"{message}\n  {text}\n  {' ' * place}^")


class Notation(NamedTuple):
    """A text and its tree."""

    text: str
    tree: Tree


def parse(text: str) -> Notation:
    """The tree of a text. Raises `NotationError` for what is not in the notation, and for names that do not exist.

    Example:
        >>> parse("~causal_mask | my.masks:window(64)").tree.operator
        '|'
    """
    text = " ".join(text.split("\n")).strip()
    return Notation(text, _Reader(text).tree())


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.references: dict[int, Reference] = {}

    def tree(self) -> Tree:
        if not self.text:
            raise self.error("nothing is written here; write " + FORMS, 0)
        code = _REFERENCE.sub(self._set_aside, self.text)
        try:
            with warnings.catch_warnings():  # of escapes in strings
                warnings.simplefilter("ignore")
                made = self.read(ast.parse(code, mode="eval").body)
        except NotationError:
            raise
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            offset = getattr(error, "offset", None) or len(self.text) + 1  # none, or 0, is the end
            unnamed = _UNNAMED.search(code)
            if unnamed:
                raise self.error(
                    f"the name is missing after {unnamed[0]} Write {unnamed[0]}NAME, the name of a mask or a mod in it",
                    unnamed.start(),
                ) from None
            what = (getattr(error, "msg", "") or type(error).__name__).rstrip(".?")
            raise self.error(f"not understood: {what}. Write {FORMS}", min(offset - 1, len(self.text))) from None
        if isinstance(made, Literal):
            raise self.error(f"{made.value!r} is no mask. Write {FORMS}", made.place)
        return made

    def _set_aside(self, match: re.Match[str]) -> str:
        """A reference becomes a name of the same length, for Python's parser; `references` knows what is there."""
        if match["string"] is not None:
            return match[0]
        self.references[match.start()] = Reference(match["source"], match["name"], match.start())
        return "_" * len(match[0])

    def error(self, message: str, place: int) -> NotationError:
        return NotationError(message, self.text, place)

    def place(self, node: ast.expr) -> int:
        return len(self.text.encode()[: node.col_offset].decode(errors="ignore"))  # an offset of ast is in bytes

    def read(self, node: ast.expr) -> Tree:
        reader = _READERS.get(type(node))
        if reader is None:
            instead = _INSTEAD.get(type(node), f"Write {FORMS}")
            raise self.error(f"{_kind(node)} means nothing here. {instead}", self.place(node))
        return reader(self, node)

    def name(self, node: Any) -> Tree:
        place = self.place(node)
        if place in self.references:
            return self.references[place]
        dotted = ast.unparse(node)
        if dotted in NAMES or dotted in METHODS:
            return Name(dotted, place)
        if dotted in _BODY:
            raise self.error(
                f"{dotted!r} is an argument of a mod, and this is the place of a whole one. Write the function in a file and "
                "name it: PATH.py:NAME",
                place,
            )
        if not re.fullmatch(r"\w+(\.\w+)*", dotted):
            raise self.error(f"{_kind(node)} means nothing here. Write {FORMS}", place)
        close = difflib.get_close_matches(dotted, (*NAMES, *METHODS), n=1, cutoff=0.6)
        said = f"did you mean {close[0]}?" if close else f"the names are {', '.join(NAMES)};"
        module = dotted.rpartition(".")[0] or "my_module"
        own = f"a function of your own is {module}:{dotted.rpartition('.')[2]}"
        if dotted.endswith(".py"):
            own = f"a function of that file is {dotted}:NAME"
        raise self.error(f"{dotted!r} is no name of flexattn.masks or flexattn.mods; {said} {own}", place)

    def call(self, node: Any) -> Tree:
        function = self.read(node.func)
        if not isinstance(function, (Name, Reference)):
            raise self.error("only a name can be called: sliding_window(64), my.masks:window(64)", self.place(node))
        for argument in node.args:
            if isinstance(argument, ast.Starred):
                raise self.error("write the arguments one by one, without *", self.place(argument))
        if any(k.arg is None for k in node.keywords):
            raise self.error("write the arguments one by one, without **", self.place(node))
        keywords = {k.arg: self.read(k.value) for k in node.keywords}
        return Call(function, tuple(map(self.read, node.args)), keywords, self.place(node))

    def binary(self, node: Any) -> Tree:
        sign = {ast.BitAnd: "&", ast.BitOr: "|"}.get(type(node.op))
        if sign is None:
            file = _FILE.match(self.text, self.place(node))
            if isinstance(node.op, ast.Div) and file:
                raise self.error(f"a function of a file is {file['stem']}.py:{file['name'] or 'NAME'}", file.start())
            raise self.error(f"{_kind(node)} means nothing here. Combine masks by &, | and ~", self.place(node))
        return Combined(sign, self.masks(node.left, node.right), self.place(node))

    def unary(self, node: Any) -> Tree:
        if isinstance(node.op, ast.Invert):
            return Combined("~", self.masks(node.operand), self.place(node))
        if isinstance(node.op, ast.Not):
            raise self.error("masks are combined by &, | and ~: write ~ instead of a word", self.place(node))
        return self.literal(node)

    def masks(self, *nodes: ast.expr) -> tuple[Tree, ...]:
        made = tuple(map(self.read, nodes))
        for operand in made:
            if isinstance(operand, Literal):
                raise self.error(f"{operand.value!r} is no mask; &, | and ~ combine masks", operand.place)
        return made

    def boolean(self, node: Any) -> Tree:
        words = "&" if isinstance(node.op, ast.And) else "|"
        raise self.error(f"masks are combined by &, | and ~: write {words} instead of a word", self.place(node))

    def literal(self, node: Any) -> Tree:
        try:
            return Literal(ast.literal_eval(node), self.place(node))
        except (ValueError, TypeError):
            raise self.error(
                "arguments are written out: numbers, strings, True, None, lists", self.place(node)
            ) from None


_READERS: dict[type[ast.expr], Callable[[_Reader, Any], Tree]] = {
    ast.Name: _Reader.name,
    ast.Attribute: _Reader.name,
    ast.Call: _Reader.call,
    ast.BinOp: _Reader.binary,
    ast.UnaryOp: _Reader.unary,
    ast.BoolOp: _Reader.boolean,
    ast.Constant: _Reader.literal,
    ast.List: _Reader.literal,
    ast.Tuple: _Reader.literal,
    ast.Dict: _Reader.literal,
}


_INSTEAD: dict[type[ast.expr], str] = {
    ast.Subscript: "Give what it finds a name of its own in its module, and write MODULE:NAME",
    ast.Lambda: "Write the function in a file, and name it: PATH.py:NAME",
}


def _kind(node: ast.expr) -> str:
    """What a piece of Python is called."""
    known = {
        ast.Compare: "a comparison", ast.Lambda: "a lambda", ast.BinOp: "arithmetic", ast.Subscript: "an index",
        ast.IfExp: "a choice", ast.ListComp: "a comprehension", ast.Attribute: "an attribute",
    }  # fmt: skip
    return known.get(type(node), f"this ({type(node).__name__})")
