"""Hypothesis strategies: mods as runnable Python source, built from a grammar, and attention problems to run them on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

HEADS, BATCH, LENGTH = 4, 2, 160


def environment(dtype: torch.dtype = torch.float32, length: int = LENGTH) -> dict[str, Any]:
    """What generated sources may name: torch, and captured tensors for up to 2 x 4 x length x length elements."""
    g = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "torch": torch,
        "slopes": normal(HEADS).abs() * 0.1,
        "gate": normal(BATCH, HEADS, length) * 0.3,
        "table": normal(HEADS, 2 * length - 1) * 0.3,
        "pair": normal(length, length),
        "row": normal(HEADS, 3),
        "temperature": normal().abs() + 0.5,
        "docs": torch.randint(0, 4, (length,), generator=g).sort().values,
        "mixed": torch.randint(0, 5, (BATCH, length), generator=g, dtype=torch.int32),
        "keep": torch.rand(length, generator=g) > 0.3,
        "limit": torch.tensor(9),
        "grid": torch.randint(-3, 9, (20, 24), generator=g),
        "big": torch.randint(-(2**63), 2**63 - 1, (50,), generator=g),
    }


FLOATING = ("slopes", "gate", "table", "pair", "row", "temperature")


@dataclass(frozen=True)
class Mod:
    """A mod as source; `repr` is runnable with `environment()`."""

    arguments: str
    body: str

    def bind(self, env: dict[str, Any]) -> Any:
        return eval(f"lambda {self.arguments}: {self.body}", dict(env))  # our own grammar, not anybody's input

    def __repr__(self) -> str:
        return f"lambda {self.arguments}: {self.body}"


_INEXACT = {"0.25": "0.3", "0.5 ": "0.7 ", "5.0": "5.1", "2.5": "2.6"}


def inexact(mod: Mod) -> Mod:
    """A mod of the grammar with other numbers, which no float type holds exactly."""
    body = mod.body
    for number, other in _INEXACT.items():
        body = body.replace(number, other)
    return Mod(mod.arguments, body)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch's default dtype, for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@st.composite
def _grown(draw: st.DrawFn, leaves: tuple[str, ...], templates: tuple[str, ...], depth: int) -> str:
    """A leaf, or a template with its holes filled: {x} one level less deep, {n} a small number, {i} an index, {c} a bool."""
    if depth == 0 or draw(st.integers(0, 2)) == 0:
        text = draw(st.sampled_from(leaves))
    else:
        text = draw(st.sampled_from(templates))
    while "{" in text:
        hole = text[text.index("{") : text.index("{") + 3]
        if hole == "{x}":
            fill = draw(_grown(leaves, templates, depth - 1))
        elif hole == "{n}":
            fill = str(draw(st.integers(1, 7)))
        else:
            fill = draw(integers(1) if hole == "{i}" else booleans(1))
        text = text.replace(hole, fill, 1)
    return text


_INTEGER_LEAVES = (
    *("q_idx", "kv_idx", "h", "b", "(q_idx - kv_idx)", "docs[q_idx]", "mixed[b, kv_idx]", "limit", "3"),
    *("mixed[b, q_idx]", "(kv_idx - 5)"),
)
_INTEGER_TEMPLATES = (
    "({x} + {x})",
    "({x} - {x})",
    "({x} * {n})",
    "(({x}) // {n})",
    "(({x}) % {n})",
    "(-(q_idx + {x}))",
    "abs({x} - q_idx)",
    "torch.maximum({x} + 0 * q_idx, kv_idx)",
    "torch.where(q_idx > {x}, {x}, 2)",
    "docs[({x} + 0 * b) % 160]",
    "docs[({x} + 0 * b) % 160 - 160]",
    "({x} & {n} + 0 * h)",
    "(q_idx >> {n})",
    "((kv_idx * {n}).clamp(2, 9))",
)
_BOOLEAN_LEAVES = (
    *("(q_idx < {i})", "(q_idx >= {i})", "(q_idx != {i})", "(kv_idx <= {i})", "(kv_idx > {i})", "(kv_idx == {i})"),
    *("(q_idx >= kv_idx)", "(docs[q_idx] == docs[kv_idx])", "keep[kv_idx]", "(q_idx - kv_idx < 7)"),
)
_BOOLEAN_TEMPLATES = ("({x} & {x})", "({x} | {x})", "({x} ^ {x})", "(~{x})", "torch.logical_and({x}, {x})")
_FLOAT_LEAVES = (
    *("score", "slopes[h]", "gate[b, h, q_idx]", "gate[b, h, kv_idx]", "table[h, q_idx - kv_idx + 159]"),
    *("table[h, q_idx - kv_idx]", "pair[q_idx, kv_idx]", "row[h].sum(-1)", "row[h, 1]", "temperature"),
    *("(slopes[h] * (kv_idx - q_idx))", "0.25", "score"),
)
_FLOAT_TEMPLATES = (
    "({x} + {x})",
    "({x} - {x})",
    "(0.5 * {x} * torch.tanh({x} + 0 * score))",
    "(score * temperature + {x})",
    "(5.0 * torch.tanh((score + {x}) / 5.0))",
    "torch.sigmoid(score * {x})",
    "torch.where({c}, score + {x}, {x})",
    "(score + {x}).clamp(-2, 2.5)",
    "torch.maximum(score, {x} + 0 * score)",
    "torch.minimum(score, {x} + 0 * score)",
    "torch.exp(-abs(score - {x}))",
    "torch.log1p(abs(score + {x}))",
    "torch.sqrt((score + {x}) ** 2 + 1)",
    "torch.nn.functional.softplus(score + {x})",
    "(score / (1 + abs({x} + 0 * score)))",
    "torch.sin(score + {x})",
    "torch.logaddexp(score, {x} + 0 * score)",
    "torch.nn.functional.elu(score + {x})",
    "torch.nn.functional.logsigmoid(score + {x})",
    "torch.add(score, {x} + 0 * score, alpha=0.5)",
    "(row[h] @ row[1] * torch.sigmoid(score + {x}))",
)


def integers(depth: int = 2) -> st.SearchStrategy[str]:
    """Integer expressions of the indices."""
    return _grown(_INTEGER_LEAVES, _INTEGER_TEMPLATES, depth)


def booleans(depth: int = 2) -> st.SearchStrategy[str]:
    """Boolean expressions of the indices; each depends on an index."""
    return _grown(_BOOLEAN_LEAVES, _BOOLEAN_TEMPLATES, depth)


def floats(depth: int = 3) -> st.SearchStrategy[str]:
    """Scores, of bounded growth, so that float32 is meaningful."""
    return _grown(_FLOAT_LEAVES, _FLOAT_TEMPLATES, depth)


_INDEX_FLOAT_LEAVES = (
    *(
        "slopes[h]",
        "(slopes[h] * (q_idx - kv_idx))",
        "gate[b, h, kv_idx]",
        "temperature",
        "(q_idx / 3)",
        "(kv_idx * 0.5)",
    ),
    *("pair[q_idx, kv_idx]", "table[h, q_idx - kv_idx + 159]", "({i} + 0 * q_idx).float()", "gate[b, h, q_idx]"),
)
_INDEX_FLOAT_TEMPLATES = (
    *("({x} + {x})", "({x} - {x})", "({x} * {x})", "({x} / {x})", "torch.maximum({x}, {x} + 0 * temperature)"),
    *(
        "torch.sin({x} + 0 * kv_idx)",
        "torch.tanh({x} + 0 * q_idx)",
        "torch.exp({x} + 0 * q_idx)",
        "(-({x}))",
        "abs({x} + 0 * q_idx)",
    ),
    *("torch.sqrt({x} + 0 * q_idx)", "torch.log({x} + 0 * q_idx)", "torch.floor({x} + 0 * q_idx)", "(({x}) ** 2)"),
    *(
        "torch.where({c}, {x}, {x} + 0 * temperature)",
        "torch.rsqrt({x} + 0 * q_idx)",
        "(({x}) % 1.5)",
        "(({x}) // 0.7)",
    ),
    *("torch.fmod({x} + 0 * q_idx, 2.5)", "torch.round({x} + 0 * q_idx)", "torch.sign({x} + 0 * q_idx)"),
)
_RICH_INTEGER_TEMPLATES = (
    *_INTEGER_TEMPLATES,
    *("({x} * {x})", "(({x}) // ({x}))", "(({x}) % ({x}))", "torch.fmod({x} + 0 * q_idx, {n})", "(({x}) % -{n})"),
    *(
        "(({x}) // -{n})",
        "({x} | {x})",
        "({x} ^ {x})",
        "({x} & {x})",
        "(~({x} + 0 * q_idx))",
        "(({x} + 0 * q_idx) >> {n})",
    ),
    *("(({x} + 0 * kv_idx) << {n})", "(({x} + 0 * q_idx) ** {n})", "torch.sign({x} + 0 * q_idx)"),
    *(
        "({x} + 0 * q_idx).to(torch.int8)",
        "({f} + 0 * q_idx).to(torch.int32)",
        "({c}).int()",
        "mixed[b, {x}]",
        "grid[{x}, {x}]",
    ),
    *("torch.add({x} + 0 * q_idx, mixed[b, kv_idx], alpha={n})", "torch.pow({x} + 0 * q_idx, kv_idx - 2)"),
    *("torch.div({x} + 0 * q_idx, {n}, rounding_mode='trunc')", "torch.minimum({x} + 0 * q_idx, kv_idx)"),
    *("(({x} + 0 * q_idx).to(torch.uint8))", "(({x}) * 100003)", "docs[{x} + 0 * kv_idx]", "big[{x} + 0 * q_idx]"),
)
_RICH_BOOLEAN_LEAVES = (
    *_BOOLEAN_LEAVES,
    *(
        "({f} < {f})",
        "({f} >= {f})",
        "({f} != {f})",
        "({i} == {i})",
        "({i} < {i})",
        "(grid[q_idx, kv_idx] > 3)",
        "keep[q_idx]",
    ),
    *("({i} != {i})", "({c} == {c})", "({i} + 0 * q_idx).bool()", "({c} < {c})", "({f} + 0 * q_idx).bool()"),
)


@st.composite
def _filled(draw: st.DrawFn, kind: str, depth: int) -> str:
    """An expression of the richer grammar: as `_grown`, with {f} a float of the indices too."""
    leaves, templates = {
        "i": (_INTEGER_LEAVES, _RICH_INTEGER_TEMPLATES),
        "f": (_INDEX_FLOAT_LEAVES, _INDEX_FLOAT_TEMPLATES),
        "c": (_RICH_BOOLEAN_LEAVES, _BOOLEAN_TEMPLATES),
    }[kind]
    text = draw(st.sampled_from(leaves if depth <= 0 or draw(st.integers(0, 2)) == 0 else templates))
    while "{" in text:
        hole = text[text.index("{") + 1]
        if hole == "n":
            fill = str(draw(st.integers(1, 7)))
        elif depth <= 0 and hole != "x":
            fill = {"i": "(q_idx - kv_idx)", "f": "(kv_idx * 0.5)", "c": "(q_idx >= kv_idx)"}[hole]
        else:
            fill = draw(_filled(kind if hole == "x" else hole, depth - 1))
        text = text.replace("{" + hole + "}", fill, 1)
    return text


def rich_masks(depth: int = 3) -> st.SearchStrategy[Mod]:
    """mask_mods with every operation that an index can meet, floats, divisors of any sign and indices out of range too."""
    return _filled("c", depth).map(lambda s: Mod("b, h, q_idx, kv_idx", s))


def rich_values(depth: int = 3) -> st.SearchStrategy[str]:
    """Integer and float expressions of the indices, of the grammar of `rich_masks`."""
    return st.sampled_from("if").flatmap(lambda kind: _filled(kind, depth))


def score_mods() -> st.SearchStrategy[Mod]:
    """Any score_mod of the grammar; some add a bias, some mask by -inf."""
    banned = st.tuples(booleans(1), floats(2)).map(lambda t: f"torch.where({t[0]}, score + {t[1]}, -float('inf'))")
    return st.one_of(floats(), floats(1).map(lambda s: f"score + {s}"), banned).map(
        lambda s: Mod("score, b, h, q_idx, kv_idx", s)
    )


def mask_mods() -> st.SearchStrategy[Mod]:
    """Any mask_mod of the grammar."""
    return booleans().map(lambda s: Mod("b, h, q_idx, kv_idx", s))


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention problem."""

    B: int
    kv_heads: int
    group: int
    L: int
    S: int
    E: int
    Ev: int
    block: tuple[int, int]
    shared_keys: bool

    @property
    def H(self) -> int:
        return self.kv_heads * self.group


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Small problems with everything that goes wrong at edges: ragged blocks, empty lengths, groups, shared keys."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (4, 1), (2, 2), (1, 4), (1, 2), (3, 1)]))
    block = draw(st.sampled_from([(16, 16), (32, 16), (16, 64), (128, 128)]))
    lengths = st.one_of(st.integers(1, 100), st.sampled_from([0, 16, 17, 31, 128, 129, 160]))
    return Shape(
        draw(st.integers(1, 2)),
        kv_heads,
        group,
        draw(lengths),
        draw(lengths),
        draw(st.sampled_from([1, 4, 8, 24])),
        draw(st.sampled_from([1, 8, 16])),
        block,
        draw(st.booleans()),
    )
