"""Hypothesis strategies: mods as runnable Python source, built from a grammar, and attention problems to run them on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

HEADS, BATCH, LENGTH = 4, 2, 160


def environment(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What generated sources may name: torch, and captured tensors for up to 2 x 4 x 160 x 160 elements."""
    g = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "torch": torch,
        "slopes": normal(HEADS).abs() * 0.1,
        "gate": normal(BATCH, HEADS, LENGTH) * 0.3,
        "table": normal(HEADS, 2 * LENGTH - 1) * 0.3,
        "pair": normal(LENGTH, LENGTH),
        "row": normal(HEADS, 3),
        "temperature": normal().abs() + 0.5,
        "docs": torch.randint(0, 4, (LENGTH,), generator=g).sort().values,
        "mixed": torch.randint(0, 5, (BATCH, LENGTH), generator=g, dtype=torch.int32),
        "keep": torch.rand(LENGTH, generator=g) > 0.3,
        "limit": torch.tensor(9),
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
    "torch.exp(-abs(score - {x}))",
    "torch.log1p(abs(score + {x}))",
    "torch.sqrt((score + {x}) ** 2 + 1)",
    "torch.nn.functional.softplus(score + {x})",
    "(score / (1 + abs({x} + 0 * score)))",
    "torch.sin(score + {x})",
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
