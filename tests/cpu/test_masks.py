"""Masks against independent constructions of what their sources describe; what they refuse, and how they are named."""

from __future__ import annotations

import itertools
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from flexattn import and_masks, create_block_mask, create_mask, debug_mode, flex_attention, masks, not_mask, or_masks


def dense(mask: Any, n: int, m: int | None = None, batch: int | None = None) -> Tensor:
    """[n, m] bool, or [batch, n, m]."""
    made = create_mask(mask, batch, None, n, n if m is None else m, "cpu")[:, 0]
    return made[0] if batch is None else made


# ---- neighbourhoods


def neighbourhood(query: int, kernel: int, length: int) -> set[int]:
    """The `kernel` keys of an axis whose middle is nearest to the query, as NATTEN defines them."""
    starts = range(length - kernel + 1)
    start = min(starts, key=lambda s: abs(s + kernel // 2 - query))
    return set(range(start, start + kernel))


@pytest.mark.parametrize(
    ("height", "width", "kernel"),
    [(5, 7, 3), (7, 5, (3, 5)), (5, 5, 5), (3, 6, (3, 1)), (1, 9, (1, 3)), (6, 4, (5, 3)), (4, 4, 1), (1, 1, 1)],
)
def test_a_neighbourhood_is_shifted_at_the_borders(height: int, width: int, kernel: Any) -> None:
    rows, columns = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    made = dense(masks.natten_2d(height, width, kernel), height * width)
    for y, x in itertools.product(range(height), range(width)):
        seen = itertools.product(neighbourhood(y, rows, height), neighbourhood(x, columns, width))
        expected = {key_y * width + key_x for key_y, key_x in seen}
        assert set(made[y * width + x].nonzero().flatten().tolist()) == expected
    assert bool((made.sum(-1) == rows * columns).all())


# ---- trees


def random_parents(nodes: int, seed: int) -> list[int]:
    """Mostly chains, so that the tree is deep, with a second root now and then."""
    draw = random.Random(seed)
    return [-1 if n == 0 or draw.random() < 0.05 else max(n - draw.choice([1, 1, 1, 2, 9]), 0) for n in range(nodes)]


def lineage(parents: list[int], node: int) -> set[int]:
    """The node and its ancestors, by walking up."""
    return {node} | (lineage(parents, parents[node]) if parents[node] >= 0 else set())


def tree_by_walking(parents: list[int], context: int, keys: int) -> Tensor:
    rows = [set(range(context)) | {context + node for node in lineage(parents, n)} for n in range(len(parents))]
    return torch.tensor([[key in row for key in range(keys)] for row in rows])


@pytest.mark.parametrize("nodes", [1, 2, 31, 32, 33, 64, 100])
def test_a_node_sees_its_ancestors(nodes: int) -> None:
    parents = random_parents(nodes, nodes)
    for context in (0, 5):
        keys = context + nodes + 40  # room in the cache that no node has filled
        made = dense(masks.tree.from_parents(torch.tensor(parents), context), nodes, keys)
        assert torch.equal(made, tree_by_walking(parents, context, keys))


def test_a_chain_of_nodes_is_causal_also_where_the_sign_bit_is_set() -> None:
    chain = masks.tree.from_parents(torch.arange(70, dtype=torch.int32) - 1)
    assert chain.ancestors.dtype is torch.int32
    assert chain.ancestors[40].tolist() == [-1, 2**9 - 1, 0]
    assert torch.equal(dense(chain, 70), dense(masks.causal_mask, 70))


@pytest.mark.parametrize("context", [3, torch.tensor(3), torch.tensor([3, 6])])
def test_trees_of_a_batch_differ(context: Any) -> None:
    parents = [random_parents(40, 1), random_parents(40, 2)]
    made = dense(masks.tree.from_parents(torch.tensor(parents), context), 40, 50, batch=2)
    contexts = context.expand(2).tolist() if isinstance(context, Tensor) else [context] * 2
    for b in range(2):
        assert torch.equal(made[b], tree_by_walking(parents[b], contexts[b], 50))


def test_one_tree_behind_contexts_of_several_lengths() -> None:
    parents = random_parents(10, 3)
    made = dense(masks.tree.from_parents(torch.tensor(parents), torch.tensor([2, 4])), 10, 16, batch=2)
    assert torch.equal(made, torch.stack([tree_by_walking(parents, context, 16) for context in (2, 4)]))


# ---- block diffusion


@pytest.mark.parametrize(("length", "block"), [(6, 2), (6, 3), (5, 2), (4, 1), (3, 5), (1, 1)])
def test_block_diffusion_is_made_of_the_three_parts_of_the_paper(length: int, block: int) -> None:
    blocks = [list(range(start, min(start + block, length))) for start in range(0, length, block)]
    expected = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    noisy, clean = expected[:length], expected[length:]
    for number, members in enumerate(blocks):
        for token in members:
            noisy[token, members] = True  # block diagonal
            for earlier in blocks[:number]:
                noisy[token, [length + t for t in earlier]] = True  # offset block causal
            for seen in blocks[: number + 1]:
                clean[token, [length + t for t in seen]] = True  # block causal
    assert torch.equal(dense(masks.block_diffusion(length, block), 2 * length), expected)


# ---- laws


@given(size=st.integers(1, 9), sinks=st.integers(0, 9), n=st.integers(1, 16))
def test_masks_of_a_window_agree_where_they_meet(size: int, sinks: int, n: int) -> None:
    window = dense(masks.sliding_window(size), n)
    assert torch.equal(dense(masks.window(size - 1, 0), n), window)
    assert torch.equal(dense(masks.dilated(size, 1), n), window)
    assert torch.equal(dense(masks.streaming(0, size), n), window)
    assert torch.equal(dense(masks.window(None, 0), n), dense(masks.causal_mask, n))
    first = and_masks(masks.causal_mask, masks.global_tokens(sinks))
    assert torch.equal(dense(masks.streaming(sinks, size), n), dense(or_masks(masks.sliding_window(size), first), n))
    assert window.sum(-1).tolist() == [min(size, q + 1) for q in range(n)]


def test_a_response_behind_a_shared_prompt_sees_what_it_would_behind_its_own() -> None:
    q, k, v = (torch.randn(1, 2, 7, 8) for _ in range(3))
    responses = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    packed = flex_attention(q, k, v, mask_mod=masks.shared_prefix(responses))
    for tokens in ([0, 1, 2, 3, 4], [0, 1, 2, 5, 6]):
        alone = flex_attention(q[:, :, tokens], k[:, :, tokens], v[:, :, tokens], mask_mod=masks.causal_mask)
        torch.testing.assert_close(packed[:, :, tokens], alone)


def test_cross_attention_stays_within_documents() -> None:
    queries, keys = torch.tensor([0, 0, 1]), torch.tensor([1, 0, 0, 2])
    made = dense(masks.document_mask(queries, keys), 3, 4)
    assert made.int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 0]]


# ---- all of them

MADE = {
    "causal": lambda: masks.causal(torch.tensor([1, 2])),
    "window": lambda: masks.window(3, None),
    "dilated": lambda: masks.dilated(2, 3),
    "streaming": lambda: masks.streaming(1, 3),
    "document_mask": lambda: masks.document_mask(torch.arange(8) // 3, torch.arange(8) // 2),
    "global_tokens": lambda: masks.global_tokens(torch.arange(8) % 3 == 0),
    "natten_2d": lambda: masks.natten_2d(2, 4, (1, 3)),
    "shared_prefix": lambda: masks.shared_prefix(torch.arange(8) % 3, torch.arange(8) // 3),
    "tree": lambda: masks.tree.from_parents(torch.arange(8).repeat(2, 1) - 1, torch.tensor([0, 1])),
    "transfusion": lambda: masks.transfusion(torch.arange(8) // 3 - 1),
    "block_diffusion": lambda: masks.block_diffusion(4, 2),
}
NAMES = {
    "causal": "causal(offset=tensor[2])",
    "window": "window(left=3, right=None)",
    "dilated": "dilated(size=2, dilation=3)",
    "streaming": "streaming(sinks=1, size=3)",
    "document_mask": "document_mask([8], [8])",
    "global_tokens": "global_tokens(tokens=tensor[8])",
    "natten_2d": "natten_2d(height=2, width=4, kernel=(1, 3))",
    "shared_prefix": "shared_prefix(responses=tensor[8], prompts=tensor[8])",
    "tree": "tree(ancestors=tensor[2, 8, 1], context=tensor[2])",
    "transfusion": "transfusion(spans=tensor[8])",
    "block_diffusion": "block_diffusion(length=4, block=2)",
}


@pytest.fixture(params=sorted(MADE))
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def test_a_mask_is_named_by_its_parameters(name: str) -> None:
    assert repr(MADE[name]()) == MADE[name]().__name__ == NAMES[name]


def test_a_mask_can_be_pickled(name: str) -> None:
    mask = MADE[name]()
    again = pickle.loads(pickle.dumps(mask))
    assert repr(again) == repr(mask)
    assert torch.equal(dense(again, 8, batch=2), dense(mask, 8, batch=2))


def test_a_mask_takes_its_tensors_along(name: str) -> None:
    mask = MADE[name]()
    tensors = lambda m: [value for value in vars(m).values() if isinstance(value, Tensor)]
    assert len(tensors(mask)) == NAMES[name].count("tensor") + 2 * (name == "document_mask")
    assert all(t.is_meta for t in tensors(mask.to("meta")))


def test_a_mask_is_attended_to_by_the_blocks_made_from_it(name: str) -> None:
    mask = MADE[name]()
    blocks = create_block_mask(mask, 2, None, 8, 8, "cpu", BLOCK_SIZE=2)
    q, k, v = (torch.randn(2, 1, 8, 4) for _ in range(3))
    scores = (q @ k.mT / 2).masked_fill(~dense(mask, 8, batch=2).unsqueeze(1), -torch.inf)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=blocks), torch.softmax(scores, -1) @ v)


def test_indices_stay_within_captured_tensors(name: str) -> None:
    q, k, v = (torch.randn(2, 1, 8, 4) for _ in range(3))
    with debug_mode():
        flex_attention(q, k, v, mask_mod=MADE[name]())


def test_keys_of_a_long_context_read_no_word_outside_the_tree() -> None:
    q, k, v = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 80, 4), torch.randn(1, 1, 80, 4)
    with debug_mode():
        flex_attention(q, k, v, mask_mod=masks.tree.from_parents(torch.tensor([-1, 0]), 70))


def test_a_name_gives_the_shape_of_a_tensor_and_not_its_values() -> None:
    lengths = torch.tensor([5, 9])
    assert repr(not_mask(masks.padding(lengths))) == "not_mask(padding(lengths=tensor[2]))"
    assert masks.prefix_lm(lengths).__name__ == "prefix_lm(prefix_length=tensor[2])"
    assert masks.causal(torch.tensor(3)).__name__ == "causal(offset=tensor[])"
    assert masks.window(2, 1).__name__ == "window(left=2, right=1)"
    assert masks.shared_prefix(lengths).__name__ == "shared_prefix(responses=tensor[2])"
    assert masks.document_mask(lengths).__name__ == "document_mask([2])"


# ---- refusals

ids = torch.tensor([0, 0, 1])
REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: masks.causal(1.5), r"offset must be an int, or an integer tensor: 0-d, or \[B\]; got 1.5"),  # type: ignore[arg-type]
    (lambda: masks.causal(True), "offset must be .* got True"),
    (lambda: masks.causal(torch.tensor(True)), "offset must be .* got a torch.bool tensor"),
    (lambda: masks.causal.bottom_right(2.0, 4), "Q_LEN must be an int"),  # type: ignore[arg-type]
    (lambda: masks.causal.bottom_right(2, "4"), "KV_LEN must be an int"),  # type: ignore[arg-type]
    (lambda: masks.prefix_lm(torch.ones(2, 2).long()), r"prefix_length must .* got a torch.int64 tensor \[2, 2\]"),
    (lambda: masks.padding(torch.rand(3)), r"lengths must be an integer tensor \[B\]; got a torch.float32 tensor"),
    (lambda: masks.padding(torch.tensor(3)), "lengths must be an integer tensor"),
    (lambda: masks.padding(3), "lengths must be an integer tensor"),  # type: ignore[arg-type]
    (lambda: masks.sliding_window(0), "1 or more; got 0. 0 attends to nothing"),
    (lambda: masks.sliding_window(2.5), "size must be an int, 1 or more; got 2.5"),  # type: ignore[arg-type]
    (lambda: masks.sliding_window(torch.tensor(2)), r"size must be an int.*got a torch.int64 tensor \[\]"),  # type: ignore[arg-type]
    (lambda: masks.window(-1, 0), "left must be an int, 0 or more, or None for no limit .*; got -1"),
    (lambda: masks.window(0, -1), "right must be an int, 0 or more, or None for no limit .*; got -1"),
    (lambda: masks.window(0, 1.0), "right must be an int"),  # type: ignore[arg-type]
    (lambda: masks.dilated(0, 1), "size must be an int, 1 or more; got 0"),
    (lambda: masks.dilated(1, 0), "dilation must be an int, 1 or more; got 0. 1 is a window without gaps"),
    (lambda: masks.streaming(-1, 1), r"sinks must be an int, 0 or more; got -1. 0 is sliding_window\(size\)"),
    (lambda: masks.streaming(4, 0), "size must be an int, 1 or more"),
    (lambda: masks.chunked(0), "at least one position"),
    (lambda: masks.document_mask(torch.rand(4)), r"document_ids must be an integer tensor \[S\] or \[B, S\]"),
    (lambda: masks.document_mask([0, 0, 1]), r"must be an integer tensor .* got \[0, 0, 1\]: write torch.tensor\("),  # type: ignore[arg-type]
    (lambda: masks.document_mask(ids.bool()), r"write document_ids.to\(torch.int32\)"),
    (lambda: masks.document_mask(ids, ids.view(1, 3)), "both without, .*kv_document_ids.expand"),
    (lambda: masks.document_mask(ids.expand(2, -1), ids.expand(3, -1)), "give both with the same batch"),
    (lambda: masks.document_mask(ids, ids.float()), "kv_document_ids must be an integer tensor"),
    (lambda: masks.global_tokens(-1), "tokens must be a number of tokens, 0 or more"),
    (lambda: masks.global_tokens(ids), "a bool tensor .* mark"),
    (lambda: masks.global_tokens(True), "tokens must be .* got True"),
    (lambda: masks.natten_2d(0, 4, 1), "height must be an int, 1 or more"),
    (lambda: masks.natten_2d(4, 0, 1), "width must be an int, 1 or more"),
    (lambda: masks.natten_2d(4, 4, 2), "kernel must be an odd int, or two, .*; got 2. An even one has no middle"),
    (lambda: masks.natten_2d(4, 4, (3, 3, 3)), "kernel must be an odd int, or two"),  # type: ignore[arg-type]
    (lambda: masks.natten_2d(4, 7, 5), "a kernel of 5 does not fit into the height, 4; the largest that does is 3"),
    (lambda: masks.natten_2d(7, 5, 7), "a kernel of 7 does not fit into the width, 5; the largest that does is 5"),
    (lambda: masks.shared_prefix(ids.bool()), r"write responses.to\(torch.int32\)"),
    (lambda: masks.shared_prefix(ids, ids[:2]), "give them the same shape"),
    (lambda: masks.shared_prefix(ids, ids.float()), "prompts must be an integer tensor"),
    (lambda: masks.tree(ids), "int32 words of bits.*from_parents"),
    (lambda: masks.tree(torch.ones(2, 2, dtype=torch.bool)), "got a torch.bool tensor .*from_parents"),
    (lambda: masks.tree(torch.ones(2, 1, dtype=torch.int32), 0.5), "context must be an int"),  # type: ignore[arg-type]
    (lambda: masks.tree.from_parents([-1, 0]), r"parents must be an integer tensor \[T\] or \[B, T\]"),  # type: ignore[arg-type]
    (lambda: masks.tree.from_parents(torch.tensor([-1, 2, 0])), r"parents\[1\] is 2; it must be a node before node 1"),
    (lambda: masks.tree.from_parents(torch.tensor([0, 0])), r"parents\[0\] is 0; .* or -1 for a root"),
    (lambda: masks.tree.from_parents(torch.tensor([[-1, 0], [-1, -2]])), r"parents\[1, 1\] is -2"),
    (lambda: masks.transfusion(ids.bool()), r"write spans.to\(torch.int32\)"),
    (lambda: masks.block_diffusion(0, 1), "length must be an int, 1 or more"),
    (lambda: masks.block_diffusion(4, 0), "A block has at least one token"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_a_parameter_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
