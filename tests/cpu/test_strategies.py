"""Generated mods, operands, ids and masks: their programs make them again, they shrink to the ordinary, and they differ."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, find, given, settings
from torch import Tensor

import flexattn
from flexattn import BlockMask, Documents, create_mask, flex_attention, masks, mods
from flexattn.codegen.trace import trace
from flexattn.testing import AttentionInputs, Sizes, describe
from flexattn.testing.generated import Generated, GeneratedMask, GeneratedNormalizer, GeneratedScore
from flexattn.testing.grammar import CAUSAL, IDENTITY, MASK_ARGUMENTS, SCORE_ARGUMENTS, Space, grammar
from flexattn.testing.grammar_expressions import Captured, Function, Literal
from flexattn.testing.grammar_operations import OPERATIONS
from flexattn.testing.strategies import (
    attention_inputs,
    block_masks,
    document_ids,
    documents,
    mask_mods,
    normalizers,
    score_mods,
    sizes,
)

INDEX = [
    torch.arange(n, dtype=torch.int32).view([-1 if i == d else 1 for i in range(4)])
    for d, n in enumerate((2, 4, 9, 11))
]


def again(value: Any) -> Any:
    """What the program of a value makes: the one name that it is about."""
    made: dict[str, Any] = {}
    exec(describe(value), made)
    names = ("block_mask", "mask_mod", "score_mod", "normalizer", "documents", "document_ids")
    return next(made[name] for name in names if name in made)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def smallest(strategy: st.SearchStrategy[Any], holds: Callable[[Any], bool]) -> Any:
    """What an example shrinks to for which something holds."""
    quick = settings(max_examples=150, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    return find(strategy, holds, settings=quick)


# ---- programs


@given(mod=st.one_of(mask_mods(), score_mods(3), score_mods(requires_grad=True)))
def test_the_program_of_a_mod_means_the_mod(mod: Generated) -> None:
    made = again(mod)
    score = torch.randn(2, 4, 9, 11)
    arguments = [score, *INDEX] if isinstance(mod, GeneratedScore) else INDEX
    assert same(torch.as_tensor(made(*arguments)).detach(), torch.as_tensor(mod(*arguments)).detach()), mod.describe()
    assert len(repr(mod)) < 100
    other = pickle.loads(pickle.dumps(mod))
    assert other == mod and hash(other) == hash(mod)
    assert same(torch.as_tensor(other(*arguments)).detach(), torch.as_tensor(mod(*arguments)).detach())


@given(mod=score_mods(3), dtype=st.sampled_from([torch.float64, torch.bfloat16]))
def test_the_tensors_of_a_mod_take_another_dtype(mod: GeneratedScore, dtype: torch.dtype) -> None:
    moved = mod.to("cpu", dtype)
    assert {t.dtype for t in moved.captured.values() if t.is_floating_point()} <= {dtype}
    score = torch.randn(2, 4, 9, 11, dtype=dtype)
    assert same(torch.as_tensor(again(moved)(score, *INDEX)), torch.as_tensor(moved(score, *INDEX)))


@given(normalizer=normalizers(requires_grad=True), inputs=attention_inputs(sizes(heads=4).filter(lambda s: s.Hq == 4)))
def test_a_normalizer_is_a_softmax_with_one_more_entry(
    normalizer: GeneratedNormalizer, inputs: AttentionInputs
) -> None:
    q, k, v = (t.double() for t in inputs[:3])
    out, lse = flex_attention(q, k, v, mask_mod=masks.causal_mask, return_lse=True, enable_gqa=True)
    got = normalizer(out, lse)
    assert same(again(normalizer)(out, lse).detach(), got.detach()) and got.dtype == out.dtype
    group = inputs.sizes.Hq // inputs.sizes.Hkv
    k, v = (t.expand(inputs.sizes.B, -1, -1, -1).repeat_interleave(group, 1) for t in (k, v))
    scores = q @ k.mT * inputs.sizes.E**-0.5
    scores = scores.masked_fill(~create_mask(masks.causal_mask, None, None, *scores.shape[2:], "cpu"), -torch.inf)
    name = str(normalizer.root)
    if "sigmoid" in name:
        one = torch.zeros(()) if "sink" not in name else normalizer.captured["sink"].detach().double().view(-1, 1, 1)
        scores = torch.cat([scores, one.expand(*scores.shape[:3], 1)], -1)
        v = torch.cat([v, torch.zeros_like(v[:, :, :1]) if v.shape[2] else v.new_zeros(*v.shape[:2], 1, v.shape[3])], 2)
    torch.testing.assert_close(got.detach(), torch.softmax(scores, -1).nan_to_num(0.0) @ v, rtol=1e-9, atol=1e-9)


@given(inputs=attention_inputs(requires_grad=True))
def test_the_program_of_operands_makes_them(inputs: AttentionInputs) -> None:
    made: dict[str, Any] = {}
    exec(inputs.describe(), made)
    for name in ("query", "key", "value"):
        assert torch.equal(made[name], getattr(inputs, name)) and made[name].requires_grad
        assert made[name].dtype == getattr(inputs, name).dtype
    assert "tensor(" not in repr(inputs)
    shared = inputs.key.shape[0] < inputs.sizes.B
    assert inputs.query.shape == (inputs.sizes.B, inputs.sizes.Hq, inputs.sizes.L, inputs.sizes.E)
    assert inputs.key.shape == (1 if shared else inputs.sizes.B, inputs.sizes.Hkv, inputs.sizes.S, inputs.sizes.E)
    assert inputs.value.shape == (*inputs.key.shape[:3], inputs.sizes.Ev)


@given(ids=document_ids(st.integers(0, 40), batch=2) | document_ids(30, padding=False, most=3))
def test_ids_are_packed_and_their_program_makes_them(ids: Tensor) -> None:
    assert torch.equal(again(ids), ids) and again(ids).dtype == ids.dtype == torch.int32
    for row in ids.view(-1, ids.shape[-1]) if ids.numel() else ():
        kept = row[row >= 0]
        assert torch.equal(row[: len(kept)], kept), "padding is at the end"
        assert kept.tolist() == sorted(kept.tolist()) and set(kept.tolist()) == set(range(len(set(kept.tolist()))))
        assert len(row) == 0 or len(kept) >= len(row) // 2


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(mask=block_masks())
def test_the_program_of_a_block_mask_makes_it(mask: BlockMask) -> None:
    made = again(mask)
    assert made.sizes == mask.sizes and made.seq_lengths == mask.seq_lengths and made.BLOCK_SIZE == mask.BLOCK_SIZE
    assert torch.equal(made.to_dense(), mask.to_dense())
    if mask.mask_mod is not None and isinstance(mask.mask_mod, Generated):
        assert torch.equal(
            create_mask(made.mask_mod, 2, 4, 9, 11, "cpu"), create_mask(mask.mask_mod, 2, 4, 9, 11, "cpu")
        )


@given(packed=documents(20))
def test_the_program_of_documents_makes_them(packed: Documents) -> None:
    assert torch.equal(again(packed).document_ids, packed.document_ids)


def test_what_cannot_be_described_is_refused() -> None:
    with pytest.raises(TypeError, match="got BlockMask of a mask_mod that was not generated"):
        describe(flexattn.create_block_mask(masks.causal_mask, None, None, 16, 16, "cpu"))
    with pytest.raises(TypeError, match="strategies give, got float"):
        describe(1.0)


# ---- shrinking


def test_masks_shrink_to_causal_and_scores_to_identity() -> None:
    assert smallest(mask_mods(), lambda mod: True).root == CAUSAL
    assert smallest(score_mods(), lambda mod: True).root == IDENTITY
    assert smallest(normalizers(), lambda f: True).describe() == "def normalizer(out, lse):\n    return out"


def test_a_mask_shrinks_to_the_smallest_that_still_fails() -> None:
    reads = smallest(mask_mods(), lambda mod: "mixed[b, kv_idx]" in str(mod.root))
    assert len(str(reads.root)) < 120, reads
    future = smallest(mask_mods(captured=False), lambda mod: bool(create_mask(mod, 2, 4, 5, 5, "cpu").triu(1).any()))
    assert future.describe() == "import flexattn\n\nmask_mod = flexattn.masks.noop_mask"


def test_operands_shrink_to_the_smallest_zeros() -> None:
    zeros = smallest(attention_inputs(), lambda inputs: True)
    assert zeros.sizes == (1,) * 7 and not zeros.query.any() and zeros.query.dtype is torch.float32
    nonzero = smallest(attention_inputs(), lambda inputs: bool(inputs.value.any()))
    assert nonzero.sizes == (1,) * 7 and (nonzero.seed, nonzero.magnitude) == (0, 1.0)
    longer = smallest(attention_inputs(), lambda inputs: inputs.sizes.S > 20)
    assert longer.sizes == (1, 1, 1, 1, 21, 1, 1)


def test_ids_shrink_to_one_document_and_block_masks_to_causal() -> None:
    assert smallest(document_ids(10), lambda ids: True).tolist() == [0] * 10
    assert smallest(document_ids(10), lambda ids: bool((ids < 0).any())).tolist() == [0] * 9 + [-1]
    mask = smallest(block_masks(), lambda mask: True)
    assert isinstance(mask.mask_mod, GeneratedMask) and mask.mask_mod.root == CAUSAL and mask.seq_lengths == (1, 1)
    listed = smallest(block_masks(), lambda mask: not mask.is_exact)
    assert not listed.to_dense().any()


# ---- power


FUNCTIONS = {"i": MASK_ARGUMENTS, "c": MASK_ARGUMENTS, "s": SCORE_ARGUMENTS}
RULES = [
    pytest.param(space, kind, rule, id=f"{kind}{i}{'' if space.captured else ' plain'}")
    for space in (Space(), Space(captured=False))
    for kind, rules in grammar(space).items()
    for i, rule in enumerate((*rules.leaves, *rules.nested))
]


def simplest(space: Space, kind: str) -> Any:
    """An expression of a kind for the hole of a rule, not of one input alone where there is such."""
    if kind in "nw":
        return Literal(3)
    rule = grammar(space)[kind].leaves[2 if kind == "i" else 0]
    return rule.build(*(simplest(space, hole) for hole in rule.holes))


def made_by(space: Space, kind: str, rule: Any) -> Generated:
    root = rule.build(*(simplest(space, hole) for hole in rule.holes))
    function = Function(FUNCTIONS[kind], root) if kind in FUNCTIONS else root
    return (GeneratedScore if kind in "sdo" else GeneratedMask)(function)


@pytest.mark.parametrize(("space", "kind", "rule"), RULES)
def test_every_rule_makes_what_its_program_says(space: Space, kind: str, rule: Any) -> None:
    mod = made_by(space, kind, rule)
    score = torch.randn(2, 4, 9, 11)
    arguments = [score, *INDEX] if isinstance(mod, GeneratedScore) else INDEX
    assert same(torch.as_tensor(again(mod)(*arguments)), torch.as_tensor(mod(*arguments))), mod.describe()
    assert bool(mod.captured) <= space.captured
    if kind not in "is":  # integers and scores are parts of masks and mods
        trace(*((mod, None) if isinstance(mod, GeneratedScore) else (None, mod)))


def test_every_operation_is_used_by_a_rule() -> None:
    made = [made_by(*param.values).root for param in RULES]
    waiting, used = [*made, *(f.root for f in (smallest(normalizers(), lambda f: "sink" in f.captured),))], set()
    while waiting:
        x = waiting.pop()
        used.add(getattr(x, "operation", ""))
        waiting += [*x.operands, *([x.made] if isinstance(x, Captured) else [])]
    assert set(OPERATIONS) - used == set()


def test_most_masks_are_functions_and_nest() -> None:
    """What is drawn, not only what could be: a strategy of ready-made masks alone would test little."""
    seen: list[str] = []

    @settings(max_examples=150, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(mod=st.one_of(mask_mods(), score_mods()))
    def draw(mod: Generated) -> None:
        seen.append(str(mod.root))

    draw()
    assert sum("lambda" in text for text in seen) > len(seen) // 3
    assert sum(len(text) > 80 for text in seen) > len(seen) // 5
    assert len(set(seen)) > len(seen) // 2


def test_without_captured_tensors_there_are_none() -> None:
    @settings(max_examples=60, database=None, derandomize=True)
    @given(mod=st.one_of(mask_mods(captured=False), score_mods(captured=False)))
    def draw(mod: Generated) -> None:
        assert mod.captured == {}

    draw()


def test_captured_tensors_reach_as_far_as_was_said() -> None:
    @settings(max_examples=60, database=None, derandomize=True)
    @given(mod=score_mods(batch=3, heads=2, length=5), mask=mask_mods(batch=3, heads=2, length=5))
    def draw(mod: Generated, mask: Generated) -> None:
        index = [torch.arange(n).view([-1 if i == d else 1 for i in range(4)]) for d, n in enumerate((3, 2, 5, 5))]
        mod(torch.zeros(3, 2, 5, 5), *index)  # type: ignore[operator]
        mask(*index)  # type: ignore[operator]

    draw()
    assert grammar(Space(length=5)) is not grammar(Space())


def test_gradients_reach_captured_tensors() -> None:
    mod = smallest(
        score_mods(requires_grad=True), lambda mod: "slopes" in mod.captured and "compose" not in str(mod.root)
    )
    q, k, v = (torch.randn(1, 4, 8, 8) for _ in range(3))
    flex_attention(q, k, v, mod).square().sum().backward()
    assert mod.captured["slopes"].grad is not None
    assert smallest(score_mods(), lambda mod: "slopes" in mod.captured).captured["slopes"].requires_grad is False


def test_a_generated_mod_compiles() -> None:
    mod = smallest(score_mods(), lambda mod: "gate" in mod.captured and "lambda" in str(mod.root))
    mask = smallest(mask_mods(), lambda mod: "and_masks" in str(mod.root) and "lambda" in str(mod.root))
    q, k, v = (torch.randn(1, 4, 8, 8) for _ in range(3))
    blocks = flexattn.create_block_mask(mask, 1, 4, 8, 8, "cpu")
    compiled = torch.compile(lambda q, k, v: flex_attention(q, k, v, mod, blocks), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), flex_attention(q, k, v, mod, blocks))


def test_an_example_that_fails_is_printed_as_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    @settings(max_examples=50, database=None, derandomize=True, print_blob=False)
    @given(mask=mask_mods())
    def fails(mask: GeneratedMask) -> None:
        assert not create_mask(mask, 2, 4, 5, 5, "cpu").triu(1).any()

    with pytest.raises(AssertionError) as error:
        fails()
    notes = "\n".join(getattr(error.value, "__notes__", [])) + capsys.readouterr().out
    assert "mask_mod = flexattn.masks.noop_mask" in notes


def test_wrong_sizes_are_refused() -> None:
    for make in (lambda: mask_mods(-1), lambda: score_mods(heads=0), lambda: normalizers(heads=2.0)):
        with pytest.raises(ValueError, match="it must be an integer"):
            make()
    with pytest.raises(ValueError, match="a batch of at least 1 or None"):
        smallest(document_ids(-1), lambda ids: True)


def test_an_error_names_the_generated_mod() -> None:
    mod = smallest(score_mods(), lambda mod: mod.root == IDENTITY)
    with pytest.raises(flexattn.TraceError, match=r"`flexattn\.mods\.identity` takes 5 arguments"):
        trace(None, mod)
    assert mods.identity is again(mod)


# ---- types


@settings(max_examples=10)
@given(st.from_type(BlockMask), st.from_type(Documents), st.from_type(Sizes), st.from_type(AttentionInputs))
def test_types_have_strategies(mask: BlockMask, packed: Documents, sizes: Sizes, inputs: AttentionInputs) -> None:
    assert again(mask).seq_lengths == mask.seq_lengths and packed.document_ids.dtype is torch.int32
    sizes.check()
    inputs.sizes.check()


@pytest.mark.parametrize(
    "order",
    [
        "import hypothesis, flexattn.testing",
        "import flexattn, hypothesis",
        "import hypothesis, flexattn, flexattn.testing",
    ],
)
def test_types_are_known_whatever_is_imported_first(order: str) -> None:
    code = f"{order}\nfrom hypothesis import strategies as st\nimport flexattn\n"
    code += "assert 'block_masks' in repr(st.from_type(flexattn.BlockMask))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hypothesis_alone_does_not_import_torch_and_testing_does_not_import_hypothesis() -> None:
    for code in (
        "import hypothesis, sys\nassert 'torch' not in sys.modules and 'flexattn' not in sys.modules",
        "import flexattn.testing, sys\nassert not {'hypothesis', 'pytest'} & set(sys.modules)",
    ):
        subprocess.run([sys.executable, "-c", code], check=True)
