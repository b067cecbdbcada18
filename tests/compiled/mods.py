"""Ways to write a mod and to capture what it reads, as functions of (query, key, value, gate) to be compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexattn import AuxRequest, and_masks, create_block_mask, flex_attention, masks, mods

B, H, L, D = 2, 4, 70, 8
Call = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
CALLS: dict[str, dict[str, Call]] = {}

slopes = torch.rand(H, requires_grad=True)
TEMPERATURE = 0.5
ids = torch.arange(L) // 20
causal = create_block_mask(masks.causal_mask, None, None, L, L, "cpu", 32)


class Layer(nn.Module):
    """Holds everything that a mod may read of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.rand(H))
        self.register_buffer("table", torch.rand(H, L, L))
        self.scale = 0.7
        self.window = 9
        self.config = {"cap": 20.0}
        self.gains = nn.ParameterList([nn.Parameter(torch.rand(H))])

    def bias(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score * self.scale + self.slopes[h] * (kv_idx - q_idx) + self.table[h, q_idx, kv_idx]

    def near(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx - kv_idx < self.window


class ModuleMod(nn.Module):
    """A mod that is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.rand(H))

    def forward(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + self.slopes[h] * (kv_idx - q_idx)


class ObjectMod:
    """A mod that is an object."""

    def __init__(self) -> None:
        self.slopes = torch.rand(H)

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + self.slopes[h] * (kv_idx - q_idx)


@dataclass(frozen=True)
class Window:
    """A mask with a parameter."""

    size: int

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= kv_idx) & (q_idx - kv_idx < self.size)


layer, module_mod, object_mod, window = Layer(), ModuleMod(), ObjectMod(), Window(7)
LEAVES = [slopes, *layer.parameters(), *module_mod.parameters()]


def outside(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + slopes[h] * (kv_idx - q_idx)


def given_slopes(w: Tensor, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + w[h] * (kv_idx - q_idx)


def named_slopes(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, *, w: Tensor) -> Tensor:
    return score + w[h] * (kv_idx - q_idx)


def steeper(w: Tensor, factor: float) -> Callable[..., Tensor]:
    return lambda score, b, h, q_idx, kv_idx: given_slopes(w, score, b, h, q_idx, kv_idx) * factor


def call(feature: str) -> Callable[[Call], Call]:
    """Files a call under a feature."""

    def file(function: Call) -> Call:
        CALLS.setdefault(feature, {})[function.__name__] = function
        return function

    return file


@call("no mod")
def plain(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return flex_attention(q, k, v)


@call("a mod from outside the compiled function")
def a_global_tensor(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return flex_attention(q, k, v, outside, causal)


@call("a mod from outside the compiled function")
def a_global_number(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return flex_attention(q, k, v, lambda score, b, h, q_idx, kv_idx: score * TEMPERATURE)


@call("an intermediate of the graph")
def an_intermediate(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    gain = gate.exp()
    mod = lambda score, b, h, q_idx, kv_idx: torch.where(q_idx > kv_idx, score * gain[h], score) - 0.5
    return flex_attention(q * 2, k, v, mod, causal).sin()


@call("an intermediate of the graph")
def computed_in_the_mod(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return flex_attention(q, k, v, lambda score, b, h, q_idx, kv_idx: score * gate.exp()[h])


@call("an intermediate of the graph")
def a_scalar_tensor(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    mean = gate.mean()
    return flex_attention(q, k, v, lambda score, b, h, q_idx, kv_idx: score * mean)


@call("an intermediate of the graph")
def one_layer_after_another(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    for factor in (0.1, 0.2, 0.3):
        q = flex_attention(q, k, v, lambda score, b, h, q_idx, kv_idx: score * factor + gate[h], causal)
    return q


@call("buffers, parameters and attributes of a module")
def a_bound_method(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return flex_attention(q, k, v, layer.bias, causal)


@call("buffers, parameters and attributes of a module")
def a_bound_mask(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return flex_attention(q, k, v, mask_mod=layer.near)


@call("buffers, parameters and attributes of a module")
def containers_of_a_module(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return layer.config["cap"] * torch.tanh((score + layer.gains[0][h]) / layer.config["cap"])

    return flex_attention(q, k, v, mod)


@call("callable objects")
def a_module(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return flex_attention(q, k, v, module_mod, causal)


@call("callable objects")
def an_object(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return flex_attention(q, k, v, object_mod, mask_mod=window)


@call("partials")
def a_partial(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return flex_attention(q, k, v, functools.partial(given_slopes, gate), causal)


@call("partials")
def a_partial_by_name(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return flex_attention(q, k, v, functools.partial(named_slopes, w=gate), causal)


@call("closures")
def a_closure(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return flex_attention(q, k, v, steeper(gate, 2.5), causal)


@call("closures")
def a_number_of_the_shape(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    half = q.shape[2] // 2
    return flex_attention(q, k, v, lambda score, b, h, q_idx, kv_idx: score + (q_idx > half) * gate[h])


@call("ready-made mods and masks")
def soft_capped(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    mask = and_masks(masks.document_mask(ids), masks.causal_mask)
    return flex_attention(q, k, v, mods.softcap(30.0), mask_mod=mask)


@call("ready-made mods and masks")
def a_window(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return flex_attention(q, k, v, mods.alibi(gate), mask_mod=and_masks(masks.causal_mask, masks.sliding_window(9)))


@call("writing to the score")
def in_place(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        score += gate[h]
        return score.mul_(0.5)

    return flex_attention(q, k, v, mod)


@call("functions of torch and of Python")
def many_functions(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        score = torch.maximum(score, -score * gate[h]).clamp(-3, 3) - abs(q_idx - kv_idx) * gate[h] / 30
        return torch.where((q_idx - kv_idx) % 2 == 0, score, score.to(torch.float32) * 0.5)

    return flex_attention(q, k, v, mod)


@call("functions of torch and of Python")
def one_index_after_another(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    table = gate[:, None] * torch.ones(H, L)
    return flex_attention(q, k, v, lambda score, b, h, q_idx, kv_idx: score + table[h][q_idx])


@call("create_block_mask inside")
def a_mask_of_the_shape(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    reach = (gate.detach() * 10).long()
    mask = lambda b, h, q_idx, kv_idx: q_idx - kv_idx < reach[h] + b + 1
    made = create_block_mask(mask, *q.shape[:3], k.shape[2], device=q.device, BLOCK_SIZE=32)
    return flex_attention(q, k, v, block_mask=made)


@call("create_block_mask inside")
def a_mask_of_documents(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    mask = lambda b, h, q_idx, kv_idx: (ids[q_idx] == ids[kv_idx]) & (q_idx >= kv_idx)
    made = create_block_mask(mask, None, None, L, L, device="cpu", BLOCK_SIZE=32)
    return flex_attention(q, k, v, block_mask=made)


@call("block masks cut, moved and combined inside")
def parts_of_masks(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    cropped = flex_attention(q[:, :, :33], k[:, :, :50], v[:, :, :50], block_mask=causal._adjust(33, 50))
    rows = flex_attention(q[:, :, 32:64], k, v, block_mask=causal[:, :, 1:2])
    step = flex_attention(q[:, :, 40:41], k, v, block_mask=causal.offset(q=40, Q_LEN=1))
    both = flex_attention(q, k, v, block_mask=causal & causal)
    return torch.cat([cropped, rows, step, both], 2)


@call("grouped heads, lse and max_scores")
def grouped(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    mod = lambda score, b, h, q_idx, kv_idx: score + gate[h]
    out, aux = flex_attention(
        q, k[:, :2], v[:, :2], mod, causal, enable_gqa=True, return_aux=AuxRequest(lse=True, max_scores=True)
    )
    assert aux.lse is not None and aux.max_scores is not None
    return out * aux.lse.unsqueeze(-1) + aux.max_scores.unsqueeze(-1)


@call("every backend")
def of_every_backend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    mod = lambda score, b, h, q_idx, kv_idx: score + gate[h]
    made: Any = [flex_attention(q, k, v, mod, causal, scale=0.3, backend=name) for name in ("tiled", "reference")]
    return torch.cat(made)
