"""`flexattn check`: what is found wrong, what is not run and why."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import Runner, runner

from flexattn.codegen import derivative, pipeline
from flexattn.codegen.ir import Op
from flexattn_command import checks

MODULE = """
import torch
import flexattn
slopes = torch.tensor([0.5, 0.25, 0.125], requires_grad=True)
ids = torch.tensor([0, 0, 0, 1, 1])
packed = flexattn.Documents.from_lengths([3, 2])
halves = torch.tensor([0.5])
mixed = torch.tensor([[0, 1, 1, 2] * 40, [0] * 90 + [1] * 70])
padded = torch.tensor([-1] * 7 + [5] * 80 + [-1] * 9 + [1] * 64)
image = torch.tensor([-1, -1, 0, 0, 0, -1, 1, 1, 1, -1])
other_images = torch.stack([image, image.flip(0)])
bias = torch.randn(2, 4, 160, generator=torch.Generator().manual_seed(0))


def placed(score, b, h, q_idx, kv_idx):
    return score + bias[b, h, kv_idx] * bias[b, h, q_idx]


def alibi(score, b, h, q_idx, kv_idx):
    return score + slopes[h] * (kv_idx - q_idx)


def sees_images(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) | ((image[q_idx] >= 0) & (image[kv_idx] >= 0))


def off_by_one(b, h, q_idx, kv_idx):
    return q_idx + 1 >= kv_idx


def raising(b, h, q_idx, kv_idx):
    raise RuntimeError("no such table")


def branches(score, b, h, q_idx, kv_idx):
    if q_idx > kv_idx:
        return score
    return -score


block = flexattn.create_block_mask(flexattn.masks.causal_mask, None, None, 24, 24, device="cpu", BLOCK_SIZE=8)
"""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Commands, in a folder that has a module of mods."""
    return runner(capsys, tmp_path, monkeypatch, {"tried": MODULE})


def outcomes(document: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["outcome"] for check in document["checks"]}


SMALL = ("--length", "24", "--head-dim", "8", "--device", "cpu")


def test_a_good_mod_passes_every_check(run: Runner) -> None:
    ran = run("check", "tried:alibi", "--mask", "causal_mask", "--causal", *SMALL, "--json")
    found = ran.document
    assert ran.code == 0, ran.out
    assert set(outcomes(found).values()) <= {"passed", "not run"}
    for name in ("trace", "law trace", "law derivative", "reference", "gradients", "causal"):
        assert outcomes(found)[name] == "passed", name
    assert outcomes(found)["leaks"] == "not run"
    assert found["sizes"] == {"B": 2, "Hq": 3, "Hkv": 3, "L": 24, "S": 24, "E": 8, "Ev": 8}
    assert (found["subject"], found["dtype"], found["backend"]) == ("tried:alibi, causal_mask", "float32", "auto")
    assert found["device"] == "cpu"
    assert found["passed"] == sum(o == "passed" for o in outcomes(found).values()) and found["failed"] == 0
    assert all(check["seconds"] >= 0 for check in found["checks"])


def test_each_check_is_a_line(run: Runner) -> None:
    ran = run("check", "causal_mask", *SMALL)
    lines = ran.out.splitlines()
    assert lines[0] == "causal_mask: B=2, Hq=4, Hkv=2, L=24, S=24, E=8, Ev=8, float32, cpu"
    assert any(line.startswith("passed   trace: the mods become a program (") for line in lines)
    assert "not run  gradients: the generated derivative agrees with finite differences" in lines
    assert "         a mask has no derivative" in lines
    assert "         no documents were given: --documents 60,40,60" in lines
    assert "         not asked for: --causal" in lines
    assert lines[-1].endswith(" not run") and ", 0 failed, " in lines[-1]


def test_a_mask_that_sees_the_future_fails(run: Runner) -> None:
    ran = run("check", "tried:off_by_one", "--causal", *SMALL)
    assert ran.code == 1
    failed = ran.out[ran.out.index("failed   causal: no query sees a later key") :]
    assert "q_idx=0, kv_idx=1" in failed and ", 1 failed, " in ran.out.splitlines()[-1]
    found = run.json("check", "tried:off_by_one", "--causal", *SMALL)
    (causal,) = (c for c in found["checks"] if c["name"] == "causal")
    assert causal["outcome"] == "failed" and "q_idx=0, kv_idx=1" in causal["error"]


def test_images_may_see_themselves_where_it_is_said(run: Runner) -> None:
    asked = ("--causal", "--within", "tried:image", "--head-dim", "8")
    right = run.json("check", "transfusion([-1, -1, 0, 0, 0, -1, 1, 1, 1, -1])", *asked)
    assert outcomes(right)["causal"] == "passed" and right["sizes"]["L"] == right["sizes"]["S"] == 10
    assert outcomes(run.json("check", "transfusion([0, 0, 1, 1])", "--causal", "--head-dim", "8"))["causal"] == "failed"
    assert (
        outcomes(run.json("check", "noop_mask", "--causal", "--within", "3,2", "--head-dim", "8"))["causal"] == "failed"
    )
    assert (
        outcomes(run.json("check", "noop_mask", "--causal", "--within", "5", "--head-dim", "8"))["causal"] == "passed"
    )
    wrong = run("check", "tried:sees_images", *asked)
    assert wrong.code == 1 and "it attends at b=0, h=0, q_idx=2, kv_idx=6, ids 0 and 1 of `within`" in wrong.out
    rows = run.json("check", "causal_mask", "--causal", "--within", "tried:other_images", "--head-dim", "8")
    assert outcomes(rows)["causal"] == "passed" and rows["sizes"]["B"] == 2


def test_queries_may_start_among_the_keys(run: Runner) -> None:
    problem = ("--causal", "--shape", "8,24", "--head-dim", "8")
    assert outcomes(run.json("check", "causal(16)", *problem))["causal"] == "failed"
    assert outcomes(run.json("check", "causal(16)", *problem, "--offset", "16"))["causal"] == "passed"
    assert outcomes(run.json("check", "causal(17)", *problem, "--offset", "16"))["causal"] == "failed"
    found = run.json("check", "causal(4)", "--causal", "--within", "tried:image", "--offset", "4", "--head-dim", "8")
    assert outcomes(found)["causal"] == "passed" and (found["sizes"]["L"], found["sizes"]["S"]) == (6, 10)


REFUSED = {
    ("--within", "tried:image"): "--within says what --causal allows; write --causal too",
    ("--offset", "3"): "--offset says what --causal allows; write --causal too",
    ("--causal", "--offset", "-3"): "argument --offset: '-3' is no whole number from 0 on",
    ("--causal", "--within", "words"): "argument --within: 'words' has no lengths; write 60,40,60, or MODULE:NAME",
    ("--causal", "--within", "tried:halves"): "--within tried:halves: a torch.float32 of shape [1]; ids are integers",
    (
        "--causal",
        "--within",
        "tried:image",
        "--length",
        "11",
    ): "--within has ids [10], and there are 2 batch entries of 11 pos",
    (
        "--causal",
        "--within",
        "tried:other_images",
        "--shape",
        "3,1,10,10",
    ): "--within has ids [2, 10], and there are 3 batch",
}


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_what_does_not_go_with_causal_is_a_mistake(run: Runner, words: tuple[str, ...]) -> None:
    ran = run("check", "causal_mask", *words)
    assert ran.code == 2 and REFUSED[words] in ran.err, ran.err


def test_no_mask_at_all_is_not_causal(run: Runner) -> None:
    assert outcomes(run.json("check", "softcap(2)", "--causal", *SMALL))["causal"] == "failed"


def test_documents_are_kept_apart_or_not(run: Runner) -> None:
    good = run.json("check", "causal_mask & documents(3, 2)", "--documents", "3,2", "--head-dim", "8")
    assert outcomes(good)["leaks"] == "passed" and good["sizes"]["L"] == 5
    for documents in ("3, 2", "tried:ids", "tried:packed", "tried.py:ids"):
        ran = run("check", "causal_mask", "--documents", documents, "--head-dim", "8", "--json")
        (leaks,) = (c for c in ran.document["checks"] if c["name"] == "leaks")
        assert ran.code == 1 and leaks["outcome"] == "failed" and "q_idx=3, kv_idx=0" in leaks["error"], documents


@pytest.mark.parametrize("documents", ["tried:mixed", "tried:padded"])
def test_documents_get_the_same_bits_in_any_packing(
    run: Runner, monkeypatch: pytest.MonkeyPatch, documents: str
) -> None:
    """Mods that read a tensor for each token, in documents that are no runs, in two rows, or with padding between."""
    words = ("check", "tried:placed", "--mask", f"document_mask({documents})", "--documents", documents)
    words = (*words, "--head-dim", "8", "--device", "cpu")
    assert outcomes(run.json(*words))["invariance"] == "passed"
    without = functools.partial(checks.assert_batch_invariant, batch_invariant=False)
    monkeypatch.setattr(checks, "assert_batch_invariant", without)
    found = run.json(*words)
    (failed,) = (c for c in found["checks"] if c["outcome"] == "failed")
    assert failed["name"] == "invariance" and "when it is packed" in failed["error"]


def test_without_documents_no_packing_is_tried(run: Runner) -> None:
    assert outcomes(run.json("check", "causal_mask", *SMALL))["invariance"] == "not run"


def test_leaks_are_looked_for_on_the_device(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(checks, "assert_no_leak", lambda *_, device, **options: asked.append(device))
    run("check", "causal_mask", "--documents", "3,2", "--head-dim", "8", "--device", "cpu")
    assert asked == ["cpu"]


def test_a_mod_that_cannot_be_traced_fails_and_ends_the_rest(run: Runner) -> None:
    ran = run("check", "tried:branches", *SMALL)
    assert ran.code == 1
    assert "uses `if` on a traced value" in ran.out and "Write instead: " in ran.out
    found = run.json("check", "tried:branches", *SMALL)
    assert outcomes(found) == {c.name: "failed" if c.name == "trace" else "not run" for c in checks.CHECKS}
    assert {c["why"] for c in found["checks"][1:]} == {"the mods cannot be traced"}


def test_a_wrong_derivative_is_found(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(derivative.DERIVATIVES, Op.TANH, lambda node, grad: (grad,))
    pipeline.variant.cache_clear()  # which keeps derivatives
    ran = run("check", "softcap(1.25)", *SMALL, "--json")
    pipeline.variant.cache_clear()
    failed = {name for name, outcome in outcomes(ran.document).items() if outcome == "failed"}
    assert ran.code == 1 and {"law derivative", "reference", "gradients"} <= failed


def test_a_block_mask_brings_its_lengths(run: Runner) -> None:
    found = run.json("check", "tried:block", "--head-dim", "8")
    assert (found["sizes"]["L"], found["sizes"]["S"]) == (24, 24)
    assert outcomes(found)["reference"] == "passed"


def test_a_failure_shows_its_traceback_on_demand(run: Runner) -> None:
    assert "Traceback" not in run("check", "tried:off_by_one", "--causal", *SMALL).err
    assert "AssertionError" in run("check", "tried:off_by_one", "--causal", *SMALL, "--debug").err


MISTAKES = {
    (
        "check",
        "causal_mask",
        "--documents",
        "3,x",
    ): "argument --documents: '3,x' has no lengths; write 60,40,60, or MODULE:NAME",
    (
        "check",
        "causal_mask",
        "--documents",
        "3,2",
        "--length",
        "6",
    ): "--documents has 5 tokens, the shape 6 queries or keys",
    (
        "check",
        "causal_mask",
        "--documents",
        "tried:halves",
    ): "a torch.float32 of shape [1]; ids are integers, [S] or [B, S]",
    ("check", "causal_mask", "--documents", "tried:idx"): "tried has no 'idx'; did you mean ids?",
    ("check", "causal_mask", "--kv-heads", "3"): "--kv-heads 3: Hq=4 is no multiple of Hkv=3",
    ("check", "causal_mask", "--backend", "cuda"): "'cuda' is unknown. Write one of auto, triton, tiled, reference",
    ("bench", "tried:branches"): "tried:branches: score_mod at",
    ("bench", "alibi(2)", "--length", "16", "--heads", "4"): "index 2 is out of range for dimension 0 (size 2)",
    ("show", "tried:raising", "--length", "8"): "tried:raising: RuntimeError: no such table, at tried.py:",
    ("show", "tried.py"): "a function of that file is tried.py:NAME",
    ("bench", "tried:block", "--length", "9"): "tried:block: a BlockMask made for lengths (Q_LEN, KV_LEN) = (24, 24)",
}


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_a_mistake_is_answered_without_a_traceback(run: Runner, words: tuple[str, ...]) -> None:
    ran = run(*words)
    assert ran.code == 2, ran
    assert MISTAKES[words] in ran.err and "Traceback" not in ran.err


def test_kernels_that_cannot_run_here_are_unavailable(run: Runner) -> None:
    ran = run("check", "causal_mask", "--backend", "triton", "--dtype", "float64")
    assert ran.code == 3 and "--backend triton: the fused kernel" in ran.err


def test_a_gpu_that_is_not_there_is_unavailable(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in (("bench",), ("check", "causal_mask")):
        ran = run(*words, "--device", "cuda")
        assert ran.code == 3 and "--device cuda: there is no GPU here" in ran.err
