"""Mods that read learned tensors in every pattern there is: named cases, and a strategy. They know of no backend."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import torch
from strategies import Mod, Shape
from torch import Tensor

# What the learned tensors are, N = max(L, S), and how they are read.
SIZES = {
    "scalar": "",
    "head": "H",
    "heads": "B H",
    "gate": "B H N",
    "position": "N",
    "table": "H 2N",
    "pair": "N N+1",
    "pairs": "H N N",
    "between": "B N H N",
}
READS = {
    "scalar": ["{t}"],
    "head": ["{t}[h]", "{t}[h // 2]", "{t}[group[h]]", "{t}[(h + q_idx) % H]", "{t}[(kv_idx - q_idx) % H]"],
    "heads": ["{t}[b, h]", "{t}[b, group[h]]", "{t}[b, kv_idx % H]"],
    "gate": ["{t}[b, h, q_idx]", "{t}[b, h, kv_idx]", "{t}[b, h, docs[q_idx]]", "{t}[b, h, (q_idx + kv_idx) // 2]"],
    "position": ["{t}[q_idx]", "{t}[kv_idx]", "{t}[docs[kv_idx]]", "{t}[abs(q_idx - kv_idx)]", "{t}[q_idx // 3]"],
    "table": [
        *("{t}[h, q_idx - kv_idx + N]", "{t}[h, kv_idx - q_idx]", "{t}[h, (q_idx - kv_idx + offset[b]) % N]"),
        *("{t}[h, torch.where(kv_idx > q_idx, 5, (q_idx - kv_idx).clamp(0, 4))]", "{t}[h, kv_idx]"),
        "{t}[h, torch.log((q_idx - kv_idx).abs().float() + 1).long()]",
    ],
    "pair": [
        *("{t}[q_idx, kv_idx]", "{t}[kv_idx, q_idx]", "{t}[q_idx, kv_idx + 1]", "{t}[docs[q_idx], docs[kv_idx]]"),
        *("{t}[q_idx, q_idx]", "{t}[q_idx, kv_idx + 2]", "{t}[2, kv_idx]", "{t}[q_idx // 16, kv_idx // 16]"),
    ],
    "pairs": [
        "{t}[h, q_idx, kv_idx]",
        "{t}[h, kv_idx, q_idx]",
        "{t}[group[h], q_idx, kv_idx]",
        "{t}[0, q_idx, kv_idx]",
    ],
    "between": ["{t}[b, q_idx, h, kv_idx]", "{t}[b, kv_idx, h, q_idx]", "{t}[0, q_idx, h // 2, kv_idx]"],
}
MASKS = (
    None,
    "q_idx >= kv_idx",
    "docs[q_idx] == docs[kv_idx]",
    "(kv_idx <= q_idx) & (q_idx - kv_idx < 9)",
    "(q_idx // 16 + kv_idx // 16) % 3 != 1",
    "(h != 1) & (q_idx // 16 != kv_idx // 16 + b)",
)
LAYOUTS = ("plain", "strided", "transposed", "expanded")


@dataclass(frozen=True)
class Made:
    """A case with its tensors: sources, and what their names stand for."""

    case: LearnedMod
    environment: dict[str, Any]

    @property
    def learned(self) -> list[Tensor]:
        return [self.environment[t.name] for t in self.case.tensors]

    @property
    def mods(self) -> tuple[Any, Any]:
        """score_mod and mask_mod."""
        mask = None if self.case.mask is None else Mod("b, h, q_idx, kv_idx", self.case.mask)
        score = Mod("score, b, h, q_idx, kv_idx", self.case.body)
        return score.bind(self.environment), None if mask is None else mask.bind(self.environment)

    def double(self) -> Made:
        """The same in float64."""
        double = {t.name: self.environment[t.name].detach().double().requires_grad_() for t in self.case.tensors}
        return replace(self, environment={**self.environment, **double})


@dataclass(frozen=True)
class Learned:
    """A learned tensor of one of the `SIZES`."""

    name: str
    kind: str
    dtype: torch.dtype = torch.float32
    layout: str = "plain"

    def make(self, sizes: dict[str, int], g: torch.Generator) -> Tensor:
        shape = [sizes[n] for n in SIZES[self.kind].split()]
        values = torch.randn([2 * n for n in shape], generator=g, dtype=torch.float64).mul(0.3).to(self.dtype)
        match self.layout:
            case "strided":
                tensor = values[tuple(slice(0, None, 2) for _ in shape)]
            case "transposed":
                tensor = (
                    values[tuple(slice(n) for n in shape)].mT.contiguous().mT if len(shape) > 1 else values[: shape[0]]
                )
            case "expanded":
                tensor = values[tuple(slice(1) for _ in shape[:1]) + tuple(slice(n) for n in shape[1:])].expand(shape)
            case _:
                tensor = values[tuple(slice(n) for n in shape)].contiguous()
        return tensor.detach().requires_grad_()


@dataclass(frozen=True)
class LearnedMod:
    """A score_mod and a mask_mod as source, and the learned tensors they name."""

    body: str
    tensors: tuple[Learned, ...]
    mask: str | None = None

    def make(self, shape: Shape, seed: int = 0) -> Made:
        g = torch.Generator().manual_seed(seed)
        n = max(shape.L, shape.S, 12)
        sizes = {"B": shape.B, "H": shape.H, "N": n, "2N": 2 * n, "N+1": n + 1}
        constants = {
            "torch": torch,
            "docs": torch.randint(0, 4, (n,), generator=g).sort().values,
            "group": torch.randint(0, shape.H, (shape.H,), generator=g),
            "offset": torch.randint(0, 5, (shape.B,), generator=g),
            "N": n,
            "H": shape.H,
        }
        return Made(self, {**constants, **{t.name: t.make(sizes, g) for t in self.tensors}})


def _case(body: str, mask: str | None = None, **kinds: str) -> LearnedMod:
    return LearnedMod(body, tuple(Learned(name, kind) for name, kind in kinds.items()), mask)


_CAUSAL, _WINDOW, _SPARSE = MASKS[1], MASKS[3], MASKS[4]
CASES = {
    "alibi": _case("score + t[h] * (kv_idx - q_idx)", _CAUSAL, t="head"),
    "t5": _case(
        "score + t[h, torch.where(q_idx - kv_idx < 4, q_idx - kv_idx,"
        " torch.log((q_idx - kv_idx).clamp(1).float()).long() + 3)]",
        _CAUSAL,
        t="table",
    ),
    "relative": _case("score + t[h, kv_idx - q_idx + N - 1]", None, t="table"),
    "forgetting gates": _case("score + t[b, h, q_idx] - t[b, h, kv_idx]", _CAUSAL, t="gate"),
    "pair bias": _case("score + t[h, q_idx, kv_idx]", _CAUSAL, t="pairs"),
    "pair bias, transposed": _case("score + t[kv_idx, q_idx] * u[b, h]", _SPARSE, t="pair", u="heads"),
    "pair bias, heads between": _case("score + t[b, q_idx, h, kv_idx]", _WINDOW, t="between"),
    "routed": _case("score + t[docs[q_idx], docs[kv_idx]]", _CAUSAL, t="pair"),
    "temperature": _case("score * torch.exp(t)", _WINDOW, t="scalar"),
    "softcapped": _case("5 * torch.tanh((score + t[h] + u[b, h, kv_idx]) / 5)", _SPARSE, t="head", u="gate"),
    "soft window": _case(
        "score + torch.log(torch.sigmoid(t[h] * 0.2 * (kv_idx - q_idx) + u[b, h, q_idx]))", _CAUSAL, t="head", u="gate"
    ),
    "one tensor everywhere": _case(
        "score * torch.sigmoid(t[q_idx, kv_idx]) + t[kv_idx, q_idx] * t[2, kv_idx]"
        " - t[docs[q_idx], docs[kv_idx]] + t[q_idx, 1]",
        _SPARSE,
        t="pair",
    ),
    "read by the score": _case("score + t[h, (score.clamp(-3, 3) * 2).long()]", None, t="table"),
}


DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@st.composite
def learned_mods(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> LearnedMod:
    """One to three learned tensors, read at one to four places, added, multiplied, or through something smooth."""
    kinds = draw(st.lists(st.sampled_from(sorted(SIZES)), min_size=1, max_size=3))
    tensors = tuple(
        Learned(
            "tuv"[i],
            kind,
            draw(st.sampled_from(dtypes)),
            draw(st.sampled_from(LAYOUTS)) if SIZES[kind] else "plain",
        )
        for i, kind in enumerate(kinds)
    )
    reads = st.one_of(*(st.sampled_from(READS[t.kind]).map(lambda s, name=t.name: s.format(t=name)) for t in tensors))
    terms = st.one_of(
        reads,
        st.builds("{} * {}".format, reads, reads),
        st.builds("torch.tanh({} + 0 * q_idx)".format, reads),
        st.builds("{} * 0.1 * (kv_idx - q_idx)".format, reads),
        st.builds("torch.log(torch.sigmoid({} * 0.2 * (kv_idx - q_idx) + {}))".format, reads, reads),
        st.builds("torch.where(kv_idx > 5, {}, -{})".format, reads, reads),
    )
    first = draw(
        st.sampled_from(["score", "score", "2 * torch.tanh(score / 2)"])
        | st.builds("score * torch.sigmoid({} + 0 * q_idx)".format, reads)
    )
    rest = draw(st.lists(terms, min_size=1, max_size=3))
    return LearnedMod(" + ".join([first, *rest]), tensors, draw(st.sampled_from(MASKS)))


@st.composite
def learned_shapes(draw: st.DrawFn) -> Shape:
    """Small problems whose lengths differ and divide nothing."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (1, 4), (3, 1)]))
    L, S = draw(st.integers(1, 75)), draw(st.integers(1, 75))
    block = draw(st.sampled_from([(16, 16), (16, 16), (32, 16), (128, 128)]))
    return Shape(draw(st.integers(1, 2)), kv_heads, group, L, S, 8, draw(st.sampled_from([4, 8])), block, False)
