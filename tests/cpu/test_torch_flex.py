"""Models of PyTorch's flex_attention, routed here unchanged."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as theirs
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from torch.utils.checkpoint import checkpoint

import flexattn
from flexattn import masks
from flexattn.integrations import torch_flex

pytestmark = pytest.mark.feature("models that call PyTorch's flex_attention")

BACKENDS = ["eager", "aot_eager", "inductor"]
CODE, HOP = flex_attention.__code__, theirs.flex_attention_hop
IDS = torch.arange(96) // 40


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    yield
    left = torch_flex.installed()
    torch_flex.uninstall()
    assert not left and flex_attention.__code__ is CODE and theirs.flex_attention_hop is HOP


def qkv(heads: int = 4, kv_heads: int = 4, grad: bool = False) -> list[Tensor]:
    sizes = (heads, kv_heads, kv_heads)
    return [torch.randn(2, h, 96, 16, requires_grad=grad) for h in sizes]


def packed(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (IDS[q_idx] == IDS[kv_idx]) & (q_idx >= kv_idx)


def softcap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return 20 * torch.tanh(score / 20)


def by_torch(*args: Any, **kwargs: Any) -> Any:
    """What PyTorch computes, which says that it is not compiled, and that return_lse will go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return flex_attention(*args, **kwargs)


def block_mask_of(mask_mod: Any = packed, B: int | None = None, H: int | None = None) -> theirs.BlockMask:
    return theirs.create_block_mask(mask_mod, B, H, 96, 96, "cpu", 32)


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {},
    "score_mod": lambda: {"score_mod": softcap},
    "block_mask": lambda: {"block_mask": block_mask_of()},
    "batch and heads": lambda: {"block_mask": block_mask_of(lambda b, h, i, j: i - j < 9 + h + b, 2, 4)},
    "both": lambda: {"score_mod": softcap, "block_mask": block_mask_of(masks.sliding_window(30))},
    "scale": lambda: {"scale": 0.7},
    "options": lambda: {"kernel_options": {"BLOCK_M": 32, "PRESCALE_QK": True, "fwd_num_warps": 4}},
}


@pytest.mark.parametrize("grouped", [False, True], ids=["", "grouped"])
@pytest.mark.parametrize("name", CALLS)
def test_a_routed_call_is_one_of_ours(name: str, grouped: bool) -> None:
    q, k, v = qkv(4, 2 if grouped else 4)
    given = {**CALLS[name](), "enable_gqa": grouped}
    ours = dict(given)
    if "block_mask" in ours:
        ours["block_mask"] = flexattn.BlockMask.from_torch(ours["block_mask"])
    expected = flexattn.flex_attention(q, k, v, **ours)
    with torch_flex.route():
        found = flex_attention(q, k, v, **given)
    assert torch.equal(found, expected)
    torch.testing.assert_close(found, by_torch(q, k, v, **given))


def test_lse_and_maxima_have_the_units_and_types_of_pytorch() -> None:
    q, k, v = qkv()
    block_mask = block_mask_of()
    scores = (q @ k.mT / 4).masked_fill(~theirs.create_mask(packed, None, None, 96, 96, "cpu"), float("-inf"))
    with torch_flex.route():
        out, lse = flex_attention(q, k, v, block_mask=block_mask, return_lse=True)
        out_2, aux = flex_attention(q, k, v, block_mask=block_mask, return_aux=AuxRequest(lse=True, max_scores=True))
        _, lse_alone = flex_attention(q, k, v, block_mask=block_mask, return_aux=AuxRequest(lse=True))
        _, neither = flex_attention(q, k, v, block_mask=block_mask, return_aux=AuxRequest())
    assert type(aux) is theirs.AuxOutput and torch.equal(out, out_2) and torch.equal(lse, aux.lse)
    torch.testing.assert_close(aux.lse, scores.logsumexp(-1))
    torch.testing.assert_close(aux.max_scores, scores.amax(-1))
    assert torch.equal(lse_alone.lse, lse) and lse_alone.max_scores is None and neither == (None, None)
    torch.testing.assert_close(by_torch(q, k, v, block_mask=block_mask, return_lse=True), (out, lse))


def test_both_ways_to_ask_for_the_lse_are_refused_as_there() -> None:
    q, k, v = qkv()
    with torch_flex.route(), pytest.raises(ValueError, match="return_lse and return_aux"):
        flex_attention(q, k, v, return_lse=True, return_aux=AuxRequest(lse=True))


class Block(torch.nn.Module):
    """A transformer block as people write it: names imported from PyTorch, a block mask of PyTorch, learned slopes."""

    def __init__(self, attend: Callable[..., Any] = flex_attention) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(32, 64), torch.nn.Linear(32, 32)
        self.norm = torch.nn.LayerNorm(32)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
        self.slopes = torch.nn.Parameter(torch.rand(4))
        self.attend = attend

    def forward(self, x: Tensor, block_mask: Any) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).split((32, 16, 16), -1)
        q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v))

        def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return score + self.slopes[h] * (kv_idx - q_idx)

        out, aux = self.attend(
            q,
            k,
            v,
            alibi,
            block_mask,
            enable_gqa=True,
            return_aux=AuxRequest(lse=True),
            kernel_options={"BACKEND": "AUTO"},
        )
        x = x + self.out((out * aux.lse.unsqueeze(-1).tanh()).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Model(torch.nn.Module):
    def __init__(self, attend: Callable[..., Any] = flex_attention) -> None:
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(50, 32), torch.nn.Linear(32, 50)
        self.blocks = torch.nn.ModuleList(Block(attend) for _ in range(2))

    def forward(self, tokens: Tensor, block_mask: Any) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, block_mask)
        logits: Tensor = self.head(x)
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def trained(call: Callable[..., Tensor], model: torch.nn.Module, block_mask: Any, steps: int = 1) -> list[Tensor]:
    """The losses, and the gradients of the last step."""
    tokens = torch.randint(0, 50, (2, 96), generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = call(tokens, block_mask)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def model_of(attend: Callable[..., Any] = flex_attention) -> Model:
    torch.manual_seed(5)
    return Model(attend)


def expected_training(steps: int = 1) -> list[Tensor]:
    """The model written for this library."""
    model = model_of(flexattn.flex_attention)
    return trained(model, model, flexattn.BlockMask.from_torch(block_mask_of()), steps)


def test_a_model_trains_on_a_cpu_as_one_written_for_this_library() -> None:
    model, block_mask = model_of(), block_mask_of()
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        trained(model, model, block_mask)
    with torch_flex.route():
        found = trained(model, model, block_mask, steps=4)
    assert all(torch.equal(a, b) for a, b in zip(found, expected_training(steps=4), strict=True))
    assert found[3] < found[0] and len(found) == 4 + len(list(model.parameters()))


def test_gradients_are_those_of_dense_attention() -> None:
    q, k, v = (t.detach().double().requires_grad_() for t in qkv())
    slopes = torch.rand(4, dtype=torch.float64, requires_grad=True)
    with torch_flex.route():
        out = flex_attention(q, k, v, lambda s, b, h, i, j: s + slopes[h] * (j - i), block_mask_of())
    place = torch.arange(96)
    scores = q @ k.mT / 4 + slopes[:, None, None] * (place - place[:, None])
    keep = theirs.create_mask(packed, None, None, 96, 96, "cpu")
    dense = torch.softmax(scores.masked_fill(~keep, float("-inf")), -1) @ v
    leaves = (q, k, v, slopes)
    found, expected = (torch.autograd.grad(t.square().sum(), leaves) for t in (out, dense))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_is_routed(backend: str) -> None:
    model = model_of()
    with torch_flex.route():
        found = trained(torch.compile(model, backend=backend, fullgraph=True), model, block_mask_of())
    for one, other in zip(found, expected_training(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_function_that_a_model_holds_is_routed(backend: str) -> None:
    model = model_of(torch.compile(flex_attention, backend=backend, fullgraph=True))
    with torch_flex.route():
        found = trained(model, model, block_mask_of())
    for one, other in zip(found, expected_training(), strict=True):
        torch.testing.assert_close(one, other)


def test_checkpoints_and_autocast() -> None:
    model, block_mask = model_of(), block_mask_of()

    def call(tokens: Tensor, mask: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(model, tokens, mask, use_reentrant=False)  # type: ignore[no-any-return]

    with torch_flex.route():
        found = trained(call, model, block_mask)
    for one, other in zip(found, expected_training(), strict=True):
        torch.testing.assert_close(one, other, atol=3e-2, rtol=3e-1)


def test_a_routed_model_is_exported_with_our_operator() -> None:
    class Call(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flex_attention(q, k, v, softcap)

    operands = tuple(qkv())
    with torch_flex.route():
        program = torch.export.export(Call(), operands)
    assert any("flexattn.forward" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*operands), by_torch(*operands, softcap))


# ---- what is refused, and what is not


def test_errors_in_mods_are_ours() -> None:
    q, k, v = qkv()

    def branches(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if q_idx > kv_idx:
            return score
        return score - 1

    with torch_flex.route(), pytest.raises(flexattn.TraceError, match=r"test_torch_flex\.py:\d+ uses `if`"):
        flex_attention(q, k, v, branches)


def test_options_of_pytorchs_other_kernels_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    monkeypatch.setattr(torch_flex, "_TUNING", torch_flex._TUNING | {"NEW_TUNING_KNOB"})
    expected = flexattn.flex_attention(q, k, v)
    given: Any
    with torch_flex.route():
        for given in (
            {"BACKEND": "FLASH"},
            {"BACKEND": "TRITON_DECODE"},
            {"fwd_NEW_TUNING_KNOB": 3, "NEW_TUNING_KNOB": 1},
            dict.fromkeys(("PRESCALE_QK", "ROWS_GUARANTEED_SAFE", "WRITE_DQ", "USE_TMA"), True),
        ):
            assert torch.equal(flex_attention(q, k, v, kernel_options=given), expected)


def test_every_documented_option_of_pytorch_is_accepted() -> None:
    q, k, v = qkv()
    values: dict[str, Any] = {"BACKEND": "TRITON"}
    for name in theirs.FlexKernelOptions.__annotations__:
        value = values.get(name, True if "bool" in str(theirs.FlexKernelOptions.__annotations__[name]) else 16)
        with torch_flex.route():
            flex_attention(q, k, v, kernel_options={name: value})  # type: ignore[misc]


@pytest.mark.parametrize("options", [{"BLOK_M": 64}, {"BACKEND": "FLASHY"}, {"BLOCK_M": 48}, 3], ids=str)
def test_options_that_nobody_knows_are_refused(options: Any) -> None:
    q, k, v = qkv()
    with torch_flex.route(), pytest.raises((ValueError, TypeError), match=r"kernel.option"):
        flex_attention(q, k, v, kernel_options=options)


def test_masks_of_both_kinds_are_taken_and_slices_and_others_refused() -> None:
    q, k, v = qkv()
    whole = block_mask_of()
    ours = flexattn.BlockMask.from_torch(whole)
    with torch_flex.route():
        assert torch.equal(
            flex_attention(q, k, v, block_mask=ours),
            flex_attention(q, k, v, block_mask=whole),  # type: ignore[arg-type]
        )
        with pytest.raises(ValueError, match="slice of a PyTorch BlockMask"):
            flex_attention(q[:, :, 32:], k, v, block_mask=whole[:, :, 1:])
        with pytest.raises(TypeError, match="A dense boolean tensor is a mask function"):
            flex_attention(q, k, v, block_mask=torch.ones(96, 96) > 0)  # type: ignore[arg-type]


def test_a_mask_is_converted_and_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    conversions = 0
    convert = flexattn.BlockMask.from_torch.__func__  # type: ignore[attr-defined]

    def counting(cls: Any, block_mask: Any) -> Any:
        nonlocal conversions
        conversions += 1
        return convert(cls, block_mask)

    monkeypatch.setattr(flexattn.BlockMask, "from_torch", classmethod(counting))
    q, k, v = qkv()
    block_mask = block_mask_of(masks.causal_mask)

    def assert_attends(mask_mod: Any) -> None:
        torch.testing.assert_close(
            flex_attention(q, k, v, block_mask=block_mask), flexattn.flex_attention(q, k, v, mask_mod=mask_mod)
        )

    with torch_flex.route():
        for _ in range(3):
            assert_attends(masks.causal_mask)
        assert conversions == 1
        block_mask.mask_mod = lambda b, h, i, j: (i >= j) & (i - j < 32)  # of the blocks on the diagonal alone
        block_mask.full_kv_num_blocks = torch.zeros_like(block_mask.kv_num_blocks)
        assert_attends(lambda b, h, i, j: (i >= j) & (i // 32 == j // 32))
        assert conversions == 2
        block_mask.kv_num_blocks.zero_()
        assert not flex_attention(q, k, v, block_mask=block_mask).any()
        assert conversions == 3
        block_mask.kv_num_blocks.fill_(9)
        with pytest.raises(ValueError, match="counts between 0 and 3"):
            flex_attention(q, k, v, block_mask=block_mask)
        with torch.inference_mode():
            inside = block_mask_of(masks.causal_mask)
            flex_attention(q, k, v, block_mask=inside)
            inside.kv_num_blocks.zero_()
            assert inside.full_kv_num_blocks is not None
            inside.full_kv_num_blocks.zero_()
            assert not flex_attention(q, k, v, block_mask=inside).any()


def test_nothing_keeps_a_mask_alive() -> None:
    def attend() -> weakref.ref[theirs.BlockMask]:
        q, k, v = qkv()
        block_mask = block_mask_of(masks.causal_mask)
        holder = [block_mask]
        block_mask.mask_mod = lambda b, h, i, j: (i >= j) & (len(holder) == 1)  # refers to the mask itself
        with torch_flex.route():
            flex_attention(q, k, v, block_mask=block_mask)
        return weakref.ref(block_mask)

    gone = attend()
    gc.collect()
    assert gone() is None
