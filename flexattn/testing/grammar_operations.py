"""The operations of generated mods: Python source with places for operands, and the function that it means."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import masks, mods

Names = dict[int, tuple[str, ...]]  # by the number of operands

# Functions of torch that take tensors and are named in the source as they are here.
_TORCH: Names = {
    1: ("exp", "log1p", "sigmoid", "sin", "sqrt", "tanh"),
    2: ("logaddexp", "maximum", "minimum", "logical_and"),
    3: ("where",),
}
_MASKS: Names = {
    1: ("causal", "chunked", "document_mask", "global_tokens", "padding", "prefix_lm", "sliding_window", "transfusion"),
    2: ("dilated", "streaming", "window"),
}
_MODS: Names = {1: ("alibi", "relative_bias", "softcap")}


def _named(prefix: str, space: Any, names: Names) -> dict[str, Callable[..., Any]]:
    return {
        f"{prefix}.{name}({', '.join(['{}'] * count)})": getattr(space, name)
        for count, group in names.items()
        for name in group
    }


def _element(t: Tensor, *index: Tensor) -> Tensor:
    return t[index]


def _seeded(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def drawn(*arguments: Any) -> Tensor:
        *rest, seed = arguments
        return draw(*rest, generator=torch.Generator().manual_seed(seed))

    return drawn


_GENERATOR = "generator=torch.Generator().manual_seed({})"

OPERATIONS: dict[str, Callable[..., Any]] = {
    "({} + {})": operator.add,
    "({} - {})": operator.sub,
    "({} * {})": operator.mul,
    "({} @ {})": operator.matmul,
    "({} / {})": operator.truediv,
    "({} // {})": operator.floordiv,
    "({} % {})": operator.mod,
    "({} ** {})": operator.pow,
    "({} >> {})": operator.rshift,
    "({} & {})": operator.and_,
    "({} | {})": operator.or_,
    "({} ^ {})": operator.xor,
    "({} < {})": operator.lt,
    "({} <= {})": operator.le,
    "({} == {})": operator.eq,
    "({} != {})": operator.ne,
    "({} >= {})": operator.ge,
    "({} > {})": operator.gt,
    "(~{})": operator.invert,
    "(-{})": operator.neg,
    "abs({})": operator.abs,
    "{}[{}]": _element,
    "{}[{}, {}]": _element,
    "{}[{}, {}, {}]": _element,
    "{}.clamp({}, {})": Tensor.clamp,
    "{}.int()": Tensor.int,
    "{}.sort().values": lambda t: t.sort().values,
    "{}.sum(-1)": lambda t: t.sum(-1),
    "{}.to({}.dtype)": lambda t, like: t.to(like.dtype),
    "{}.unsqueeze(-1)": lambda t: t.unsqueeze(-1),
    "torch.nn.functional.softplus({})": torch.nn.functional.softplus,
    "torch.nn.functional.elu({})": torch.nn.functional.elu,
    "torch.add({}, {}, alpha=0.5)": lambda x, y: torch.add(x, y, alpha=0.5),
    "torch.tensor({})": torch.tensor,
    f"torch.rand({{}}, {_GENERATOR})": _seeded(torch.rand),
    f"torch.randn({{}}, {_GENERATOR})": _seeded(torch.randn),
    f"torch.randint({{}}, {{}}, {{}}, {_GENERATOR})": _seeded(torch.randint),
    "flexattn.and_masks({}, {})": masks.and_masks,
    "flexattn.or_masks({}, {})": masks.or_masks,
    "flexattn.not_mask({})": masks.not_mask,
    "flexattn.masks.causal_mask": lambda: masks.causal_mask,
    "flexattn.masks.noop_mask": lambda: masks.noop_mask,
    "flexattn.mods.identity": lambda: mods.identity,
    "flexattn.mods.compose({}, {})": mods.compose,
    **_named("torch", torch, _TORCH),
    **_named("flexattn.masks", masks, _MASKS),
    **_named("flexattn.mods", mods, _MODS),
}
