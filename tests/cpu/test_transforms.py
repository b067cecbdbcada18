"""torch.func: grad, vmap, jacrev and their nestings, against the same calls one by one on the dense backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from flexattn import create_block_mask, flex_attention, masks
from flexattn.codegen.batching import folded, shifted
from flexattn.codegen.evaluate import Inputs, evaluate
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace

pytestmark = pytest.mark.feature("torch.func.grad, vmap and jacrev")

B, H, L, D = 2, 4, 40, 8
N = 3
NAMES = ("query", "key", "value", "gain", "bias")
CAUSAL = create_block_mask(masks.causal_mask, None, None, L, L, "cpu", 16)
Function = Callable[..., Any]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def arguments() -> list[Tensor]:
    return [*(randn(B, H, L, D) for _ in range(3)), randn(H), randn(H, L, L)]


def attend(query: Tensor, key: Tensor, value: Tensor, gain: Tensor, bias: Tensor, backend: str = "auto") -> Tensor:
    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score * gain[h] + bias[h, q_idx, kv_idx] * (b + 1)

    return flex_attention(query, key, value, mod, CAUSAL, backend=backend)


def exact(*tensors: Tensor) -> Tensor:
    return attend(*tensors, backend="reference")


def loss(function: Function) -> Function:
    return lambda *tensors: function(*tensors).square().sum()


def stacked(results: list[Any]) -> Any:
    return (
        torch.stack(results) if isinstance(results[0], Tensor) else tuple(map(torch.stack, zip(*results, strict=True)))
    )


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_grad_of_every_argument() -> None:
    tensors = arguments()
    every = tuple(range(len(NAMES)))
    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(loss(exact)(*leaves), leaves)
    close(grad(loss(attend), argnums=every)(*tensors), expected)


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_vmap_over_one_argument_and_its_gradients(number: int) -> None:
    tensors = arguments()
    many = randn(N, *tensors[number].shape)
    every = tuple(range(len(NAMES)))

    def put(t: Tensor) -> list[Tensor]:
        return [*tensors[:number], t, *tensors[number + 1 :]]

    def one(function: Function) -> Function:
        return lambda t: function(*put(t))

    expected = torch.stack([exact(*put(t)) for t in many])
    close(vmap(one(attend))(many), expected)
    close(vmap(one(attend), in_dims=1, out_dims=2)(many.movedim(0, 1)), expected.movedim(0, 2))
    # Gradients of each: also of what all of them share.
    each = grad(loss(attend), argnums=every)
    dense = grad(loss(exact), argnums=every)
    close(vmap(one(each))(many), stacked([dense(*put(t)) for t in many]))
    # The gradient of all of them together.
    close(
        grad(lambda t: vmap(one(attend))(t).square().sum())(many),
        torch.stack([grad(loss(one(exact)))(t) for t in many]),
    )


def test_vmap_of_vmap_and_autograd_outside() -> None:
    query, key, value, gain, bias = arguments()
    queries, biases = randn(N, 2, *query.shape).requires_grad_(), randn(N, *bias.shape).requires_grad_()
    inner = vmap(attend, in_dims=(0, None, None, None, None))
    made = vmap(inner, in_dims=(0, None, None, None, 0))(queries, key, value, gain, biases)
    expected = torch.stack(
        [torch.stack([exact(q, key, value, gain, t) for q in qs]) for qs, t in zip(queries, biases, strict=True)]
    )
    close(made, expected)
    seed = torch.randn_like(made)
    close(torch.autograd.grad(made, (queries, biases), seed), torch.autograd.grad(expected, (queries, biases), seed))


@pytest.mark.parametrize("dims", [(0, None, None), (None, 0, None), (0, None, 0), (0, 0, 0)], ids=str)
def test_keys_that_a_batch_shares(dims: tuple[int | None, ...]) -> None:
    sizes = (B, 1, 1)
    tensors = [randn(*([N] if d == 0 else []), n, H, L, D).requires_grad_() for n, d in zip(sizes, dims, strict=True)]

    def call(query: Tensor, key: Tensor, value: Tensor, backend: str = "auto") -> Tensor:
        return flex_attention(query, key, value, lambda score, b, h, q_idx, kv_idx: score * (b + 1), backend=backend)

    def dense(*given: Tensor) -> Tensor:
        return call(*given, backend="reference")

    def entry(i: int) -> list[Tensor]:
        return [t[i] if d == 0 else t for t, d in zip(tensors, dims, strict=True)]

    expected = torch.stack([dense(*entry(i)) for i in range(N)])
    made = vmap(call, in_dims=dims)(*tensors)
    close(made, expected)
    close(torch.autograd.grad(loss(lambda: made)(), tensors), torch.autograd.grad(loss(lambda: expected)(), tensors))
    every = (0, 1, 2)
    close(
        vmap(grad(loss(call), argnums=every), in_dims=dims)(*tensors),
        stacked([grad(loss(dense), argnums=every)(*entry(i)) for i in range(N)]),
    )


@pytest.mark.parametrize("per_entry", [False, True])
def test_vmap_over_what_a_mask_reads(per_entry: bool) -> None:
    tensors = arguments()[:3]
    ids = torch.randint(0, 3, (N, B, L) if per_entry else (N, L))

    def call(ids: Tensor, *given: Tensor, backend: str = "auto") -> Tensor:
        def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return ids[b, q_idx] == ids[b, kv_idx] if per_entry else ids[q_idx] == ids[kv_idx]

        return flex_attention(*given, mask_mod=mask, backend=backend)

    queries = randn(N, B, H, L, D)
    close(
        vmap(call, in_dims=(0, None, None, None))(ids, *tensors),
        torch.stack([call(i, *tensors, backend="reference") for i in ids]),
    )
    # One mask for all: its lists have a batch of their own, or none.
    close(
        vmap(call, in_dims=(None, 0, None, None))(ids[0], queries, *tensors[1:]),
        torch.stack([call(ids[0], q, *tensors[1:], backend="reference") for q in queries]),
    )


def test_jacobians() -> None:
    query, key, value = (randn(1, H, 5, 3) for _ in range(3))
    gain = randn(H)

    def call(gain: Tensor, backend: str = "auto") -> Tensor:
        return flex_attention(
            query, key, value, lambda score, b, h, q_idx, kv_idx: (score * gain[h]).tanh(), backend=backend
        )

    def dense(gain: Tensor) -> Tensor:
        return call(gain, "reference")

    expected = torch.autograd.functional.jacobian(dense, gain)
    close(jacrev(call)(gain), expected)
    close(jacfwd(dense)(gain), expected)  # the dense backend has every derivative
    close(jvp(dense, (gain,), (torch.ones_like(gain),))[1], expected.sum(-1))
    close(hessian(loss(dense))(gain), torch.autograd.functional.hessian(loss(dense), gain))
    assert torch.autograd.gradgradcheck(dense, (gain.clone().requires_grad_(),))
    for refused, complaint in (
        (lambda: jacfwd(call)(gain), "no forward-mode derivative.*backend='reference'"),
        (lambda: hessian(loss(call))(gain), "no forward-mode derivative"),
        (lambda: jacrev(jacrev(call))(gain), "no second derivative.*backend='reference'"),
    ):
        with pytest.raises(NotImplementedError, match=complaint):
            refused()


# ---- the programs behind it


def score_of(text: str, captured: list[Tensor], ints: list[int], b: Tensor, h: Tensor) -> Tensor:
    named = {"b": b, "h": h, "q_idx": torch.tensor(1), "kv_idx": torch.tensor(2), "score": torch.tensor(1.5)}
    (score,) = evaluate([variant(text).score], Inputs(named, captured, [], ints))
    return score


def test_a_folded_program_reads_the_entries_of_each_batch() -> None:
    table, which, gain = torch.randn(N, 2, 7), torch.randint(0, 7, (N, 2)), torch.randn(4)
    first, chosen = table[0], which[0]  # what one of the batches reads
    text, captured, ints = trace(lambda s, b, h, i, j: s * gain[h] + first[b, chosen[b]] + b, None)
    whole = {id(first): table, id(chosen): which}
    batched = [id(t) in whole for t in captured]
    tensors = [whole.get(id(t), t) for t in captured]
    joined = folded(text, batched)
    made = score_of(joined, tensors, [*ints, 2], torch.arange(6), torch.tensor(1))
    expected = torch.stack([1.5 * gain[1] + table[n, b, which[n, b]] + b for n in range(N) for b in range(2)])
    torch.testing.assert_close(made, expected)
    assert (
        folded(trace(lambda s, b, h, i, j: s * gain[h], None).program, [False])
        == trace(lambda s, b, h, i, j: s * gain[h], None).program
    )


def test_a_shifted_program_counts_from_the_shard_s_first_entry() -> None:
    table = torch.randn(4, 6)
    text, captured, ints = trace(lambda s, b, h, i, j: s + table[b, h] * h, None)
    made = score_of(shifted(shifted(text, "h"), "b"), captured, [*ints, 3, 2], torch.tensor(1), torch.arange(3))
    torch.testing.assert_close(made, 1.5 + table[3, 3:] * torch.arange(3, 6))
    untouched = trace(lambda s, b, h, i, j: s + table[h, 0], None).program
    assert shifted(untouched, "b") == untouched


def test_many_gradients_at_once_are_refused_with_the_way_that_works() -> None:
    x = torch.randn(1, 2, 6, 4)
    call = lambda x: flex_attention(x, x, x).sum((2, 3))
    with pytest.raises(NotImplementedError, match=r"is_grads_batched.*torch\.func\.jacrev"):
        torch.autograd.functional.jacobian(call, x, vectorize=True)
    torch.testing.assert_close(jacrev(call)(x), torch.autograd.functional.jacobian(call, x))
