"""`flexattn bench`: which times are compared, who is not timed and why."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import Runner, runner

import flexattn
from flexattn_command import contenders, times
from flexattn_command.contenders import Problem
from flexattn_command.output import Output
from flexattn_command.pairs import Pair

MODULE = """
import flexattn

block = flexattn.create_block_mask(flexattn.masks.causal_mask, None, None, 24, 24, device="cpu", BLOCK_SIZE=8)
"""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Commands, in a folder that has a module of block masks."""
    return runner(capsys, tmp_path, monkeypatch, {"tried": MODULE})


def test_bench_times_what_it_can(run: Runner) -> None:
    found = run.json(
        "bench", "sliding_window(8)", "--length", "32", "64", "--heads", "2", "--seconds", "0.01", "--device", "cpu"
    )
    assert (found["device"], found["dtype"]) == ("cpu", "float32")
    assert [(r["subject"], r["L"], r["H"]) for r in found["results"]] == [("sliding_window(8)", n, 2) for n in (32, 64)]
    for result in found["results"]:
        ours, dense, compiled = result["contenders"]
        assert (ours["name"], ours["forward_ratio"], ours["backward_ratio"]) == ("flexattn", 1.0, 1.0)
        assert dense["name"] == "sdpa, dense mask" and dense["differs"] is None
        assert dense["forward_ratio"] == pytest.approx(dense["forward_ms"] / ours["forward_ms"])
        assert min(ours["rounds"], dense["rounds"]) >= times.LEAST_ROUNDS
        assert compiled["forward_ms"] is None and "--compile" in compiled["not_run"]


def test_large_scores_are_no_difference_and_a_bias_that_16_bits_round_is() -> None:
    mods = Pair("large", lambda score, b, h, q, k: score + (1000.0 + 0.1 * (k - q)), None)
    for dtype, said in (("float32", ""), ("bfloat16", r"its output is not flexattn's.* It takes the bias in bfloat16")):
        problem = Problem.of(mods, (1, 1, 256, 16), dtype, "cpu", compiles=False)
        dense = times.measure(problem, 0.01, Output("bench", True))[1]
        assert dense.name == contenders.DENSE and (re.search(said, dense.differs) if said else not dense.differs)


def test_bench_prints_a_table(run: Runner) -> None:
    words = (
        "alibi(2)",
        "--mask",
        "causal_mask",
        "--length",
        "32",
        "--heads",
        "2",
        "--seconds",
        "0.01",
        "--device",
        "cpu",
    )
    out = run("bench", *words).out.splitlines()
    assert out[0].startswith("alibi(2), causal_mask: B=1 H=2 L=32 E=64, float32, cpu, ")
    assert out[1].split() == ["forward", "ms", "ratio", "backward", "ms", "ratio"]
    assert out[2].split()[0] == "flexattn" and out[2].split()[2] == "1.00"
    assert out[3].startswith("  sdpa, dense mask ") and "-" not in out[3].split()


def test_the_length_is_that_of_what_is_read(run: Runner) -> None:
    words = ("--heads", "1", "--head-dim", "8", "--seconds", "0.01", "--device", "cpu")
    assert run.json("bench", "documents(3, 2)", *words)["results"][0]["L"] == 5
    assert run.json("bench", "tried:block", *words)["results"][0]["L"] == 24


def test_a_mod_that_is_no_bias_has_no_dense_rival(run: Runner) -> None:
    found = run.json("bench", "softcap(3)", "--length", "16", "--heads", "1", "--seconds", "0.01", "--device", "cpu")
    assert "does more than add a bias" in found["results"][0]["contenders"][1]["not_run"]


def test_a_dense_mask_that_does_not_fit_is_not_made(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "_free_memory", lambda device: 2**20)
    found = run.json("bench", "causal_mask", "--length", "512", "--heads", "1", "--seconds", "0.01", "--device", "cpu")
    assert "the dense mask and scores need" in found["results"][0]["contenders"][1]["not_run"]


def test_a_rival_that_computes_something_else_is_told(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setitem(contenders.CONTENDERS, "sdpa, dense mask", lambda problem: attend)  # which drops the mask
    ran = run("bench", "causal_mask", "--length", "32", "--seconds", "0.01", "--device", "cpu", "--json")
    rival = ran.document["results"][0]["contenders"][1]
    assert ran.code == 1 and "its output is not flexattn's" in rival["differs"] and rival["forward_ms"] is None


def test_a_rival_that_fails_is_told(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(problem: Problem) -> Any:
        raise RuntimeError("out of something")

    monkeypatch.setitem(contenders.CONTENDERS, "sdpa, dense mask", fail)
    ran = run("bench", "causal_mask", "--length", "32", "--seconds", "0.01", "--device", "cpu", "--json")
    assert ran.code == 0
    assert (
        ran.document["results"][0]["contenders"][1]["not_run"] == "not run: it failed: RuntimeError: out of something"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_results_are_compared_in_every_dtype(run: Runner, dtype: str) -> None:
    """Rows without keys, and grouped positions: a right rival is never taken for a wrong one."""
    nothing_first = "sliding_window(5) & ~global_tokens(3)"
    words = ("--length", "64", "--heads", "2", "--dtype", dtype, "--seconds", "0.01", "--device", "cpu")
    for mask in (nothing_first, "documents(20, 44) & causal_mask"):
        ran = run("bench", mask, *words, "--json")
        assert ran.code == 0, ran.document
    assert run("bench", "alibi(2)", "--mask", "causal_mask", *words).code == 0


def test_the_compiled_rival_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = torch.compile

    def compile(function: Any, **options: Any) -> Any:  # eager flex_attention uses it, too
        if function is not contenders.peer.flex_attention:
            return real(function, **options)
        seen.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    mods = Pair("causal_mask", None, flexattn.masks.causal_mask)
    problem = Problem.of(mods, (1, 1, 32, 8), "float32", "cpu", compiles=True)
    with pytest.warns(UserWarning, match="materializes"):
        contenders.peer._WARNINGS_SHOWN.clear()
        rows = times.measure(problem, 0.01, Output("bench", True))
    assert seen == [{"dynamic": False}]
    compiled = rows[2].to_dict(rows[0])
    assert compiled["forward_ms"] > 0 and compiled["backward_ms"] is None and compiled["differs"] is None
    assert compiled["not_run"] == "backward not run: PyTorch's flex_attention has none on a CPU"
