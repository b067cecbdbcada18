"""Compile the warp-specialised kernel for sm_90 and print what it uses, one JSON record a variant.

Run in a process of its own by test_hopper_compile.py: the tests themselves run Triton's interpreter.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from every_operation import mod

from flexattn import masks, mods
from flexattn.backends import hopper
from flexattn.backends.launch import Call, choose, compiled
from flexattn.backends.resources import instructions
from flexattn.backends.target import compiling_for, named
from flexattn.backends.triton import Forward, forward_call
from flexattn.codegen.evaluate import TORCH_DTYPE
from flexattn.codegen.ir import DType
from flexattn.codegen.pipeline import Variant, variant
from flexattn.codegen.spec import SIGNATURES, letter
from flexattn.codegen.trace import trace
from flexattn.config import KernelConfig
from flexattn.problem import Problem

TARGET = named("sm_90")
HEADS, LENGTH = 8, 4096
SLOPES = torch.ones(HEADS)
DOCUMENTS = torch.arange(LENGTH) // 512
VARIANTS: dict[str, tuple[Any, Any]] = {
    "noop": (None, None),
    "causal": (None, masks.causal_mask),
    "alibi": (mods.alibi(SLOPES), masks.causal_mask),
    "softcap": (mods.softcap(30.0), masks.causal_mask),
    "documents": (None, masks.and_masks(masks.document_mask(DOCUMENTS), masks.causal_mask)),
}


def call_of(v: Variant, captured: list[Any], dtype: torch.dtype, E: int, Ev: int, listed: bool) -> Call:
    q, k, value, out = (torch.empty(1, HEADS, LENGTH, n, dtype=dtype) for n in (E, E, Ev, Ev))
    row = torch.empty(1, HEADS, LENGTH)
    blocks = LENGTH // 128
    count, index = torch.zeros(1, 1, blocks, dtype=torch.int32), torch.zeros(1, 1, blocks, blocks, dtype=torch.int32)
    p = Problem(q, k, value, captured, [count, index] * 2 if listed else [], [], (128, 128), v, E**-0.5)
    return hopper.specialised(forward_call(p, Forward(out, row, row), {}), p)


def table() -> Iterator[dict[str, Any]]:
    """What is chosen for each variant and head dimension."""
    for E in hopper.HEAD_DIMS:
        for name, (score, mask) in VARIANTS.items():
            program, captured, _ = trace(score, mask)
            chosen = choose(call_of(variant(program), captured, torch.bfloat16, E, E, mask is not None), TARGET)
            code, ptx = instructions(chosen.kernel), chosen.kernel.asm["ptx"]
            yield {
                "variant": name,
                "E": E,
                "keys": chosen.config.BLOCK_N,
                **chosen.resources._asdict(),
                "products": len(re.findall(r"\bHGMMA\.", code)),
                "copies": len(re.findall(r"\bUTMALDG\.", code)),
                "registers of a part": sorted({int(n) for n in re.findall(r"setmaxnreg\.dec\S*\s+(\d+)", ptx)}),
                "unordered": unordered(ptx),
                "loops": [loop_order(loop) for loop in loops(code)],
            }


def unordered(ptx: str) -> int:
    """Arrivals at a `free` barrier that do not come after all warps of the consumer have waited for the product."""
    words = re.findall(r"wgmma\.wait_group|bar(?:rier)?\.sync|mbarrier\.arrive\.shared", ptx)
    return sum(
        word.startswith("mbarrier") and not (words[i - 1].startswith("bar") and "wait_group" in words[i - 2])
        for i, word in enumerate(words)
    )


def loops(code: str) -> list[list[str]]:
    """The instructions of the innermost loops that compute exponentials: the two phases of both consumers."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)
    places = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    found = []
    for i, (_, text) in enumerate(lines):
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        start = places.get(int(jump[1], 16), i + 1) if jump else i + 1
        body = [line for _, line in lines[start : i + 1]]
        if sum("MUFU.EX2" in line for line in body) > 32 and not any(s >= start for s, _ in found):
            found.append((start, body))
    return [body for _, body in found]


def loop_order(body: list[str]) -> str:
    """Order of what is asynchronous: G for products, their wait with how many may remain, e for exponentials."""
    words = []
    for line in body:
        wait = re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", line)
        word = "G" if "HGMMA" in line else "e" if "MUFU.EX2" in line else wait[1] if wait else ""
        if word and words[-1:] != [word]:
            words.append(word)
    return "".join(words)


def operations() -> Iterator[dict[str, Any]]:
    """Every operation of a score_mod on a bool, an integer and a float."""
    for dtype in (
        DType.BOOL,
        DType.INT32,
        DType.BFLOAT16,
    ):  # what the layouts depend on is the operation, not the dtype
        ops = [op for op, signature in SIGNATURES.items() if letter(dtype) in signature.accepts]
        captured = [torch.zeros(8, dtype=TORCH_DTYPE[dtype]) for _ in range(2)]
        compiled(call_of(mod(dtype, ops), captured, torch.float16, 64, 64, False), KernelConfig(128, 64, 4, 2))
        yield {"dtype": dtype.value, "operations": len(ops)}


def forms() -> Iterator[dict[str, Any]]:
    """Other operands: float16, two head dimensions, and a score that is a number."""
    number = trace(lambda score, b, h, q_idx, kv_idx: torch.ones_like(score), None)
    for name, program, E, Ev in (("64 and 128", trace(None, None), 64, 128), ("a number", number, 64, 64)):
        kernel = choose(call_of(variant(program.program), program.captured, torch.float16, E, Ev, False), TARGET)
        yield {"form": name, **kernel.resources._asdict()}


if __name__ == "__main__":
    with compiling_for(TARGET):
        print(json.dumps(list({"table": table, "operations": operations, "forms": forms}[sys.argv[1]]())))
