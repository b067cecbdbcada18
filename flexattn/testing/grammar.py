"""The grammar of generated mods: which expressions there are, the simplest first.

A rule makes an expression of others. Its holes say which: `i` an integer of the indices, `c` a condition, `s` a score, `m` a
mask_mod, `d` a score_mod, `o` one that can be composed, `n` a number from 1 to 7, `w` a width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from .grammar_expressions import Captured, Expression, Function, Literal, Name, apply

MASK_ARGUMENTS = ("b", "h", "q_idx", "kv_idx")
SCORE_ARGUMENTS = ("score", *MASK_ARGUMENTS)

SCORE, BATCH, HEAD, Q, KV = map(Name, SCORE_ARGUMENTS)
CAUSAL = apply("flexattn.masks.causal_mask")
NOOP = apply("flexattn.masks.noop_mask")
IDENTITY = apply("flexattn.mods.identity")


class Space(NamedTuple):
    """What generated mods may read: captured tensors for so many batch entries, heads and positions, and their seed."""

    captured: bool = True
    batch: int = 2
    heads: int = 4
    length: int = 160
    seed: int = 0


class Rule(NamedTuple):
    """A way to make an expression: one letter for each operand, and a function of the operands."""

    holes: str
    build: Callable[..., Expression]


class Kind(NamedTuple):
    """The rules for one kind of expression: those that end it, and those that nest."""

    leaves: tuple[Rule, ...]
    nested: tuple[Rule, ...] = ()


Grammar = dict[str, Kind]


def torch_(name: str, *operands: Expression | float) -> Expression:
    """A function of torch on expressions."""
    return apply(f"torch.{name}({', '.join(['{}'] * len(operands))})", *operands)


def mask(name: str, *operands: Expression | int) -> Expression:
    """A mask of `flexattn.masks` of parameters."""
    return apply(f"flexattn.masks.{name}({', '.join(['{}'] * len(operands))})", *operands)


def random(kind: str, shape: tuple[int, ...], seed: int, *limits: int) -> Expression:
    """A tensor of seeded random numbers: `randn`, `rand`, or `randint` between limits."""
    places = ", ".join(["{}"] * (1 + len(limits)))
    text = f"torch.{kind}({places}, generator=torch.Generator().manual_seed({{}}))"
    return apply(text, *limits, Literal(shape), seed)


def tensors(space: Space) -> dict[str, Captured]:
    """The tensors that mods may capture, by name."""
    batch, heads, length, seed = space[1:]

    def ids(lowest: int, highest: int, shape: tuple[int, ...], seed: int) -> Expression:
        return apply("{}.sort().values", random("randint", shape, seed, lowest, highest))

    made: dict[str, Expression] = {
        "slopes": abs(random("randn", (heads,), seed)) * 0.1,
        "gate": random("randn", (batch, heads, length), seed + 1) * 0.3,
        "table": random("randn", (heads, 2 * length - 1), seed + 2) * 0.3,
        "pair": random("randn", (length, length), seed + 3),
        "row": random("randn", (heads, 3), seed + 4),
        "temperature": abs(random("randn", (), seed + 5)) + 0.5,
        "document_ids": ids(0, 4, (length,), seed + 6),
        "batch_ids": ids(0, 4, (batch, length), seed + 7),
        "mixed": apply("{}.int()", random("randint", (batch, length), seed + 8, 0, 5)),
        "spans": ids(-1, 3, (length,), seed + 9),
        "lengths": random("randint", (batch,), seed + 10, 0, length + 1),
        "keep": random("rand", (length,), seed + 11) > 0.3,
        "limit": apply("torch.tensor({})", 9),
    }
    return {name: Captured(name, x) for name, x in made.items()}


# ---- what reads no tensor

_INTEGERS = Kind(
    leaves=(
        Rule("", lambda: Q),
        Rule("", lambda: KV),
        Rule("", lambda: Q - KV),
        Rule("", lambda: HEAD),
        Rule("", lambda: BATCH),
        Rule("n", lambda n: KV - n),
    ),
    nested=(
        Rule("ii", lambda x, y: x + y),
        Rule("ii", lambda x, y: x - y),
        Rule("in", lambda x, n: x * n),
        Rule("in", lambda x, n: x // n),
        Rule("in", lambda x, n: x % n),
        Rule("i", lambda x: -(Q + x)),
        Rule("i", lambda x: abs(x - Q)),
        Rule("i", lambda x: torch_("maximum", x, KV)),
        Rule("ii", lambda x, y: torch_("minimum", Q + x, y)),
        Rule("ii", lambda x, y: torch_("where", Q > x, y, 2)),
        Rule("in", lambda x, n: x & n),
        Rule("n", lambda n: Q >> n),
        Rule("n", lambda n: apply("{}.clamp({}, {})", KV * n, 2, 9)),
    ),
)
_CONDITIONS = Kind(
    leaves=(
        Rule("", lambda: Q >= KV),
        Rule("n", lambda n: Q - KV < n),
        Rule("i", lambda x: Q < x),
        Rule("i", lambda x: Q >= x),
        Rule("i", lambda x: apply("({} != {})", Q, x)),
        Rule("i", lambda x: KV <= x),
        Rule("i", lambda x: KV > x),
        Rule("i", lambda x: apply("({} == {})", KV, x)),
    ),
    nested=(
        Rule("cc", lambda x, y: x & y),
        Rule("cc", lambda x, y: x | y),
        Rule("cc", lambda x, y: x ^ y),
        Rule("c", lambda x: ~x),
        Rule("cc", lambda x, y: torch_("logical_and", x, y)),
    ),
)
_SCORES = Kind(
    leaves=(
        Rule("", lambda: SCORE),
        Rule("", lambda: SCORE * 0.25),
        Rule("", lambda: 0.1 * (KV - Q)),
        Rule("n", lambda n: Q / n),
    ),
    nested=(  # of bounded growth, so that float32 is meaningful
        Rule("ss", lambda x, y: x + y),
        Rule("ss", lambda x, y: x - y),
        Rule("ss", lambda x, y: 0.5 * x * torch_("tanh", y)),
        Rule("s", lambda x: 5.0 * torch_("tanh", (SCORE + x) / 5.0)),
        Rule("s", lambda x: torch_("sigmoid", SCORE * x)),
        Rule("css", lambda c, x, y: torch_("where", c, SCORE + x, y)),
        Rule("s", lambda x: apply("{}.clamp({}, {})", SCORE + x, -2, 2.5)),
        Rule("s", lambda x: torch_("maximum", SCORE, x)),
        Rule("s", lambda x: torch_("minimum", SCORE, x)),
        Rule("s", lambda x: torch_("exp", -abs(SCORE - x))),
        Rule("s", lambda x: torch_("log1p", abs(SCORE + x))),
        Rule("s", lambda x: torch_("sqrt", (SCORE + x) ** 2 + 1)),
        Rule("s", lambda x: apply("torch.nn.functional.softplus({})", SCORE + x)),
        Rule("s", lambda x: SCORE / (1 + abs(x))),
        Rule("s", lambda x: torch_("sin", SCORE + x)),
        Rule("s", lambda x: torch_("logaddexp", SCORE, x)),
        Rule("s", lambda x: apply("torch.nn.functional.elu({})", SCORE + x)),
        Rule("ss", lambda x, y: apply("torch.add({}, {}, alpha=0.5)", SCORE + x, y)),
        Rule("c", lambda c: torch_("where", c, SCORE, 0.25)),
    ),
)
_MASKS = Kind(
    leaves=(
        Rule("", lambda: CAUSAL),
        Rule("", lambda: NOOP),
        Rule("w", lambda w: mask("sliding_window", w)),
        Rule("w", lambda w: mask("prefix_lm", w)),
        Rule("w", lambda w: mask("chunked", w)),
        Rule("w", lambda w: mask("causal", w)),
        Rule("w", lambda w: mask("global_tokens", w)),
        Rule("wn", lambda w, n: mask("window", w, n)),
        Rule("nw", lambda n, w: mask("streaming", n, w)),
        Rule("nn", lambda n, m: mask("dilated", n, m)),
        *(Rule("c", lambda c: Function(MASK_ARGUMENTS, c)),) * 12,
    ),
    nested=(
        Rule("mm", lambda x, y: apply("flexattn.and_masks({}, {})", x, y)),
        Rule("mm", lambda x, y: apply("flexattn.or_masks({}, {})", x, y)),
        Rule("m", lambda x: apply("flexattn.not_mask({})", x)),
    ),
)
_SCORE_MODS = Kind(
    leaves=(
        Rule("", lambda: IDENTITY),
        Rule("n", lambda n: apply("flexattn.mods.softcap({})", n)),
        *(Rule("s", lambda x: Function(SCORE_ARGUMENTS, x)),) * 5,
        *(Rule("s", lambda x: Function(SCORE_ARGUMENTS, SCORE + x)),) * 3,
        *(Rule("cs", lambda c, x: Function(SCORE_ARGUMENTS, torch_("where", c, SCORE + x, -math.inf))),) * 2,
    ),
    nested=(Rule("oo", lambda x, y: apply("flexattn.mods.compose({}, {})", x, y)),),
)
_PLAIN: Grammar = {"i": _INTEGERS, "c": _CONDITIONS, "s": _SCORES, "m": _MASKS, "o": _SCORE_MODS}
_CONSTANT = Rule("", lambda: Function(SCORE_ARGUMENTS, Literal(0.25)))  # a number, which nothing can be composed with


# ---- what reads captured tensors


@lru_cache(maxsize=256)
def grammar(space: Space) -> Grammar:
    """The rules for each kind of expression, with those that read captured tensors where there are any."""
    if not space.captured:
        return _with_constant(_PLAIN)
    t = tensors(space)
    last, length = space.length - 1, space.length
    more: Grammar = {
        "i": Kind(
            leaves=(
                Rule("", lambda: t["document_ids"][Q]),
                Rule("", lambda: t["mixed"][BATCH, KV]),
                Rule("", lambda: t["mixed"][BATCH, Q]),
                Rule("", lambda: t["limit"]),
            ),
            nested=(
                Rule("i", lambda x: t["document_ids"][x % length]),
                Rule("i", lambda x: t["document_ids"][x % length - length]),
            ),
        ),
        "c": Kind(
            leaves=(
                Rule("", lambda: apply("({} == {})", t["document_ids"][Q], t["document_ids"][KV])),
                Rule("", lambda: t["keep"][KV]),
            )
        ),
        "s": Kind(
            leaves=(
                Rule("", lambda: t["slopes"][HEAD] * (KV - Q)),
                Rule("", lambda: t["slopes"][HEAD]),
                Rule("", lambda: t["gate"][BATCH, HEAD, Q]),
                Rule("", lambda: t["gate"][BATCH, HEAD, KV]),
                Rule("", lambda: t["table"][HEAD, Q - KV + last]),
                Rule("", lambda: t["table"][HEAD, Q - KV]),
                Rule("", lambda: t["pair"][Q, KV]),
                Rule("", lambda: apply("{}.sum(-1)", t["row"][HEAD])),
                Rule("", lambda: t["row"][HEAD, 1]),
                Rule("", lambda: apply("({} @ {})", t["row"][HEAD], t["row"][0])),
                Rule("", lambda: t["temperature"]),
            ),
            nested=(Rule("s", lambda x: SCORE * t["temperature"] + x),),
        ),
        "m": Kind(
            leaves=(
                Rule("", lambda: mask("document_mask", t["document_ids"])),
                Rule("", lambda: mask("document_mask", t["batch_ids"])),
                Rule("", lambda: mask("document_mask", t["mixed"])),
                Rule("", lambda: mask("padding", t["lengths"])),
                Rule("", lambda: mask("prefix_lm", t["lengths"])),
                Rule("", lambda: mask("transfusion", t["spans"])),
            )
        ),
        "o": Kind(
            leaves=(
                Rule("", lambda: apply("flexattn.mods.alibi({})", t["slopes"])),
                Rule("", lambda: apply("flexattn.mods.relative_bias({})", t["table"])),
            )
        ),
    }
    both = {kind: Kind(a.leaves + more[kind].leaves, a.nested + more[kind].nested) for kind, a in _PLAIN.items()}
    return _with_constant(both)


def _with_constant(rules: Grammar) -> Grammar:
    return {**rules, "d": Kind((*rules["o"].leaves, _CONSTANT), rules["o"].nested)}


# ---- what is done to an output afterwards

OUT, LSE = Name("out"), Name("lse")


def scaled_by(log_weight: Expression) -> Function:
    """`out * sigmoid(lse - log_weight)`: a softmax with one more entry of weight exp(log_weight), whose value is zero."""
    weight = apply("{}.unsqueeze(-1)", torch_("sigmoid", log_weight))
    return Function(("out", "lse"), apply("{}.to({}.dtype)", OUT * weight, OUT))


UNCHANGED = Function(("out", "lse"), OUT)
OFF_BY_ONE = scaled_by(LSE)


def sinks(heads: int, seed: int) -> Function:
    """A sink for each head, a captured tensor."""
    sink = Captured("sink", random("randn", (heads,), seed))
    return scaled_by(LSE - apply("{}.unsqueeze(-1)", sink))
