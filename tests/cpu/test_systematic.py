"""Systematic errors in 16 bits, each smaller than the rounding of an element, are found; what is right is not suspected."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flexattn
from flexattn import masks
from flexattn.testing import Sizes, assert_matches_reference, case, matches, strategies
from flexattn.testing.systematic import Drift, projections

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SHAPE = Sizes()
NUMBER = r"(\d[\d.e-]*)"
ALONE = SHAPE._replace(Hkv=4)  # heads that are not grouped


class Scaled(torch.autograd.Function):
    """x, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Any) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


class Fault(NamedTuple):
    """`flex_attention` in float32, rounded once, with a fault: what is done to one of query, key, value, out and lse."""

    tensor: str
    change: Callable[[Tensor], Tensor]

    def apply(self, name: str, x: Tensor) -> Tensor:
        return self.change(x) if name == self.tensor else x

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
        wide = (self.apply(n, t.float()) for n, t in (("query", q), ("key", k), ("value", v)))
        out, aux = flexattn.flex_attention(*wide, *rest, **options)
        return self.apply("out", out).to(q.dtype), aux._replace(lse=self.apply("lse", aux.lse))


def scaled(x: Tensor, factor: Any) -> Tensor:
    return Scaled.apply(x, factor)  # type: ignore[no-untyped-call, no-any-return]


def of_head(x: Tensor, head: int, off: float) -> Tensor:
    """Factors, all of them one but that of a head."""
    factors = torch.ones(x.shape[1], 1, 1)
    factors[head] += off
    return factors


def last_tile(x: Tensor, off: float) -> Tensor:
    return torch.cat([x[:, :, :128], (1 - off) * x[:, :, 128:]], 2)


# What is off, by how much in bfloat16, and what is said about it. In float16 it is off by an eighth of that.
FAULTS: dict[str, tuple[str, Callable[[Tensor, float], Tensor], float, str]] = {
    "out": ("out", lambda x, off: x * (1 + off), 0.002, "out is # % too large on average"),
    "out, other sign": ("out", lambda x, off: x * (1 - off), 0.002, "out is # % too small on average"),
    "a head": ("out", lambda x, off: x * of_head(x, 2, off), 0.003, "out is # % too large on average over h=2"),
    "last tile": ("out", last_tile, 0.003, "out is # % too small on average over q_idx 128 to 159"),
    "dq": ("query", lambda x, off: scaled(x, 1 + off), 0.003, "dq is # % too large on average"),
    "dk": ("key", lambda x, off: scaled(x, 1 - off), 0.003, "dk is # % too small on average"),
    "dv": ("value", lambda x, off: scaled(x, 1 + off), 0.003, "dv is # % too large on average"),
    "dk of a head": ("key", lambda x, off: scaled(x, of_head(x, 1, off)), 0.004, "dk is # % too large on average over h_kv=1"),
    "dlse": ("lse", lambda x, off: scaled(x, 1 - off), 0.012, "dq is as with a delta # % too small"),
}  # fmt: skip


def failure(**arguments: Any) -> str:
    with pytest.raises(AssertionError) as found:
        assert_matches_reference(**arguments)
    return str(found.value)


@HALVES
@pytest.mark.parametrize("name", FAULTS)
def test_a_systematic_error_of_a_backend(name: str, dtype: torch.dtype) -> None:
    tensor, change, off, words = FAULTS[name]
    off = off if dtype is torch.bfloat16 else off / 8
    fault = Fault(tensor, lambda x: change(x, off))
    with (
        patch.object(case, "flex_attention", fault.attention),
        patch.object(matches, "smallest", lambda sizes, *_: sizes),
    ):
        text = failure(dtype=dtype, shape=SHAPE)
    found = re.search(words.replace("#", NUMBER) + f".*allowed {NUMBER} %", text)
    assert found is not None, text
    part = 0.6 if name == "dlse" else 1.0  # the rest of delta is right
    assert part * off / 2 < float(found[1]) / 100 < off * 1.2 and float(found[2]) < float(found[1]), text
    assert "Every element is within its own rounding" in text and "is wrong in" not in text
    assert ("Delta is what the backward subtracts" in text) == (name == "dlse")


@HALVES
def test_the_same_without_a_fault(dtype: torch.dtype) -> None:
    right = Fault("none", lambda x: x)
    with patch.object(case, "flex_attention", right.attention):
        assert_matches_reference(dtype=dtype, shape=SHAPE)
        assert_matches_reference(lambda s, b, h, q, k: s - 0.1 * (q - k), masks.causal_mask, dtype=dtype, shape=SHAPE)


def test_a_small_term_that_is_missing() -> None:
    """A bias of 0.003 times the score, in bfloat16, of which only an lse in float32 shows anything in an element."""

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score - 0.006 * torch.relu(score)

    with patch.object(matches, "smallest", lambda sizes, *_: sizes):
        text = failure(score_mod=mod, attention=with_scale(1.0), dtype=torch.bfloat16, shape=ALONE)
    assert "is wrong in" not in text and "out is" in text and "too large" in text, text


def with_scale(factor: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scale = factor / math.sqrt(query.shape[-1])
        scores = torch.softmax(query.float() @ key.float().mT * scale, -1)
        return (scores @ value.float()).to(query.dtype)

    return attention


def test_a_scale_that_is_off_in_an_attention_of_ones_own() -> None:
    """By 0.3 %."""
    assert_matches_reference(attention=with_scale(1.0), dtype=torch.bfloat16, shape=ALONE)
    with patch.object(matches, "smallest", lambda sizes, *_: sizes):
        text = failure(attention=with_scale(1.003), dtype=torch.bfloat16, shape=ALONE)
    assert "is wrong in" not in text
    assert all(re.search(f"{name} is .* too large", text) for name in ("out", "dq", "dk", "dv")), text


def test_the_smallest_sizes_at_which_it_shows_fail_again() -> None:
    def large(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (1.01 * with_scale(1.0)(query.float(), key.float(), value.float())).to(query.dtype).detach()

    shape = Sizes(B=1, Hq=2, Hkv=2, L=96, S=64, E=16, Ev=16)
    text = failure(attention=large, dtype=torch.float16, shape=shape)
    found = re.search(r"^At Sizes\((.*)\), the smallest that fails", text, re.MULTILINE)
    assert found is not None, text
    sizes = Sizes(**{name: int(n) for name, n in re.findall(r"(\w+)=(\d+)", found[1])})
    assert math.prod(sizes) < math.prod(shape)
    line = next(line for line in text.splitlines() if line.startswith("  out is"))
    assert line in failure(attention=large, dtype=torch.float16, shape=sizes)


def cut(x: Tensor) -> Tensor:
    """Truncated to bfloat16."""
    return (x.contiguous().view(torch.int32) & -65536).view(torch.float32)


class Flash(torch.autograd.Function):
    """FlashAttention-2's order of operations, with any rounding of the weights and of what is stored."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, weights: Any, stored: Any, base: float) -> Tensor:
        wide = q.float(), k.float(), v.float()
        ctx.scale, ctx.weights, ctx.stored, ctx.dtype = 1 / math.sqrt(q.shape[-1]), weights, stored, q.dtype
        score = wide[0] @ wide[1].mT * (ctx.scale * math.log2(math.e))
        p = torch.exp2(score - score.amax(-1, keepdim=True) + base)
        total = p.sum(-1, keepdim=True)
        ctx.out = stored(weights(p) @ wide[2] / total)
        ctx.p, ctx.wide = p / total, wide
        return ctx.out.to(q.dtype)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v), do = ctx.wide, gradients[0].float()
        delta = (do * ctx.out).sum(-1, keepdim=True)
        ds = ctx.weights(ctx.p * (do @ v.mT - delta))
        made = ctx.scale * ds @ k, ctx.scale * ds.mT @ q, ctx.weights(ctx.p).mT @ do
        return *(ctx.stored(t).to(ctx.dtype) for t in made), None, None, None


def flash(weights: Any, stored: Any, base: float = 0.0) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: Flash.apply(q, k, v, weights, stored, base)  # type: ignore[no-untyped-call, no-any-return]


def nearest(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).float()


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.mT / math.sqrt(query.shape[-1]), -1) @ value


def scaled_query(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax((query / math.sqrt(query.shape[-1])) @ key.mT, -1) @ value


def scaled_both(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    root = query.shape[-1] ** -0.25
    return torch.softmax((query * root) @ (key * root).mT, -1) @ value


def right_ones(dtype: torch.dtype) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Attentions that round in different places."""
    made = {
        "fused": torch.nn.functional.scaled_dot_product_attention,
        "plain": plain,
        "scaled query": scaled_query,
        "scaled both": scaled_both,
        "flash": flash(nearest(dtype), nearest(dtype)),
        "flash, another base": flash(nearest(dtype), nearest(dtype), 0.37),
        "flash, weights not rounded": flash(lambda x: x, nearest(dtype)),
    }
    if dtype is torch.bfloat16:
        made["flash, truncated weights"] = flash(cut, nearest(dtype))
        made["flash, truncated"] = flash(cut, cut)
    return made


def operands(kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Query, key and value, all or parts of which are alike."""
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, 96, n, generator=g) for n in (16, 16, 8))
    q = {"equal rows": q[:, :, :1].expand_as(q), "equal weights": 0 * q, "small": 1e-3 * q, "large": 4 * q}.get(kind, q)
    v = {"equal values": v[:, :, :1].expand_as(v), "one value": torch.full_like(v, 1.3)}.get(kind, v)
    return {n: t.to(dtype).contiguous() for n, t in (("query", q), ("key", k), ("value", v))}


@HALVES
@pytest.mark.parametrize("kind", ["", "equal rows", "equal weights", "equal values", "one value", "small", "large"])
def test_roundings_in_other_places_and_numbers_that_are_alike(kind: str, dtype: torch.dtype) -> None:
    for name, attention in right_ones(dtype).items():
        try:
            assert_matches_reference(attention=attention, **operands(kind, dtype))
        except AssertionError as error:
            raise AssertionError(f"{name}, {kind}: {error}") from None


def largest(**arguments: Any) -> Drift | None:
    """The projection that is nearest to what is allowed, or beyond."""
    seen: list[Drift] = []

    def spy(found: Any, judged: Any) -> list[Drift]:
        seen.extend(projections(found, judged))
        return []

    with patch.object(case, "drifts", spy):
        assert_matches_reference(**arguments)
    return max((d for d in seen if d.found), key=lambda d: d.ratio, default=None)


@settings(max_examples=25)
@given(
    mod=st.none() | strategies.score_mods(requires_grad=True, length=64),
    mask=st.none() | strategies.mask_mods(length=64),
    shape=strategies.sizes(length=64),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    backend=st.sampled_from(["tiled", "reference"]),
    seed=st.integers(0, 1 << 20),
)
def test_what_is_right_stays_far_from_what_is_allowed(
    mod: Any, mask: Any, shape: Sizes, dtype: torch.dtype, backend: str, seed: int
) -> None:
    worst = largest(score_mod=mod, mask_mod=mask, shape=shape, dtype=dtype, backend=backend, seed=seed)
    assert worst is None or worst.ratio < 0.6, worst


def test_a_captured_tensor_that_no_score_depends_on() -> None:
    table = torch.randn(40, requires_grad=True)

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.where(kv_idx > kv_idx, score + table[kv_idx], -float("inf"))

    assert_matches_reference(mod, dtype=torch.bfloat16, shape=Sizes(1, 2, 1, 20, 40, 8, 8))


def test_float32_needs_no_projections() -> None:
    assert largest(shape=SHAPE._replace(B=1), dtype=torch.float32) is None
