"""How often calls are compiled, and that no compiled code outlives the values it was made with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from flexattn import BlockMask, create_block_mask, flex_attention, masks, mods
from flexattn.codegen.pipeline import variant
from flexattn.graph_mod import SHARED_NUMBER

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention.mask_mod:UserWarning")
LENGTHS = (64, 70, 96, 130, 131, 200, 257, 300, 384, 385)
NUMBERS = (0.05, 0.15, 0.3, 0.7, 1.5, 0.25)
B, H, L, D = 2, 4, 70, 8
temperature = 1.0


class Layer(nn.Module):
    """Attention with a number, a parameter and a mask of its own."""

    def __init__(self, scale: float = 0.5) -> None:
        super().__init__()
        self.scale = scale
        self.gain = nn.Parameter(torch.rand(H))

    def mod(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score * self.scale + self.gain[h]

    def forward(self, q: Tensor) -> Tensor:
        return flex_attention(q, q, q, self.mod)


def graphs(function: Callable[..., Tensor], calls: list[Any], dynamic: bool | None = None) -> int:
    """How many graphs are compiled for calls, each of which must give what eager code gives.

    A call is a tuple of arguments, or (something to do before it, arguments).
    """
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic)
    for given in calls:
        if callable(given[0]):
            given[0]()
            given = given[1]
        torch.testing.assert_close(compiled(*given), function(*given))
    return int(counter.frame_count)


def query(b: int = B, h: int = H, n: int = L) -> Tensor:
    return torch.randn(b, h, n, D)


def causal_of(q: Tensor) -> BlockMask:
    return create_block_mask(masks.causal_mask, None, None, q.shape[2], q.shape[2], device="cpu", BLOCK_SIZE=64)


def scaled(c: float, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score * c


# ---- values

FLOATS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "a closure": lambda q, c: flex_attention(q, q, q, lambda s, b, h, i, j: s * c),
    "a partial": lambda q, c: flex_attention(q, q, q, functools.partial(scaled, c)),
    "a ready-made mod": lambda q, c: flex_attention(q, q, q, mods.softcap(c)),
    "scale": lambda q, c: flex_attention(q, q, q, scale=c),
    "scale with a mod": lambda q, c: flex_attention(q, q, q, lambda s, b, h, i, j: (s * c).tanh(), scale=c),
}


@pytest.mark.feature("new value, no new compilation: floats and scale")
@pytest.mark.parametrize("function", FLOATS.values(), ids=FLOATS)
def test_a_new_float_is_compiled_once_more_at_most(function: Callable[[Tensor, float], Tensor]) -> None:
    # PyTorch compiles for the first value as a constant, for the second as a variable.
    assert graphs(function, [(query(), c) for c in NUMBERS]) <= 2


@pytest.mark.feature("new value, no new compilation: floats and scale")
def test_negative_numbers_and_zero_are_numbers() -> None:
    def call(q: Tensor, c: float) -> Tensor:
        return flex_attention(q, q, q, lambda s, b, h, i, j: s * c, scale=c)

    assert graphs(call, [(query(), c) for c in (0.5, -1.0, 0.0, -0.0, 1e-30, -2.5)]) <= 2


@pytest.mark.feature("new value, no new compilation: floats and scale")
def test_a_new_global_or_attribute_is_noticed() -> None:
    def set_global(value: float) -> Callable[[], None]:
        return lambda: globals().update(temperature=value)

    def set_attribute(value: float) -> Callable[[], None]:
        return lambda: setattr(layer, "scale", value)

    def call(q: Tensor) -> Tensor:
        return flex_attention(q, q, q, lambda s, b, h, i, j: s * temperature)

    layer = Layer()
    assert graphs(call, [(set_global(c), (query(),)) for c in NUMBERS]) <= 2
    assert graphs(layer, [(set_attribute(c), (query(),)) for c in NUMBERS]) <= 2


def several_layers(q: Tensor, c: Any) -> Tensor:
    for _ in range(2):
        q = flex_attention(q, q, q, lambda s, b, h, i, j: s / c)
    return q


def score_and_mask(q: Tensor, c: Any) -> Tensor:
    return flex_attention(q, q, q, lambda s, b, h, i, j: s / c, mask_mod=lambda b, h, i, j: (i - j) * c < 9.0)


def checkpointed(q: Tensor, c: Any) -> Tensor:
    for _ in range(2):
        q = checkpoint(lambda q: flex_attention(q, q, q, lambda s, b, h, i, j: s / c), q, use_reentrant=False)
    return q


@pytest.mark.feature("new value, no new compilation: floats and scale")
@pytest.mark.parametrize("function", [several_layers, score_and_mask])
def test_a_changing_float_of_several_mods(function: Callable[[Tensor, Any], Tensor]) -> None:
    assert graphs(function, [(query(), c) for c in NUMBERS[:4]]) <= 2


@pytest.mark.feature("new value, no new compilation: floats and scale")
def test_a_changing_float_of_several_checkpointed_layers() -> None:
    assert graphs(checkpointed, [(query(), torch.tensor(c)) for c in NUMBERS[:4]]) == 1
    torch._dynamo.reset()
    try:
        assert graphs(checkpointed, [(query(), c) for c in NUMBERS[:4]]) <= 2
    except AssertionError as error:  # before PyTorch 2.15
        assert SHARED_NUMBER in str(error)


@pytest.mark.feature("new value, no new compilation: tensors")
def test_a_new_value_of_a_captured_tensor_is_used_without_compiling() -> None:
    def documents(q: Tensor, ids: Tensor) -> Tensor:
        return flex_attention(q, q, q, mask_mod=lambda b, h, i, j: ids[i] == ids[j])

    def grown() -> None:
        with torch.no_grad():
            layer.gain.add_(0.3)

    layer = Layer()
    assert graphs(documents, [(query(), torch.arange(L) // n) for n in (20, 7, 35)]) == 1
    assert graphs(layer, [(grown, (query(),)) for _ in range(3)]) == 1


@pytest.mark.feature("new value, no new compilation: integers")
def test_a_new_integer_is_compiled_once_more_at_most() -> None:
    def window(q: Tensor, n: int) -> Tensor:
        return flex_attention(q, q, q, mask_mod=lambda b, h, i, j: (i - j).abs() < n)

    assert graphs(window, [(query(), n) for n in range(2, 8)]) <= 2


@pytest.mark.feature("one kernel variant for layers of the same code")
def test_layers_of_the_same_code_share_a_variant() -> None:
    layers = nn.Sequential(*(Layer(0.1 * i + 0.1) for i in range(4)))
    texts = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        texts.extend(n.args[8] for n in graph.graph.nodes if n.target is torch.ops.flexattn.forward.default)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    q = query()
    with torch.no_grad():
        out = torch.compile(layers, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(q)
        torch.testing.assert_close(out, layers(q))
    assert len(texts) == 4 and len(set(texts)) == 1
    assert variant(texts[0]) is variant(texts[3])


# ---- shapes

OF_LENGTH: dict[str, Callable[[Tensor], Tensor]] = {
    "no mask": lambda q: flex_attention(q, q, q),
    "a mod": lambda q: flex_attention(q, q, q, lambda s, b, h, i, j: s + slopes[h] * (j - i)),
    "a block mask made inside": lambda q: flex_attention(q, q, q, block_mask=causal_of(q)),
    "a mask of the length": lambda q: flex_attention(q, q, q, mask_mod=lambda b, h, i, j: i + q.shape[2] // 2 >= j),
}
slopes = torch.rand(H)
# `dynamic`, and how many graphs: without it PyTorch compiles for the first length alone, and then in general. Masks of one
# row of blocks and of several are always apart, as sizes of 1 and of more are in PyTorch.
MODES = pytest.mark.parametrize("mode", [(True, 2), (None, 3)], ids=["dynamic", "automatic"])


@pytest.mark.feature("at most 2 compilations for 10 lengths")
@MODES
@pytest.mark.parametrize("function", OF_LENGTH.values(), ids=OF_LENGTH)
def test_ten_lengths_are_compiled_twice_at_most(
    function: Callable[[Tensor], Tensor], mode: tuple[bool | None, int]
) -> None:
    dynamic, most = mode
    assert graphs(function, [(query(n=n),) for n in LENGTHS], dynamic) <= most


@pytest.mark.feature("at most 2 compilations for 10 lengths")
@MODES
def test_ten_lengths_of_what_is_passed_in_are_compiled_twice_at_most(mode: tuple[bool | None, int]) -> None:
    dynamic, most = mode

    def masked(q: Tensor, mask: BlockMask) -> Tensor:
        return flex_attention(q, q, q, block_mask=mask)

    def documents(q: Tensor, ids: Tensor) -> Tensor:
        return flex_attention(q, q, q, mask_mod=masks.document_mask(ids))

    def decode(q: Tensor, k: Tensor) -> Tensor:
        return flex_attention(q, k, k)

    queries = [query(n=n) for n in LENGTHS]
    assert graphs(masked, [(q, causal_of(q)) for q in queries], dynamic) <= most
    assert graphs(documents, [(q, torch.arange(q.shape[2]) // 20) for q in queries], dynamic) <= most
    assert graphs(decode, [(query(n=1), q) for q in queries], dynamic) <= most


@pytest.mark.feature("at most 2 compilations for 10 lengths")
def test_gradients_for_ten_lengths() -> None:
    def gradient(q: Tensor) -> Tensor:
        return flex_attention(q, q, q, lambda s, b, h, i, j: s + slopes[h] * (j - i), causal_of(q))

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gradient, fullgraph=True, backend=counter, dynamic=True)
    for n in LENGTHS:
        q = query(n=n).requires_grad_()
        (expected,) = torch.autograd.grad(gradient(q).square().sum(), q)
        (actual,) = torch.autograd.grad(compiled(q).square().sum(), q)
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count <= 2


@pytest.mark.feature("at most 2 compilations for 10 batch sizes or numbers of heads")
def test_ten_batch_sizes_and_numbers_of_heads() -> None:
    def plain(q: Tensor) -> Tensor:
        return flex_attention(q, q, q)

    def of_both(q: Tensor, gain: Tensor) -> Tensor:
        return flex_attention(q, q, q, lambda s, b, h, i, j: s + gain[h] * b, mask_mod=masks.causal_mask)

    def grouped(q: Tensor, k: Tensor) -> Tensor:
        return flex_attention(q, k, k, enable_gqa=True)

    sizes = range(2, 12)
    assert graphs(plain, [(query(b=n),) for n in sizes], dynamic=True) <= 2
    assert graphs(plain, [(query(h=n),) for n in sizes], dynamic=True) <= 2
    assert graphs(of_both, [(query(b=n, h=n), torch.rand(n)) for n in sizes], dynamic=True) <= 2
    assert graphs(grouped, [(query(b=n, h=8), query(b=n, h=2)) for n in sizes], dynamic=True) <= 2


@pytest.mark.feature("at most 2 compilations for 10 batch sizes or numbers of heads")
@MODES
def test_a_mask_of_as_many_entries_and_heads_fits_queries_of_symbolic_sizes(mode: tuple[bool | None, int]) -> None:
    reach = torch.arange(H)

    def call(q: Tensor) -> Tensor:
        near = lambda b, h, i, j: (i - j).abs() <= reach[h] + b
        return flex_attention(q, q, q, block_mask=create_block_mask(near, 2, 4, L, L, "cpu", 32))

    dynamic, most = mode
    assert graphs(call, [(query(2, 4),)] * 2, dynamic) <= most


@pytest.mark.feature("at most 2 compilations for 10 positions of a decoding step")
@pytest.mark.parametrize("as_tensor", [False, True])
def test_ten_steps_of_decoding(as_tensor: bool) -> None:
    whole = causal_of(query(n=512))
    cache = query(n=512)

    def step(q: Tensor, position: Any) -> Tensor:
        return flex_attention(q, cache, cache, block_mask=whole.offset(q=position, Q_LEN=1))

    positions = [torch.tensor(n) if as_tensor else n for n in LENGTHS]
    assert graphs(step, [(query(n=1), n) for n in positions]) <= 2


@pytest.mark.feature("no slow path at the recompile limit")
def test_beyond_the_recompile_limit_eager_code_computes_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    layers = [Layer(0.1 * i) for i in range(4)]
    names = iter(range(100))

    def call(q: Tensor, kind: str) -> Tensor:  # each string is a new graph
        return layers[len(kind) % 4](q) if kind else q

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter)
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(5):
            q, kind = query(), "x" * next(names) + "y"
            torch.testing.assert_close(compiled(q, kind), call(q, kind))
    assert counter.frame_count == 2  # the others ran in eager code, by the same operators
    assert "recompile_limit" in caplog.text  # and Dynamo says so
