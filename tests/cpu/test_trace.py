"""What can be traced, what is captured, and what the errors say."""

from __future__ import annotations

import functools
import itertools
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexattn.codegen.calls import FUNCTIONS
from flexattn.codegen.errors import TraceError
from flexattn.codegen.evaluate import Inputs, evaluate
from flexattn.codegen.pipeline import variant
from flexattn.codegen.spellings import canonical
from flexattn.codegen.trace import positional_count, trace

slopes = torch.tensor([0.5, 0.25])
docs = torch.tensor([0, 0, 1, 1, 1])
table = torch.arange(30, dtype=torch.float32).view(2, 3, 5)


def value_at(
    mod: Callable[..., Any], score: float = 0.5, b: int = 1, h: int = 1, q: int = 3, kv: int = 2
) -> float | bool:
    """A mod's value at one element, through its program."""
    is_score = positional_count(mod) == 5
    program, captured, ints = trace(mod if is_score else None, None if is_score else mod)
    v = variant(program)
    named = {"b": torch.tensor([b]), "h": torch.tensor([h]), "q_idx": torch.tensor([q]), "kv_idx": torch.tensor([kv])}
    n = len(captured) - v.n_floats
    inputs = Inputs({**named, "score": torch.tensor([score])}, captured[:n], captured[n:], ints)
    root = v.score if is_score else v.mask
    if root is None:
        return True
    return evaluate([root], inputs)[0].item()


class Temperature(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score * self.weight

    def method(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score * self.weight.exp()


class Callable_:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score * self.factor


def scaled(factor: Any, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score * factor


def test_every_kind_of_callable_is_traced() -> None:
    module = Temperature()
    assert value_at(lambda s, b, h, q, k: s + 1) == 1.5
    assert value_at(functools.partial(scaled, 4.0)) == 2.0
    assert value_at(functools.partial(scaled, torch.tensor(4.0))) == 2.0
    assert value_at(Callable_(6.0)) == 3.0
    assert value_at(module) == 1.5
    assert value_at(module.method) == pytest.approx(0.5 * math.exp(3.0), rel=1e-6)


def test_a_parameter_is_captured_as_itself_and_a_hoisted_call_stays_differentiable() -> None:
    module = Temperature()
    assert trace(module, None).captured[0] is module.weight
    hoisted = trace(module.method, None).captured[0]
    assert hoisted.grad_fn is not None


@pytest.mark.parametrize(
    ("mod", "expected"),
    [
        (lambda s, b, h, q, k: s + slopes[h], 0.75),
        (lambda s, b, h, q, k: s + slopes[-1], 0.75),
        (lambda s, b, h, q, k: s + table[h, 1, q], 23.5),
        (lambda s, b, h, q, k: s + table[h][1][q], 23.5),
        (lambda s, b, h, q, k: s + table[h, :, q][1], 23.5),
        (lambda s, b, h, q, k: s + table[..., q][h, 1], 23.5),
        (lambda s, b, h, q, k: s + table[h, 1:, q][0], 23.5),
        (lambda s, b, h, q, k: s + table[h, 1, q - 5], 23.5),
        (lambda s, b, h, q, k: s + table[1, docs[q], k], 22.5),
        (lambda s, b, h, q, k: s + table[h, 1].sum(), 110.5),
        (lambda s, b, h, q, k: s + table[h, 1].mean(), 22.5),
        (lambda s, b, h, q, k: s + table[h, 1].max(), 24.5),
        (lambda s, b, h, q, k: s + table[h, 1].amin(-1), 20.5),
        (lambda s, b, h, q, k: s + table[h].sum(), 330.5),
        (
            lambda s, b, h, q, k: s + (table[h, 1] * table[h, 2]).sum(),
            20 * 25 + 21 * 26 + 22 * 27 + 23 * 28 + 24 * 29 + 0.5,
        ),
        (lambda s, b, h, q, k: s + table[h, 1] @ torch.ones(5), 110.5),
        (lambda s, b, h, q, k: s + sum(table[h, 1]), 110.5),
        (lambda s, b, h, q, k: (docs[q] // 2 + 7 % (k + 3)).to(torch.float32) + s, 2.5),
        (lambda s, b, h, q, k: torch.where(q > k, s, -float("inf")), 0.5),
        (lambda s, b, h, q, k: s.where(q < k, 9.0), 9.0),
        (lambda s, b, h, q, k: s.masked_fill(q > k, -1.0), -1.0),
        (lambda s, b, h, q, k: torch.lerp(s, s + 2, 0.5), 1.5),
        (lambda s, b, h, q, k: s.new_tensor(2.0) + s, 2.5),
        (lambda s, b, h, q, k: 1 / (s + 1.5), 0.5),
        (lambda s, b, h, q, k: 2**q + s, 8.5),
        (lambda s, b, h, q, k: s**2 + q**2, 9.25),
        (lambda s, b, h, q, k: max(s.shape, ()) == () and s * 2, 1.0),
        (lambda s, b, h, q, k: torch.zeros_like(s), 0.0),
        (lambda s, b, h, q, k: 0.25, 0.25),
        (lambda b, h, q, k: (q >= k) & ~(docs[q] != docs[k]), True),
        (lambda b, h, q, k: (q ^ k) == 1, True),
        (lambda b, h, q, k: (q << 2 | k) >> 1 == 7, True),
        (lambda b, h, q, k: torch.isfinite(slopes[h] * float("inf")), False),
        (lambda b, h, q, k: True, True),
    ],
)
def test_a_form_is_traced_to_its_value(mod: Callable[..., Any], expected: float) -> None:
    assert value_at(mod) == pytest.approx(expected, rel=1e-6)


def test_in_place_operators_rebind_the_score() -> None:
    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        score += 1
        score *= slopes[h]
        score.clamp_(max=0.3)
        return score

    assert value_at(mod) == pytest.approx(0.3)


def test_a_new_value_of_a_float_or_a_tensor_gives_the_same_program() -> None:
    def make(cap: float, t: Tensor) -> Any:
        return lambda score, b, h, q_idx, kv_idx: cap * torch.tanh(score / cap) + t

    first, second = (trace(make(c, torch.tensor(c)), None) for c in (20.0, 30.0))
    assert first.program == second.program
    assert [float(t) for t in second.captured] == [30.0, 30.0, 30.0]


def test_layers_with_closures_of_the_same_code_share_a_program() -> None:
    def make(t: Tensor) -> Any:
        return lambda score, b, h, q_idx, kv_idx: score + t[h]

    assert trace(make(torch.ones(4)), None).program == trace(make(torch.zeros(8)), None).program


def test_spellings_of_one_function_give_one_program() -> None:
    spellings = [
        lambda s, b, h, q, k: s + slopes[h] * (k - q),
        lambda s, b, h, q, k: torch.add(slopes[h].mul(k.sub(q)), s),
        lambda s, b, h, q, k: (k - q) * slopes[h] + s,
        lambda s, b, h, q, k: torch.sub(k, q).multiply(slopes[h]).add(s),
    ]
    assert len({trace(f, None).program for f in spellings}) == 1


def test_unused_captured_tensors_are_dropped() -> None:
    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        _ = docs[q_idx] + 1
        return score + slopes[h]

    assert len(trace(mod, None).captured) == 1


def test_the_default_dtype_is_that_of_integer_division() -> None:
    mod = lambda score, b, h, q_idx, kv_idx: (q_idx / 3) * 1.0
    torch.set_default_dtype(torch.float64)
    try:
        assert "float64" in trace(mod, None).program
    finally:
        torch.set_default_dtype(torch.float32)
    assert "float64" not in trace(mod, None).program


def test_canonical_names_lead_into_the_table() -> None:
    for spelling in (
        "__radd__",
        "add_",
        "__iadd__",
        "__invert__",
        "__rpow__",
        "true_divide",
        "clip",
        "__rmod__",
        "__ior__",
    ):
        assert canonical(spelling)[0] in FUNCTIONS


# ---- errors: what, where, why, instead


def fails(mod: Callable[..., Any], role: str = "score_mod") -> str:
    with pytest.raises(TraceError) as caught:
        trace(mod if role == "score_mod" else None, mod if role == "mask_mod" else None)
    message = str(caught.value)
    assert message.count("\n") >= 2
    assert "\nWrite instead: " in message
    return message


def test_an_if_statement_is_explained_with_file_line_and_replacement() -> None:
    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if q_idx > kv_idx:
            return score
        return score - 1

    line = mod.__code__.co_firstlineno + 1
    assert fails(mod) == (
        f"score_mod at {__file__}:{line} uses `if` on a traced value: `if q_idx > kv_idx:`\n"
        "The kernel evaluates a whole tile at once, so the branch has no single answer.\n"
        "Write instead: return torch.where(q_idx > kv_idx, score, score - 1)"
    )


BRANCHES = {
    "if h < 2:\n    return score * 2\nelse:\n    return score / 2": "return torch.where(h < 2, score * 2, score / 2)",
    "if h < 1:\n    return score\nelif h < 2:\n    return -score\nreturn score - 1": (
        "return torch.where(h < 1, score, torch.where(h < 2, -score, score - 1))"
    ),
    "if q_idx - kv_idx > 16:\n    score = score - 1.0\nreturn score": (
        "score = torch.where(q_idx - kv_idx > 16, score - 1.0, score)"
    ),
    "if h > 1:\n    score += 1\nelse:\n    score = -score\nreturn score": "score = torch.where(h > 1, score + 1, -score)",
    "if q_idx >= kv_idx:\n    return True\nreturn False": "return q_idx >= kv_idx",
    "if q_idx >= kv_idx:\n    return False\nelse:\n    return True": "return ~(q_idx >= kv_idx)",
    "if h > 1:\n    x = 1\n    y = 2\nreturn score": "torch.where(h > 1, the value if so, the value if not)",
    "while h > 1:\n    score = score - 1\nreturn score": (
        "a fixed number of steps, each with torch.where(h > 1, next value, value)"
    ),
}


@pytest.mark.parametrize("body", BRANCHES)
def test_the_replacement_of_a_branch_does_what_the_branch_does(body: str, tmp_path: Path) -> None:
    file = tmp_path / "branch.py"
    file.write_text("def mod(score, b, h, q_idx, kv_idx):\n" + textwrap.indent(body, "    "))
    space: dict[str, Any] = {"torch": torch}
    exec(compile(file.read_text(), str(file), "exec"), space)
    message = fails(space["mod"])
    assert message.endswith(f"Write instead: {BRANCHES[body]}")
    if "the value" in BRANCHES[body] or "steps" in BRANCHES[body]:
        return
    exec(f"def said(score, b, h, q_idx, kv_idx):\n    {BRANCHES[body]}\n    return score", space)
    for h, q, kv in itertools.product(range(3), (0, 3, 20), (0, 2)):
        given = (torch.tensor(0.75), *map(torch.tensor, (0, h, q, kv)))
        assert float(space["said"](*given)) == float(space["mod"](*given))


def test_an_error_in_a_helper_names_the_helpers_line() -> None:
    def helper(q_idx: Tensor) -> Tensor:
        return q_idx if q_idx > 3 else -q_idx

    message = fails(lambda s, b, h, q, k: s + helper(q))
    assert f":{helper.__code__.co_firstlineno + 1} uses `if`" in message
    assert message.endswith("torch.where(q_idx > 3, q_idx, -q_idx)")


@pytest.mark.parametrize(
    ("mod", "role", "what", "instead"),
    [
        (lambda b, h, q, k: q >= k and q > 3, "mask_mod", "uses `and`", "(q >= k) & (q > 3)"),
        (lambda b, h, q, k: q >= k or q > 3, "mask_mod", "uses `or`", "(q >= k) | (q > 3)"),
        (lambda b, h, q, k: not q >= k, "mask_mod", "uses `not`", "~(q >= k)"),
        (lambda b, h, q, k: 0 <= q - k < 5, "mask_mod", "chains comparisons", "(0 <= q - k) & (q - k < 5)"),
        (lambda b, h, q, k: 0 <= (q & k) < 5, "mask_mod", "chains comparisons", "(0 <= q & k) & (q & k < 5)"),
        (lambda b, h, q, k: q >= k & q - k < 5, "mask_mod", "by `&` without", "(q >= k) & (q - k < 5)"),
        (lambda b, h, q, k: q > k | k < 5 & h > 1, "mask_mod", "`|` without", "(q > k) | (k < 5) & (h > 1)"),
        (lambda b, h, q, k: max(q, k) < 5, "mask_mod", "builtin `max`", "torch.maximum(q, k)"),
        (lambda b, h, q, k: min(q - k, 8) < 5, "mask_mod", "builtin `min`", "(q - k).clamp(max=8)"),
        (lambda b, h, q, k: max(-1, q) < 5, "mask_mod", "builtin `max`", "q.clamp(min=-1)"),
        (lambda b, h, q, k: k in (1, 4), "mask_mod", "is true", "(x == 1) | (x == 4)"),
        (
            lambda s, b, h, q, k: s + table[b, h, q, k],
            "score_mod",
            "with 4 indices",
            "t[h, q_idx, kv_idx], or whichever",
        ),
        (lambda b, h, q, k: docs[q] - docs[k], "mask_mod", "returns int64 values", "a comparison"),
        (lambda b, h, q, k: None, "mask_mod", "returns nothing", "return q_idx >= kv_idx"),
        (
            lambda s, b, h, q, k: s + q.item(),
            "score_mod",
            "reads the value of a traced tensor with `item`",
            "torch.where",
        ),
        (lambda s, b, h, q, k: s * float(q), "score_mod", "reads the value of a traced tensor", "torch functions"),
        (lambda s, b, h, q, k: s + [1.0, 2.0][h], "score_mod", "where Python needs a number", "values[h]"),
        (lambda s, b, h, q, k: s + {0: 1.0}[h], "score_mod", "in a dictionary or a set", "values[h]"),
        (lambda s, b, h, q, k: s + {0: 1.0}.get(h, 2.0), "score_mod", "in a dictionary or a set", "values[h]"),
        (lambda b, h, q, k: k in {1, 4}, "mask_mod", "in a dictionary or a set", "(x == 1) | (x == 4)"),
        (lambda s, b, h, q, k: s + torch.rand(()), "score_mod", "draws random numbers with `rand`", "noise["),
        (lambda s, b, h, q, k: s + torch.rand_like(s), "score_mod", "rand_like", "noise["),
        (
            lambda s, b, h, q, k: torch.nn.functional.dropout(s),
            "score_mod",
            "draws random numbers with `dropout`",
            "noise[",
        ),
        (
            lambda s, b, h, q, k: s + slopes,
            "score_mod",
            "captured tensor of shape (2,) in `add`",
            "index every dimension",
        ),
        (lambda s, b, h, q, k: s + slopes[h, q], "score_mod", "1 dimensions with 2 indices", "t[h]"),
        (lambda s, b, h, q, k: s + slopes[s], "score_mod", "with a float32 value", "t[index.to(torch.int64)]"),
        (lambda s, b, h, q, k: s + slopes[q > k], "score_mod", "with a bool value", "torch.where"),
        (lambda s, b, h, q, k: s + slopes[None, h], "score_mod", "NoneType", "t[b, h, q_idx, kv_idx]"),
        (lambda s, b, h, q, k: s + (slopes * 2)[h][q], "score_mod", "computed in the mod", "f(t[q_idx])"),
        (
            lambda s, b, h, q, k: slopes.mul_(2)[h] + s,
            "score_mod",
            "writes to a captured tensor with `mul_`",
            "x = t[h] + 1",
        ),
        (lambda s, b, h, q, k: slopes.__setitem__(h, s), "score_mod", "writes to a captured tensor", "outside the mod"),
        (
            lambda s, b, h, q, k: slopes.add_(s),
            "score_mod",
            "writes to a captured tensor with `add`",
            "outside the mod",
        ),
        (lambda s, b, h, q, k: s & q, "score_mod", "applies `and` to float32", "compare first"),
        (lambda s, b, h, q, k: (q > k) - (k > q), "score_mod", "applies `sub` to booleans", ".to(torch.int32)"),
        (
            lambda s, b, h, q, k: torch.cumsum(s, 0),
            "score_mod",
            "`cumsum`, which has no counterpart",
            "supported functions",
        ),
        (lambda s, b, h, q, k: s.to(torch.complex64), "score_mod", "converts to torch.complex64", "float32"),
        (lambda s, b, h, q, k: q**-2 + s, "score_mod", "negative power", ".float() ** -1"),
        (lambda s, b, h, q, k: s + (q + 2**40), "score_mod", "uses the number", "torch.int64"),
        (lambda s, b, h, q, k: torch.where(q, s, 0.0), "score_mod", "int32 condition", "x != 0"),
        (
            lambda s, b, h, q, k: s + torch.zeros(300)[:].sum() + torch.zeros(2, 300)[h].sum(),
            "score_mod",
            "(300,)",
            "index every",
        ),
        (lambda s, b, h, q, k: table[h], "score_mod", "returns a tensor of shape (3, 5)", "every tensor is indexed"),
        (lambda s, b, h, q: s, "score_mod", "takes 4 arguments", "pass it as mask_mod="),
        (lambda b, h, q, k, s: s, "mask_mod", "takes 5 arguments", "pass it as score_mod="),
        (lambda q, k: q > k, "mask_mod", "takes 2 arguments", "def mask_mod(b, h, q_idx, kv_idx)"),
        (torch.ones(3), "mask_mod", "is a Tensor, which cannot be called", "return t[b, h, q_idx, kv_idx]"),
        (torch.ones(3), "score_mod", "is a Tensor, which cannot be called", "return score + t[b, h, q_idx, kv_idx]"),
    ],
)
def test_an_error_says_what_and_what_instead(mod: Any, role: str, what: str, instead: str) -> None:
    message = fails(mod, role)
    first, *_, last = message.split("\n")
    assert what in first
    assert instead in last
    if callable(mod) and "arguments" not in what and "returns" not in what:
        assert f"{role} at {__file__}:" in first


def test_a_mod_may_write_to_what_it_made_itself() -> None:
    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        t = torch.zeros(3)
        t[1] = 2.0
        t.add_(1)
        return score + t[h]

    assert value_at(mod) == 3.5


def test_a_failed_trace_leaves_no_mode_behind() -> None:
    for _ in range(3):
        fails(lambda s, b, h, q, k: s if q > k else -s)
    assert (torch.ones(2) + 1).sum().item() == 4


@pytest.mark.parametrize(
    "mod",
    [
        lambda score, b, h, q_idx, kv_idx: torch.nn.functional.softplus(score, 2.0),
        lambda score, b, h, q_idx, kv_idx: torch.nn.Softplus(3.0, 1.0)(score),
        lambda score, b, h, q_idx, kv_idx: torch.addcmul(score, score, score, value=0.5),
        lambda score, b, h, q_idx, kv_idx: torch.addcdiv(score, score, score * score + 1, value=-2.0),
        lambda score, b, h, q_idx, kv_idx: torch.nn.functional.gelu(score, approximate="tanh"),
    ],
)
def test_options_by_position_and_by_name(mod: Any) -> None:
    at = torch.tensor(0)
    for score in (-2.0, 0.25, 7.0):
        expected = mod(torch.tensor(score), at, at, at, at)
        assert value_at(mod, score=score) == pytest.approx(expected.item(), rel=1e-6)
