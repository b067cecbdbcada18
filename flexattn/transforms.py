"""Attention under `torch.func`: grad, vmap, jacrev, in any nesting.

An operator's autograd kernel cannot run while a transform is active, so a call then goes through an autograd function that
transforms know how to handle; its body is the same operators. For `vmap` each operator says how N calls are one: the
new dimension becomes part of the batch, and the program reads tensors that differ between the N at `b // B`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, validate
from .codegen.batching import folded
from .codegen.pipeline import variant


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: Sequence[Tensor],
    block_mask: Sequence[Tensor],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`flexattn::forward`, with its arguments, where transforms are active."""
    ints, floats, block_size, *rest = options
    options = (list(ints), floats, list(block_size), *rest)
    made: tuple[Tensor, Tensor, Tensor] = _Forward.apply(
        len(captured), options, query, key, value, *captured, *block_mask
    )  # type: ignore[no-untyped-call]
    return made


class _Forward(torch.autograd.Function):
    """`flexattn::forward` and its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(n: int, options: tuple[Any, ...], *tensors: Tensor) -> Any:
        q, k, v, *rest = tensors
        return ops.FORWARD(q, k, v, rest[:n], rest[n:], *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        n, options, q, k, v, *rest = inputs
        out, lse, max_scores = output
        ctx.n, ctx.options = n, options
        ctx.wanted = [i for i in range(n) if ctx.needs_input_grad[5 + i]]
        ctx.mark_non_differentiable(max_scores)
        ctx.save_for_backward(q, k, v, out, lse, *rest)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor, _: Tensor) -> Any:
        q, k, v, out, lse, *rest = ctx.saved_tensors
        given = (q, k, v, out, lse, dout, dlse)
        dq, dk, dv, *found = _Backward.apply(ctx.n, ctx.options, ctx.wanted, *given, *rest)  # type: ignore[no-untyped-call]
        captured: list[Tensor | None] = [None] * len(rest)
        for i, grad in zip(ctx.wanted, found, strict=True):
            captured[i] = grad
        return None, None, dq, dk, dv, *captured

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(validate.NO_FORWARD_MODE)


class _Backward(torch.autograd.Function):
    """`flexattn::backward`, which has no gradient. Transforms ask for one whether it is used or not."""

    generate_vmap_rule = True

    @staticmethod
    def forward(n: int, options: tuple[Any, ...], wanted: list[int], *tensors: Tensor) -> Any:
        rest = tensors[7:]
        dq, dk, dv, found = ops.BACKWARD(*tensors[:7], rest[:n], rest[n:], *options, wanted)
        return dq, dk, dv, *found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(ops.NO_SECOND_DERIVATIVE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(validate.NO_FORWARD_MODE)


# ---- vmap


def _first(t: Tensor, dim: int | None, n: int) -> Tensor:
    """The tensor with the dimension that is mapped over in front."""
    return t.unsqueeze(0).expand(n, *t.shape) if dim is None else t.movedim(dim, 0)


def _joined(t: Tensor, dim: int | None, n: int, B: int) -> Tensor:
    """[N, B or 1, ...] as [N * B, ...]."""
    t = _first(t, dim, n)
    return t.expand(n, B, *t.shape[2:]).flatten(0, 1)


def _batch_of(query: Tensor, dim: int | None) -> int:
    return query.shape[0] if dim is None else query.movedim(dim, 0).shape[1]


def _program(
    text: str, captured: Sequence[Tensor], dims: Sequence[int | None], ints: Sequence[int], n: int, B: int
) -> tuple[str, list[Tensor], list[int]]:
    """The program of N batches in one, the captured tensors it reads, and its run-time integers."""
    n_tensors = len(variant(text).captured)
    if any(d is not None for d in dims[n_tensors:]):
        raise NotImplementedError("a symbolic number that a mod reads cannot be mapped over; make it a tensor")
    made = folded(text, [d is not None for d in dims[:n_tensors]])
    tensors = [t if d is None else _first(t, d, n) for t, d in zip(captured, dims, strict=True)]
    return made, tensors, [*ints, B] if made != text else list(ints)


def _lists(block_mask: Sequence[Tensor], dims: Sequence[int | None], n: int, B: int) -> list[Tensor]:
    if all(d is None for d in dims):  # what is the same for all of a batch is the same for all of N
        return [t if t.shape[0] == 1 else _joined(t, None, n, B) for t in block_mask]
    return [_joined(t, d, n, B) for t, d in zip(block_mask, dims, strict=True)]


def _keys(t: Tensor, dim: int | None, n: int, B: int) -> Tensor:
    """Keys or values, for which a batch of 1 that all share needs no copies."""
    return t if dim is None and t.shape[0] == 1 and n * B > 1 else _joined(t, dim, n, B)


def _forward_of_many(
    info: Any,
    dims: tuple[Any, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: Sequence[Tensor],
    block_mask: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    block_size: Sequence[int],
    program: str,
    scale: float,
    backend: str,
    options: str,
) -> Any:
    n, B = info.batch_size, _batch_of(query, dims[0])
    text, tensors, numbers = _program(program, captured, dims[3], ints, n, B)
    shared = dims[1] is None and dims[2] is None  # keys and values have one batch size
    k, v = (_keys(t, d, n, B) if shared else _joined(t, d, n, B) for t, d in ((key, dims[1]), (value, dims[2])))
    found = ops.FORWARD(
        _joined(query, dims[0], n, B), k, v, tensors, _lists(block_mask, dims[4], n, B), numbers, floats, block_size, text,
        scale, backend, options,
    )  # fmt: skip
    return tuple(t.unflatten(0, (n, B)) for t in found), (0, 0, 0)


def _backward_of_many(
    info: Any,
    dims: tuple[Any, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    captured: Sequence[Tensor],
    block_mask: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    block_size: Sequence[int],
    program: str,
    scale: float,
    backend: str,
    options: str,
    wanted: Sequence[int],
) -> Any:
    n, B = info.batch_size, _batch_of(query, dims[0])
    # Each of the N has gradients of its own, also of what all of them read.
    captured = [_first(t, d, n) if i in wanted else t for i, (t, d) in enumerate(zip(captured, dims[7], strict=True))]
    captured_dims = [0 if i in wanted else d for i, d in enumerate(dims[7])]
    text, tensors, numbers = _program(program, captured, captured_dims, ints, n, B)
    given = [_joined(t, d, n, B) for t, d in zip((query, key, value, out, lse, dout), dims, strict=False)]
    dq, dk, dv, found = ops.BACKWARD(
        *given, None if dlse is None else _joined(dlse, dims[6], n, B), tensors, _lists(block_mask, dims[8], n, B),
        numbers, floats, block_size, text, scale, backend, options, wanted,
    )  # fmt: skip
    dq, dk, dv = (t.unflatten(0, (n, B)) for t in (dq, dk, dv))
    if B > 1 and _batch_of(key, dims[1]) == 1:  # keys that a batch shares
        dk, dv = dk.sum(1, keepdim=True), dv.sum(1, keepdim=True)
    return (dq, dk, dv, found), (0, 0, 0, [0] * len(found))


def _block_mask_of_many(
    info: Any,
    dims: tuple[Any, ...],
    captured: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    program: str,
    shape: Sequence[int],
    block_size: Sequence[int],
    memory: int,
    trim: bool,
    like: Tensor,
) -> Any:
    n, (B, *rest) = info.batch_size, shape
    text, tensors, numbers = _program(program, captured, dims[0], ints, n, B)
    *lists, contiguous = ops.block_mask(tensors, numbers, floats, text, (n * B, *rest), block_size, like, memory, trim)
    return (*(t.unflatten(0, (n, B)) for t in lists), contiguous), (0, 0, 0, 0, None)


for _name, _rule in (
    ("forward", _forward_of_many),
    ("backward", _backward_of_many),
    ("block_mask", _block_mask_of_many),
):
    torch.library.register_vmap(f"flexattn::{_name}", _rule, lib=ops.LIBRARY)
