"""The kernels compile for GPUs that are not there: no spills, the right matrix instruction, shared memory that fits.

In a process of its own, since the tests run Triton's interpreter, with an empty cache, so that times are those of compiling.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexattn.codegen.ir import DType

ROOT = Path(__file__).resolve().parents[2]
MATRIX = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


def run(*command: str, cache: Path) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("target", list(MATRIX))
def test_default_kernels_compile(target: str, tmp_path: Path, record_property: Any) -> None:
    whole = target == "sm_90"
    records = json.loads(
        run("scripts/compile_table.py", "--json", *([] if whole else ["--half"]), target, cache=tmp_path)
    )
    record_property("compiled", records)
    # Variants, head dimensions, kernels; and where one pass is preferred, its kernel, but for ALiBi with learned slopes.
    one_pass = {"sm_90": 3, "sm_100": 2}.get(target, 0)
    assert len(records) == 4 * (2 if whole else 1) * 3 + one_pass
    assert sum(r["pass"] == "one_pass" for r in records) == one_pass
    for record in records:
        assert record["shared"] <= record["limit"], record
        assert record["spilled"] == 0, record
        assert record["matrix"] == MATRIX[target], record


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_operation_compiles_on_every_dtype(target: str, tmp_path: Path) -> None:
    lines = run("tests/compile_only/every_operation.py", target, cache=tmp_path).splitlines()
    assert len(lines) == len(DType)
    assert all(line.endswith("operations compile") for line in lines), lines


REPORT = """
import torch, flexattn
slopes, cap = torch.ones(8, requires_grad=True), 30.0
double = torch.ones(8, dtype=torch.float64)
capped = lambda score, b, h, q_idx, kv_idx: torch.where(
    double[h] < 0.7, score, cap * torch.tanh(score / cap) + slopes[h] * (kv_idx - q_idx)
)
report = flexattn.explain(capped, flexattn.masks.causal_mask, dtype=torch.bfloat16, head_dim=128, target="sm_90", quiet=True)
print(report.kernels)
"""


def test_explain_compiles_for_a_gpu_that_is_only_named(tmp_path: Path) -> None:
    lines = run("-c", REPORT, cache=tmp_path).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "attention_forward", "attention_backward_dq", "attention_backward_dkdv",
    ]  # fmt: skip
    assert all("BLOCK_M=" in line and " registers, 0 bytes spilled, " in line for line in lines)


PINNED = """
import torch, flexattn
def kernels(target="sm_90", head_dim=64, **options):
    return flexattn.explain(
        None, flexattn.masks.causal_mask, dtype=torch.bfloat16, head_dim=head_dim, target=target, kernel_options=options,
        quiet=True,
    ).kernels.splitlines()
found = kernels(fwd_BLOCK_M=64, num_warps=4, BLOCK_N=32, fwd_USE_TMA=False, BLOCK_M2=32, BLOCK_N2=32, BLOCK_M1=32, BLOCK_N1=64)
print(*found, *kernels(ONE_PASS=True, UPRIGHT=True, AUTOTUNE=True, bwd_num_stages=1), sep="\\n")
print(kernels("gfx942", kpack=2, waves_per_eu=2, BLOCK_M=64)[0])
for refused in ({"target": "sm_80", "USE_TMA": True}, {"target": "gfx942", "FAST_TANH": True}, {"kpack": 2}, {"BLOCK_N": 256},
                {"target": "sm_80", "WARP_SPECIALIZED": True}, {"head_dim": 20, "OVERLAP": True}):
    try:
        kernels(**refused)
    except ValueError as error:
        print(error)
"""


def test_explain_shows_the_kernels_with_what_is_pinned_or_refuses_it(tmp_path: Path) -> None:
    forward, dq, dkdv, plain, one, untimed, amd, *refusals = run("-c", PINNED, cache=tmp_path).splitlines()
    assert forward.startswith("attention_forward: BLOCK_M=64, BLOCK_N=32, num_warps=4,") and "TMA" not in forward
    assert dq.startswith("attention_backward_dq: BLOCK_M=32, BLOCK_N=32, num_warps=4,") and "by TMA" in dq
    assert dkdv.startswith("attention_backward_dkdv: BLOCK_M=32, BLOCK_N=64, num_warps=4,")
    assert "queries as rows" not in plain
    assert "num_stages=1" in one and "queries as rows, dQ in the same pass" in one and "without AUTOTUNE" in untimed
    assert amd.startswith("attention_forward: BLOCK_M=64,")
    assert len(refusals) == 6 and all("cannot be followed" in line for line in refusals)


CHAIN = """
import torch
from flexattn import config
from flexattn.backends import launch
from flexattn.backends.survey import calls
from flexattn.backends.target import compiling_for, named
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace
from flexattn.config import KernelConfig, Pinned
call = calls(variant(trace(None, None).program), [], [], torch.bfloat16, 128, "cpu")[0]
target = named("sm_90")
with compiling_for(target):
    launch.chain = lambda *args: (KernelConfig(64, 64, 4, 9), KernelConfig(128, 128, 4, 1), KernelConfig(64, 64, 4, 1))
    assert launch.resources(launch.compiled(call, KernelConfig(128, 128, 4, 1))).spilled > 0
    chosen = launch.choose(call, target)
    print(chosen.config.BLOCK_M, chosen.config.num_warps, chosen.resources.spilled)
    launch.chain = config.chain
    pinned = Pinned(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=9)
    try:
        launch.choose(call._replace(pinned=pinned), target)
    except ValueError as error:
        print(error)
"""


def test_a_configuration_that_does_not_fit_or_spills_gives_way_to_the_next(tmp_path: Path) -> None:
    chosen, refusal = run("-c", CHAIN, cache=tmp_path).splitlines()
    assert chosen == "64 4 0"
    assert refusal.startswith(
        "no configuration of the forward kernel with BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=9 fits"
    )
    assert "bytes of shared memory, cuda 90 has 232448" in refusal
    assert refusal.endswith("leave out or lower BLOCK_M, BLOCK_N, num_warps, num_stages")


REFUSED = """
import torch
from flexattn import KernelError
from flexattn.backends.launch import choose
from flexattn.backends.survey import calls
from flexattn.backends.target import compiling_for, named
from flexattn.codegen import emit
from flexattn.codegen.ir import Op
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace
emit.SPELLING[Op.SIN] = lambda node, args, tl: f"{tl}.sin({args[0]}, 3, 4)"
program = trace(lambda score, b, h, q_idx, kv_idx: torch.sin(score + q_idx), None).program
call = calls(variant(program), [], [], torch.bfloat16, 64, "cpu")[0]
try:
    with compiling_for(named("sm_90")):
        choose(call, named("sm_90"))
except KernelError as error:
    print(error.role, error.node.op.value, error.code)
"""


def test_an_error_of_the_compiler_names_the_generated_line_and_its_operation(tmp_path: Path) -> None:
    assert run("-c", REFUSED, cache=tmp_path) == "score_mod sin t2 = tl.sin(t1, 3, 4)\n"


# How each is collected.
COLLECTED = {
    "0-d": "row", "slopes": "row", "row gate": "row", "column gate": "column", "relative": "diagonal",
    "T5 buckets": "diagonal", "pair bias": "store", "indirect": "atomic",
}  # fmt: skip


def test_only_arbitrary_indices_need_atomics(tmp_path: Path) -> None:
    records = json.loads(run("scripts/gradient_table.py", "--json", "sm_90", cache=tmp_path))
    assert [(r["variant"], r["kernel"]) for r in records] == [
        (name, kernel) for name in COLLECTED for kernel in ("backward_dq", "backward_dkdv")
    ]
    for record in records:
        assert record["collected"] == COLLECTED[record["variant"]]
        assert record["matrix"] > 0, ("its inner loops were not found", record)
        assert record["spilled"] == 0, record
        needs_atomics = record["variant"] == "indirect" and record["kernel"] == "backward_dq"
        assert (record["atomics"] > 0) == needs_atomics, record
        sums = record["collected"] == {"backward_dq": "row", "backward_dkdv": "column"}[record["kernel"]]
        if sums:  # a row is summed by shuffles between four lanes, and nothing is stored in a loop
            assert 0 < record["shuffles"] <= 16 and record["stores"] == 0, record


FAST_TANH = """
import torch
from flexattn import mods
from flexattn.backends import triton as backend
from flexattn.backends.launch import choose
from flexattn.backends.survey import calls
from flexattn.backends.target import compiling_for, named
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace
own = backend._functions
target = named("sm_90")
program, captured, ints = trace(mods.softcap(20.0), None)
for fast in (False, True):
    backend._functions = lambda problem, options, *rest: own(problem, {"FAST_TANH": fast}, *rest)
    for call in calls(variant(program), captured, ints, torch.float16, 64, "cpu")[:3]:
        with compiling_for(target):
            print(choose(call, target).kernel.asm["ptx"].count("tanh.approx.f32"))
"""


def test_fast_tanh_is_one_instruction(tmp_path: Path) -> None:
    exact, fast = (counts := list(map(int, run("-c", FAST_TANH, cache=tmp_path).split())))[:3], counts[3:]
    assert exact == [0, 0, 0] and len(fast) == 3 and min(fast) > 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_batch_invariant_calls_of_all_sizes_choose_alike_and_compute_alike(target: str, tmp_path: Path) -> None:
    sizes = json.loads(run("tests/compile_only/invariant_choices.py", target, cache=tmp_path))
    for records in zip(*sizes, strict=True):
        (which,) = {r["pass"] for r in records}
        assert len({r["launched"] for r in records}) > 1, f"{which}: kernels of their own, or nothing is tested"
        for same in ("config", "chosen by", "arithmetic"):
            assert len({r[same] for r in records}) == 1, (which, same, records)
