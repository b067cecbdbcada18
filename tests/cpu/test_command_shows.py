"""Each command that shows something: what it prints, and its JSON document."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
import torch
from command_runs import MODULE, Runner, runner

import flexattn
from flexattn import tuning_cache
from flexattn.explain import Explanation
from flexattn_command import info
from flexattn_command.explain import SECTIONS


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Commands, in a folder that has a module of mods."""
    return runner(capsys, tmp_path, monkeypatch, {"own": MODULE})


# ---- info


def test_info_says_what_there_is(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = run.json("info")
    assert found["versions"]["flexattn"] == flexattn.__version__
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["environment"]["OMP_NUM_THREADS"] == "1"
    assert set(found["environment"]) <= set(info.VARIABLES)
    assert found["devices"][0]["type"] == "cpu" and found["devices"][0]["architecture"]
    assert found["optional"].keys() == info.OPTIONAL.keys()
    assert found["cache"] == {"folder": str(tuning_cache.folder()), "entries": 0}
    text = run("info").out
    assert f"  flexattn    {flexattn.__version__}" in re.sub(r"flexattn +", "flexattn    ", text)
    assert f"  {found['backend']['choice']}: " in text


def test_info_tells_why_a_backend_is_taken(run: Runner) -> None:
    found = run.json("info")
    if torch.cuda.is_available():
        assert found["backend"]["choice"] == "triton" and "fused kernels" in found["backend"]["reason"]
        return
    assert found["backend"]["choice"] == "tiled"
    reason = "in Triton's interpreter" if found["interpreter"] else "set TRITON_INTERPRET=1 before Python starts"
    assert reason in found["backend"]["reason"]


def test_a_part_that_is_missing_is_named(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    real = info._version
    monkeypatch.setattr(info, "_version", lambda name: None if name == "matplotlib" else real(name))
    assert run.json("info")["optional"]["matplotlib"] is None
    assert re.search(r"matplotlib +not installed +show --png", run("info").out)


# ---- show


def test_show_draws_blocks_elements_and_the_formula(run: Runner) -> None:
    assert run("show", "sliding_window(2)", "--length", "4", "--block-size", "2").out == (
        "mask      sliding_window(size=2)\n"
        "shape     B=1 H=1 Q_LEN=4 KV_LEN=4\n"
        "blocks    of 2 x 2: 0 full, 3 partial, 1 empty\n"
        "sparsity  25 %\n"
        "formula   x1 = q_idx - kv_idx\n"
        "          keep = (x1 < 2) & (0 <= x1)\n"
        "keys      kv_idx >= q_idx - 1 and kv_idx <= q_idx\n"
        "\n"
        "▒ ·\n"
        "▒ ▒\n"
        "█ full  ▒ partial, or some of several  · empty\n"
        "\n"
        "elements: a row is a query, a column a key\n"
        "1 . . .\n"
        "1 1 . .\n"
        ". 1 1 .\n"
        ". . 1 1\n"
    )


def test_the_document_of_show(run: Runner) -> None:
    assert run.json("show", "causal_mask", "--shape", "4,6", "--block-size", "2") == {
        "schema": 1,
        "command": "show",
        "mask": "causal_mask",
        "shape": [1, 1, 4, 6],
        "block_size": [2, 2],
        "batch": 0,
        "head": 0,
        "sparsity": 50.0,
        "blocks": {"full": 1, "partial": 2, "empty": 3},
        "formula": "keep = q_idx >= kv_idx",
        "keys": ["keys of a query: kv_idx <= q_idx"],
        "picture": "▒ · ·\n█ ▒ ·",
        "elements": [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]],
        "files": [],
    }


def test_a_large_mask_is_gathered_and_has_no_elements(run: Runner) -> None:
    found = run.json("show", "causal_mask", "--length", "16384")
    assert found["elements"] is None
    lines = found["picture"].splitlines()
    assert len(lines) == 32 and all(len(line.split()) == 32 for line in lines)
    assert lines[0].split() == ["▒"] + ["·"] * 31 and lines[-1].split() == ["█"] * 31 + ["▒"]
    assert found["blocks"] == {"full": 128 * 127 // 2, "partial": 128, "empty": 128 * 127 // 2}


def test_the_shape_is_that_of_what_is_read(run: Runner) -> None:
    assert run.json("show", "documents(2, 3)")["shape"] == [1, 1, 5, 5]
    assert run.json("show", "own:same")["shape"] == [1, 1, 5, 5]
    assert run.json("show", "document_mask([[0, 1], [1, 1]])")["shape"] == [2, 1, 2, 2]
    assert run.json("show", "own:same", "--length", "3")["shape"] == [1, 1, 3, 3]
    assert run.json("show", "causal_mask")["shape"] == [1, 1, 1024, 1024]


def test_a_head_is_drawn(run: Runner) -> None:
    ran = run("show", "own:per_head", "--shape", "1,3,2,3", "--head", "1")
    assert "drawn     batch 0, head 1\n" in ran.out and ran.out.endswith("1 1 .\n1 1 .\n")
    assert run.json("show", "own:per_head", "--shape", "1,3,2,3", "--head", "2")["elements"] == [[1, 1, 1], [1, 1, 1]]


def test_a_block_mask_keeps_its_shape(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "lists.py").write_text(
        "import flexattn\n"
        "block = flexattn.create_block_mask(flexattn.masks.causal_mask, None, None, 8, 8, device='cpu', BLOCK_SIZE=4)\n"
        "crossed = block.with_mask_mod(flexattn.masks.sliding_window(2))\n"
    )
    found = run.json("show", "lists.py:block")
    assert found["shape"] == [1, 1, 8, 8] and found["block_size"] == [4, 4]
    ran = run("show", "lists.py:block", "--length", "9")
    assert ran.code == 2 and "is a BlockMask made for lengths (Q_LEN, KV_LEN) = (8, 8), not (9, 9)" in ran.err
    ran = run("show", "lists.py:block", "--block-size", "8")
    assert ran.code == 2 and "is a BlockMask with blocks of (4, 4); leave --block-size out" in ran.err
    # Lists count: the full block below the diagonal is attended whole, whatever the mask function says.
    assert run.json("show", "lists.py:crossed")["elements"][7] == [1, 1, 1, 1, 0, 0, 1, 1]


def test_pictures_are_written(run: Runner, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ran = run("show", "causal_mask", "--length", "300", "--svg", "mask.svg", "--png", "mask.png")
    assert ran.code == 0 and ran.out.endswith("written: mask.svg\n\nwritten: mask.png\n")
    assert (tmp_path / "mask.svg").read_text().startswith("<svg")
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_made_here_is_unavailable(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = run("show", "causal_mask", "--length", "4", "--png", "mask.png")
    assert ran.code == 3 and "--png needs matplotlib: pip install 'flexattn[plot]', or write --svg FILE" in ran.err
    assert run("show", "causal_mask", "--png", "mask.png", "--json").document["error"]["kind"] == "unavailable"


def test_what_a_module_prints_is_not_in_the_document(run: Runner) -> None:
    ran = run("show", "own:same", "--json")
    assert ran.document["shape"] == [1, 1, 5, 5] and "a module that prints" in ran.err


# ---- diff


def test_equal_masks_end_with_0(run: Runner) -> None:
    ran = run("diff", "sliding_window(3)", "own:window(3)", "--length", "16")
    assert ran.code == 0 and "equal" in ran.out
    found = run.json("diff", "sliding_window(3)", "own:window(3)", "--length", "16")
    assert (found["equal"], found["proved"], found["counterexample"], found["count"]) == (True, True, None, 0)
    assert (found["a"], found["b"]) == ("sliding_window(3)", "own:window(3)")


def test_different_masks_end_with_1_and_a_counterexample(run: Runner) -> None:
    ran = run("diff", "sliding_window(3)", "own:window(4)", "--length", "16")
    assert ran.code == 1 and "q_idx=3, kv_idx=0" in ran.out
    found = run.json("diff", "sliding_window(3)", "own:window(4)", "--length", "16")
    assert (found["equal"], found["count"], found["shape"]) == (False, 13, [1, 1, 16, 16])
    assert found["counterexample"] == {"b": 0, "h": 0, "q_idx": 3, "kv_idx": 0, "in_a": False, "in_b": True}
    assert found["picture"] in ran.out


def test_the_length_of_a_diff_is_that_of_the_shorter(run: Runner) -> None:
    assert run.json("diff", "documents(2, 3)", "own:same")["shape"] == [1, 1, 5, 5]
    assert run.json("diff", "documents(2, 4)", "own:same")["shape"] == [1, 1, 5, 5]
    assert run.json("diff", "causal_mask", "causal()")["shape"] == [1, 1, 256, 256]


# ---- explain


def test_explain_has_the_sections_of_the_explanation(run: Runner) -> None:
    assert list(Explanation.__dataclass_fields__) == list(SECTIONS)
    found = run.json("explain", "own:alibi", "--mask", "causal_mask")
    assert list(found) == ["schema", "command", "score_mod", "mask_mod", *SECTIONS]
    assert found["score_mod"] == "`alibi` at own.py:8" and found["mask_mod"].startswith("`causal_mask` at")
    assert found["formula"] == "score' = score + (kv_idx - q_idx) * slopes[h]\nkeep = q_idx >= kv_idx"
    assert found["captured"] == ["c0: slopes, float32 [2]"]
    ran = run("explain", "own:alibi", "--mask", "causal_mask")
    report = flexattn.explain(flexattn.mods.alibi(torch.ones(2)), quiet=True)
    assert [line for line in ran.out.splitlines() if line in SECTIONS] == list(SECTIONS)
    assert report.derivative.splitlines()[0] in ran.out


def test_sections_are_chosen(run: Runner) -> None:
    assert run("explain", "softcap(2)", "--section", "formula").out == "score' = tanh(score / 2) * 2\n"
    assert run("explain", "sliding_window(3)", "--section", "captured").out == "nothing\n"
    two = run("explain", "causal_mask", "--section", "blocks", "--section", "captured")
    assert two.out == "blocks\n  keys of a query: kv_idx <= q_idx\n\ncaptured\n  nothing\n"
    assert list(run.json("explain", "causal_mask", "--section", "blocks"))[2:] == ["score_mod", "mask_mod", "blocks"]


def test_a_dtype_reaches_the_program(run: Runner) -> None:
    assert "score float64" in run("explain", "softcap(2)", "--dtype", "float64", "--section", "program").out


def test_a_target_is_compiled_for_or_refused(run: Runner) -> None:
    words = ("explain", "softcap(2)", "--target", "sm_90", "--section", "kernels")
    if info._interpreted():
        ran = run(*words)
        assert ran.code == 3 and "Triton's interpreter is on: unset TRITON_INTERPRET" in ran.err
    else:
        assert "attention_forward" in run(*words).out


# ---- cache

ENTRY = tuning_cache.Entry(
    tuning_cache.Machine("GPU X", "90", "3.7"),
    {"pass": "forward", "E": 64},
    {"BLOCK_M": 128},
    {"a": 1.5, "b": float("inf")},
)


def test_the_cache_is_listed_and_cleared(run: Runner, tmp_path: Path) -> None:
    assert run.json("cache", "list") == {
        "schema": 1,
        "command": "cache",
        "folder": str(tmp_path / "cache"),
        "entries": [],
    }
    tuning_cache.store(ENTRY)
    (entry,) = run.json("cache", "list")["entries"]
    assert entry["machine"] == {"gpu": "GPU X", "architecture": "90", "triton": "3.7"}
    assert (entry["choice"], entry["milliseconds"]) == ({"BLOCK_M": 128}, {"a": 1.5, "b": None})
    text = run("cache", "list").out
    assert text.startswith("1 tuned configuration in ") and "BLOCK_M=128" in text and "1.5 ms, the fastest of 2" in text
    assert run.json("cache", "clear", "--yes")["deleted"] == 1
    assert tuning_cache.entries() == []
    assert run("cache", "clear").out.startswith("deleted 0 tuned configurations in ")


def test_clear_asks_first(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    tuning_cache.store(ENTRY)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    ran = run("cache", "clear")
    assert ran.code == 2 and "no terminal to ask on; write flexattn cache clear --yes" in ran.err
    for answer, left in (("n\n", 1), ("\n", 1), ("y\n", 0)):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        ran = run("cache", "clear")
        assert ran.code == 0 and "Delete 1 tuned configuration in" in ran.err
        assert len(tuning_cache.entries()) == left, answer
