"""From the tree of a notation to what it names: a mask_mod, a score_mod or a BlockMask."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexattn import masks, mods
from flexattn.block_mask import BlockMask
from flexattn.codegen.ir import Op, walk
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import positional_count, trace
from flexattn.documents import Documents
from flexattn.mask_algebra import whole_mask_mod

from .failures import Failure, Mistake, told
from .imported import imported
from .no_mods import ROLES, parameters, why_no_mod
from .notation import Call, Combined, Literal, Name, Notation, NotationError, Reference, Tree


class Subject(NamedTuple):
    """What a notation names.

    Attributes:
        text: as it was written.
        role: "mask_mod", "score_mod" or "block_mask".
        value: the function, or the `BlockMask`.
    """

    text: str
    role: str
    value: Any

    @property
    def mask_mod(self) -> Any:
        """The mask as a function, or None for a score_mod; that of a `BlockMask` says all that its lists say."""
        return (
            whole_mask_mod(self.value) if self.role == "block_mask" else self.value if self.role == "mask_mod" else None
        )

    @property
    def score_mod(self) -> Any:
        """The score_mod, or None for a mask."""
        return self.value if self.role == "score_mod" else None


def subject(notation: Notation) -> Subject:
    """What a notation names. Raises `Mistake` for what is neither a mask nor a score_mod."""
    return _Builder(notation.text).subject(notation.tree)


def mask(notation: Notation) -> Subject:
    """The mask that a notation names. Raises `Mistake` for anything else."""
    found = subject(notation)
    if found.role == "score_mod":
        raise Mistake(
            f"{notation.text} takes ({', '.join(parameters(found.value))}): it is a score_mod, and a mask is asked for, "
            "(b, h, q_idx, kv_idx) -> bool"
        )
    return found


def value(notation: Notation) -> Any:
    """Whatever a notation names, such as a tensor of document ids."""
    return _Builder(notation.text).build(notation.tree)


def read_sizes(score_mod: Any, mask_mod: Any) -> dict[str, int]:
    """For each of b, h, q_idx and kv_idx by which a captured tensor is read, the size of the shortest such dimension.

    Nothing of a mod that cannot be traced.
    """
    sizes: dict[str, int] = {}
    try:
        found = trace(score_mod, mask_mod)
        parsed = variant(found.program)
    except Exception:
        return sizes
    for node in walk(parsed.score, *([] if parsed.mask is None else [parsed.mask])):
        if node.op is not Op.LOAD:
            continue
        base, *index = node.args
        assert isinstance(base.value, tuple)
        for place, size in zip(index, found.captured[base.value[0]].shape, strict=True):
            if place.op is Op.INPUT:
                name = str(place.value)
                sizes[name] = min(size, sizes.get(name, size))
    return sizes


def _documents(*lengths: Any) -> Any:
    return Documents.from_lengths(
        list(lengths[0]) if len(lengths) == 1 and isinstance(lengths[0], list) else lengths
    ).mask()


def _alibi(slopes: int | Tensor) -> Any:
    return mods.alibi(mods.alibi_slopes(slopes) if isinstance(slopes, int) else slopes)


def _named(name: str) -> Any:
    """What a name of the notation stands for."""
    own = {"documents": _documents, "alibi": _alibi}
    if name in own:
        return own[name]
    head, _, method = name.partition(".")
    found = getattr(masks if hasattr(masks, head) else mods, head)
    return getattr(found, method) if method else found


class _Builder:
    def __init__(self, text: str) -> None:
        self.text = text

    def error(self, message: str, place: int) -> Mistake:
        return Mistake(str(NotationError(message, self.text, place)))

    def subject(self, tree: Tree) -> Subject:
        made = self.build(tree)
        if not isinstance(made, BlockMask) and hasattr(made, "kv_num_blocks"):
            made = BlockMask.from_torch(made)
        if isinstance(made, BlockMask):
            return Subject(self.text, "block_mask", made)
        refused = why_no_mod(_text(tree), made, isinstance(tree, (Name, Reference)))
        if refused:
            raise self.error(refused, tree.place)
        return Subject(self.text, ROLES[positional_count(made)], made)

    def build(self, tree: Tree) -> Any:
        if isinstance(tree, Literal):
            return tree.value
        if isinstance(tree, Name):
            return _named(tree.name)
        if isinstance(tree, Reference):
            try:
                return imported(tree.source, tree.name)
            except Mistake as error:
                raise self.error(str(error), tree.place) from error.__cause__
        return self.call(tree) if isinstance(tree, Call) else self.combined(tree)

    def combined(self, tree: Combined) -> Any:
        operands = [self.subject(operand) for operand in tree.operands]
        for found, operand in zip(operands, tree.operands, strict=True):
            if found.role == "score_mod":
                raise self.error(f"{_text(operand)} is a score_mod; &, | and ~ combine masks", operand.place)
        if all(found.role == "block_mask" for found in operands):
            try:
                values = [found.value for found in operands]
                return ~values[0] if tree.operator == "~" else _LISTS[tree.operator](*values)
            except ValueError as error:
                raise self.error(told(error), tree.place) from error
        return _FUNCTIONS[tree.operator](*(found.mask_mod for found in operands))

    def call(self, tree: Call) -> Any:
        function = self.build(tree.function)
        name = _text(tree.function)
        if not callable(function):
            raise self.error(f"{name} is of type {type(function).__name__}, which cannot be called", tree.place)
        if _is_mod(function):
            raise self.error(f"{name} is itself a mod: write it without ()", tree.place)
        arguments = [self.argument(a) for a in tree.arguments]
        keywords = {k: self.argument(a) for k, a in tree.keywords.items()}
        try:
            arguments, keywords = _converted(function, arguments, keywords)
            return function(*arguments, **keywords)
        except Failure:
            raise
        except TypeError as error:
            takes = f"{name}({', '.join(parameters(function, all_of_them=True))})"
            raise self.error(f"{told(error)}; write {takes}", tree.place) from error
        except Exception as error:
            raise self.error(f"{name}: {told(error)}", tree.place) from error

    def argument(self, tree: Tree) -> Any:
        made = self.build(tree)
        return made.mask() if isinstance(made, Documents) else made


_LISTS: Mapping[str, Callable[..., Any]] = {"&": lambda a, b: a & b, "|": lambda a, b: a | b}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {"&": masks.and_masks, "|": masks.or_masks, "~": masks.not_mask}


def _is_mod(function: Any) -> bool:
    """Whether it is a mod by itself, and no factory: a factory of four parameters calls none of them kv_idx."""
    return not isinstance(function, type) and positional_count(function) in ROLES and "kv_idx" in parameters(function)


def _converted(
    function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments with lists as what the parameter's annotation asks for. Raises `TypeError` where they do not fit it."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return list(arguments), dict(keywords)
    bound = signature.bind(*arguments, **keywords)
    for name, given in bound.arguments.items():
        annotation = str(signature.parameters[name].annotation)
        if isinstance(given, (list, tuple)) and "Tensor" in annotation:
            bound.arguments[name] = torch.tensor(given)
        elif isinstance(given, list) and "tuple" in annotation:
            bound.arguments[name] = tuple(given)
    return list(bound.args), dict(bound.kwargs)


def _text(tree: Tree) -> str:
    """A tree in the notation, for messages."""
    if isinstance(tree, Reference):
        return f"{tree.source}:{tree.name}"
    if isinstance(tree, Name):
        return tree.name
    return f"{_text(tree.function)}(...)" if isinstance(tree, Call) else "this"
