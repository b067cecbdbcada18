"""The program text: snapshots of named variants, and refusal of anything else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flexattn import masks, mods
from flexattn.codegen.access import usual_methods
from flexattn.codegen.derivative import DERIVATIVES, ZERO_DERIVATIVE
from flexattn.codegen.emit import functions
from flexattn.codegen.errors import ProgramError
from flexattn.codegen.evaluate import EVALUATE
from flexattn.codegen.ir import Op
from flexattn.codegen.pipeline import variant
from flexattn.codegen.program import parse
from flexattn.codegen.spec import LEAVES, SIGNATURES
from flexattn.codegen.trace import trace

SNAPSHOTS = Path(__file__).parents[1] / "snapshots"
ids = torch.zeros(8, dtype=torch.int64)
gate = torch.zeros(2, 4, 8)
buckets = torch.zeros(4, 32)
bias = torch.zeros(2, 4, 8, 8)

VARIANTS: dict[str, tuple[Callable[..., Any] | None, Callable[..., Any] | None]] = {
    "noop": (None, None),
    "causal": (None, masks.causal_mask),
    "sliding_window": (None, masks.sliding_window(256)),
    "document_causal": (None, masks.and_masks(masks.document_mask(ids), masks.causal_mask)),
    "prefix_lm": (None, masks.prefix_lm(torch.tensor([3, 5]))),
    "alibi_causal": (mods.alibi(torch.ones(4)), masks.causal_mask),
    "softcap": (mods.softcap(30.0), masks.causal_mask),
    "relative_bias": (mods.relative_bias(torch.zeros(4, 15)), None),
    "dense_bias": (lambda score, b, h, q_idx, kv_idx: score + bias[b, h, q_idx, kv_idx], None),
    "forget_gate": (
        lambda score, b, h, q_idx, kv_idx: score + gate[b, h, q_idx] - gate[b, h, kv_idx],
        masks.causal_mask,
    ),
    "t5_buckets": (
        lambda score, b, h, q_idx, kv_idx: score + buckets[h, (q_idx - kv_idx).clamp(0, 31)],
        masks.causal_mask,
    ),
    "log_distance": (
        lambda score, b, h, q_idx, kv_idx: score - torch.log1p(abs(q_idx - kv_idx) / 4) * torch.sigmoid(score),
        masks.or_masks(masks.sliding_window(64), masks.prefix_lm(4)),
    ),
    "learned_row": (
        lambda score, b, h, q_idx, kv_idx: score * (1 + buckets[h, :3].sum() / 3),
        masks.not_mask(masks.chunked(4)),
    ),
}


def assert_recorded(text: str, path: Path) -> None:
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.write_text(text)
    assert text == path.read_text(), "run with UPDATE_SNAPSHOTS=1 if the change is meant"


@pytest.mark.parametrize("name", VARIANTS)
def test_the_program_of_a_named_variant_is_the_recorded_one(name: str) -> None:
    assert_recorded(trace(*VARIANTS[name]).program + "\n", SNAPSHOTS / f"{name}.txt")


@pytest.mark.parametrize("name", VARIANTS)
def test_the_generated_functions_of_a_named_variant_are_the_recorded_ones(name: str) -> None:
    compiled = variant(trace(*VARIANTS[name]).program)
    learned = [i for i, (dtype, _) in enumerate(compiled.captured) if dtype.is_float]
    methods = usual_methods(compiled.derivative.loads, learned)
    made = [f.source for f in functions(compiled, methods) if f is not None]
    assert_recorded("\n".join(made) or "# no functions\n", SNAPSHOTS / f"{name}.triton.txt")


def test_every_operation_is_in_every_table_it_needs() -> None:
    handled = LEAVES | {Op.LOAD, Op.CAST}
    for op in Op:
        assert op in handled or op in EVALUATE, f"{op} has no meaning"
        assert op in handled or op in SIGNATURES or op is Op.WHERE, f"{op} has no signature"
        takes_floats = op in SIGNATURES and "f" in SIGNATURES[op].accepts
        if takes_floats:
            assert (op in DERIVATIVES) != (op in ZERO_DERIVATIVE), f"{op} has no derivative, or two"


GOOD = trace(*VARIANTS["alibi_causal"]).program


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not a flexattn program"),
        ("import os\nscore float32\nreturn score score", "not a flexattn program"),
        (GOOD.replace("sub(kv_idx, q_idx)", "__import__(kv_idx, q_idx)"), "not understood"),
        (GOOD.replace("sub(kv_idx, q_idx)", "sub(kv_idx)"), "wrong number of operands"),
        (GOOD.replace("sub(kv_idx, q_idx)", "sub(kv_idx, score)"), "illegal node"),
        (GOOD.replace("sub(kv_idx, q_idx)", "sub(kv_idx, t9)"), "'t9' is not defined"),
        (GOOD.replace("load(c0, h)", "load(c0, h, b)"), "2 indices for a tensor of rank 1"),
        (GOOD.replace("load(c0, h)", "load(h, c0)"), "only a captured tensor"),
        (GOOD.replace("captured c0 float32 1", "captured c1 float32 1"), "not understood"),
        (GOOD.replace("return score t4", "return score t0"), "returns a float32 score"),
        (GOOD.replace("return mask t5", "return mask t4"), "bool mask"),
        (GOOD.replace("return score t4\n", ""), "must return a score"),
        (GOOD.replace("cast(t0, float32)", "cast(t0, complex64)"), "names its dtype"),
        (GOOD + "\nt6 = os.system(1)", "not understood"),
        (GOOD.replace("le(kv_idx, q_idx)", "le(int32(1.5), q_idx)"), "not a literal"),
    ],
)
def test_a_text_outside_the_grammar_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ProgramError, match=complaint.replace("(", r"\(")):
        parse(text)
