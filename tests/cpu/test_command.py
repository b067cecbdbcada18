"""The command line: what each command prints, its JSON document, its errors, and how it ends."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import Runner

import flexattn
from flexattn import tuning_cache
from flexattn.command import failures, info, main, output, shapes, start
from flexattn.command.explain import SECTIONS
from flexattn.explain import Explanation

MODULE = """
import torch
print("a module that prints")
slopes = torch.tensor([0.5, 0.25])
ids = torch.tensor([0, 0, 1, 1, 1])


def alibi(score, b, h, q_idx, kv_idx):
    return score + slopes[h] * (kv_idx - q_idx)


def cubic(score, b, h, q_idx, kv_idx):
    return score * score * score


def per_head(b, h, q_idx, kv_idx):
    return kv_idx <= h


def same(b, h, q_idx, kv_idx):
    return ids[q_idx] == ids[kv_idx]


def window(size):
    return lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < size)


def branches(b, h, q_idx, kv_idx):
    if q_idx > kv_idx:
        return q_idx == 0
    return q_idx == kv_idx
"""

BRANCH = MODULE.splitlines().index("    if q_idx > kv_idx:") + 1


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Commands, in a folder that has a module of mods."""
    (tmp_path / "own.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own", raising=False)
    monkeypatch.delenv("FLEXATTN_DEBUG", raising=False)
    monkeypatch.setenv("FLEXATTN_CACHE_DIR", str(tmp_path / "cache"))
    return Runner(capsys)


# ---- help, mistakes, exit codes


def test_help_names_every_command_and_exit_code(run: Runner) -> None:
    ran = run("--help")
    assert (ran.code, ran.err) == (0, "")
    for name in main.COMMANDS:
        assert re.search(rf"^    {name} ", ran.out, re.MULTILINE), name
    for code, meaning in failures.EXIT_CODES.items():
        assert re.search(rf"^  {code} +{re.escape(meaning)}$", ran.out, re.MULTILINE), code


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_has_help_with_an_example_that_parses(run: Runner, name: str) -> None:
    ran = run(name, "--help")
    assert ran.code == 0 and f"example: {main.COMMANDS[name].example}" in ran.out
    assert "--json" in ran.out and "--debug" in ran.out
    words = [w.strip("'") for w in re.findall(r"'[^']*'|\S+", main.COMMANDS[name].example)]
    assert words[0] == "flexattn"
    main.parser().parse_args(words[1:])


def test_the_version_is_printed(run: Runner) -> None:
    assert run("--version").out == f"flexattn {flexattn.__version__}\n"


def test_no_command_is_a_mistake(run: Runner) -> None:
    ran = run()
    assert ran.code == 2 and ran.out == "" and "usage: flexattn" in ran.err


MISTAKES = {
    (
        "shwo",
        "causal_mask",
    ): "there is no command 'shwo'; the commands are info, show, diff, explain, check, bench, cache; "
    "did you mean `flexattn show`?",
    (
        "zzz",
    ): "there is no command 'zzz'; the commands are info, show, diff, explain, check, bench, cache; flexattn --help",
    ("show",): "the following arguments are required: MASK\nusage: flexattn show",
    ("show", "causal_mask", "--lenght", "3"): "unrecognized arguments: --lenght 3",
    ("show", "causal_mask", "--length", "0"): "argument --length: '0' is no whole number from 1 on, such as 128",
    ("show", "causal_mask", "--length", "12.5"): "'12.5' is no whole number from 1 on",
    ("show", "causal_mask", "--length", "4", "--shape", "4,4"): "argument --shape: not allowed with argument --length",
    (
        "show",
        "causal_mask",
        "--shape",
        "4",
    ): "'4' is no shape; write Q,KV or B,H,Q,KV, such as 512,1024 or 2,8,512,1024",
    ("show", "causal_mask", "--shape", "4x4"): "'4x4' is no shape",
    ("show", "causal_mask", "--shape", "4,0"): "'4,0' has a size of 0; sizes are 1 or more",
    ("show", "causal_mask", "--head", "-1"): "'-1' is no whole number from 0 on",
    ("show", "causal_mask", "--head", "x"): "'x' is no whole number from 0 on",
    (
        "show",
        "causl_mask",
    ): "argument MASK: 'causl_mask' is no name of flexattn.masks or flexattn.mods; did you mean causal_mask?",
    ("show", "causal_mask", "--head", "1"): "--head 1: the mask has 1, counted from 0; --shape B,H,Q,KV gives it more",
    ("show", "softcap(3)"): "softcap(3) takes (score, b, h, q_idx, kv_idx): it is a score_mod, and a mask is asked for",
    ("show", "own:branches"): f"own.py:{BRANCH} uses `if` on a traced value",
    ("show", "own:same", "--length", "9"): "own:same: IndexError: the mask reads a captured tensor of shape [5]",
    (
        "show",
        "causal_mask",
        "--length",
        "4",
        "--svg",
        "no/such/folder.svg",
    ): "--svg no/such/folder.svg: FileNotFoundError",
    ("diff", "causal_mask"): "the following arguments are required: MASK_B",
    ("diff", "causal_mask", "softcap(3)"): "it is a score_mod, and a mask is asked for",
    ("diff", "causal_mask", "own:branches"): f"own.py:{BRANCH} uses `if`",
    (
        "explain",
        "softcap(3)",
        "--section",
        "formulas",
    ): "'formulas' is unknown; did you mean formula? Write one of program",
    (
        "explain",
        "softcap(3)",
        "--dtype",
        "fp16",
    ): "argument --dtype: 'fp16' is unknown; did you mean float16? Write one of",
    ("explain", "softcap(3)", "--target", "h100"): "--target: unknown target 'h100'; known are sm_80",
    (
        "explain",
        "causal_mask",
        "--mask",
        "own:same",
    ): "causal_mask is a mask, and --mask own:same is another one; combine them: 'causal_mask & own:same'",
    ("bench", "--seconds", "0"): "argument --seconds: '0' is no number of seconds, such as 0.5",
    ("bench", "--seconds", "nan"): "'nan' is no number of seconds",
    ("bench", "--device", "gpu"): "'gpu' is unknown; did you mean cuda? Write one of cpu, cuda",
    ("bench", "--device", "mps"): "'mps' is unknown. Write one of cpu, cuda",
    ("cache", "lst"): "argument list|clear: 'lst' is unknown; did you mean list? Write one of list, clear",
    ("cache",): "the following arguments are required: list|clear",
}


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_a_mistake_is_answered_without_a_traceback(run: Runner, words: tuple[str, ...]) -> None:
    ran = run(*words)
    assert ran.code == 2
    assert MISTAKES[words] in ran.err
    known = words[0] in main.COMMANDS
    assert ran.err.startswith(
        f"flexattn {words[0]}: error: " if known else "flexattn: error: ", ran.err.find("flexattn")
    )
    assert "Traceback" not in ran.err and "Traceback" not in ran.out


def test_debug_shows_the_traceback(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = run("show", "own:branches")
    assert "--debug shows where it was raised" in quiet.err and "Traceback" not in quiet.err
    for ran in (run("show", "own:branches", "--debug"), _with_variable(run, monkeypatch)):
        assert "Traceback" in ran.err and "TraceError" in ran.err and ran.code == 2


def _with_variable(run: Runner, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("FLEXATTN_DEBUG", "1")
    return run("show", "own:branches")


def test_a_mistake_is_a_document_too(run: Runner) -> None:
    ran = run("show", "causl_mask", "--json")
    assert ran.code == 2
    assert ran.document["error"]["kind"] == "arguments" and ran.document["error"]["exit_code"] == 2
    assert "did you mean causal_mask?" in ran.document["error"]["message"]


def test_an_error_inside_is_told_from_a_mistake(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def fall(*_: object) -> int:
        raise RuntimeError("fell over")

    monkeypatch.setitem(main.COMMANDS, "info", main.COMMANDS["info"]._replace(run=fall))
    ran = run("info")
    assert ran.code == 4 and "Traceback" in ran.err and "error inside flexattn: RuntimeError: fell over" in ran.err
    ran = run("info", "--json")
    assert ran.document["error"] == {"kind": "internal", "message": "RuntimeError: fell over", "exit_code": 4}


def test_an_interruption_ends_quietly(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(main.COMMANDS, "info", main.COMMANDS["info"]._replace(run=interrupt))
    ran = run("info")
    assert (ran.code, ran.out, ran.err) == (130, "", "interrupted\n")


def test_the_arguments_of_a_process_are_read_from_it(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["flexattn", "--version"])
    monkeypatch.setattr(sys, "stdout", written := io.StringIO())
    assert main.main() == 0
    assert written.getvalue() == f"flexattn {flexattn.__version__}\n"


# ---- start-up


def process(*words: str) -> subprocess.CompletedProcess[str]:
    """A new Python with these arguments."""
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)


SCRIPT = (
    "import sys; sys.argv = ['bin/flexattn', *sys.argv[1:]]; from flexattn.command.main import main; sys.exit(main())"
)


@pytest.mark.parametrize(
    ("words", "code"),
    [(("--help",), 0), (("--version",), 0), (("show", "--help"), 0), (("shwo",), 2), (("show", "causl_mask"), 2)],
    ids=str,
)
def test_help_and_mistakes_do_not_wait_for_pytorch(words: tuple[str, ...], code: int) -> None:
    for way in (("-m", "flexattn"), ("-c", SCRIPT)):
        ran = process("-X", "importtime", *way, *words)
        assert ran.returncode == code, ran.stderr[-2000:]
        imported = {
            line.rpartition("|")[2].strip() for line in ran.stderr.splitlines() if line.startswith("import time:")
        }
        assert "flexattn.command.main" in imported
        assert not imported & {"torch", "triton", "sympy", "numpy"}


def test_a_command_loads_the_package_and_says_how_it_went() -> None:
    same = process("-m", "flexattn", "diff", "causal_mask", "causal()", "--length", "8", "--json")
    assert same.returncode == 0 and '"equal": true' in same.stdout, same.stderr[-2000:]
    other = process("-c", SCRIPT, "diff", "causal_mask", "sliding_window(3)", "--length", "8")
    assert other.returncode == 1 and "differ in 15 of 64 elements" in other.stdout, other.stderr[-2000:]


def test_the_reader_of_a_pipe_may_leave() -> None:
    command = f"{sys.executable} -m flexattn show causal_mask | true; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() in ("0", "141") and "Traceback" not in ran.stderr


def test_a_program_of_that_name_has_the_whole_package() -> None:
    named = "import sys; sys.argv = ['somewhere/flexattn']; import flexattn; "
    ran = process("-c", named + "print(flexattn.flex_attention.__name__, flexattn.masks)")
    assert ran.returncode == 0 and ran.stdout.startswith("flex_attention <module 'flexattn.masks'"), ran.stderr[-2000:]
    absent = "import sys; sys.argv = ['somewhere/flexattn']; import flexattn; flexattn.no_such_name"
    assert "module 'flexattn' has no attribute 'no_such_name'" in process("-c", absent).stderr


def test_only_the_command_reads_its_arguments_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "_loaded", False)
    for argv, words, first in (
        (["/usr/bin/flexattn", "show"], [], True),
        (["C:\\bin\\flexattn.exe"] if os.name == "nt" else ["bin/flexattn"], [], True),
        (["-m", "show"], ["python", "-m", "flexattn", "show"], True),
        (["-m"], ["python", "-X", "dev", "-m", "flexattn"], True),
        (["-m"], ["python", "-m", "pytest", "flexattn"], False),
        (["-c"], ["python", "-c", "pass"], False),
        (["train.py", "flexattn"], [], False),
        ([], [], False),
    ):
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "orig_argv", words)
        assert start.arguments_come_first() is first, argv
    monkeypatch.setattr(start, "_loaded", True)
    monkeypatch.setattr(sys, "argv", ["flexattn"])
    assert not start.arguments_come_first()


# ---- output


def test_numbers_that_are_not_finite_are_null() -> None:
    found = output.plain({"a": float("nan"), "b": [float("inf"), 1.5], "c": {1: (True, None)}, "d": torch.float32})
    assert found == {"a": None, "b": [None, 1.5], "c": {"1": [True, None]}, "d": "torch.float32"}


def test_progress_is_told_where_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, expected in ((Terminal(), "working ...\n"), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", stream)
        output.Output("info", False).progress("working")
        assert stream.getvalue() == expected


def test_shapes_are_read() -> None:
    assert shapes.shape("4, 8") == (None, None, 4, 8)
    assert shapes.shape("(2,3,4,8)") == (2, 3, 4, 8)
    assert shapes.shape("4,8").sizes == (1, 1, 4, 8)
    with pytest.raises(argparse.ArgumentTypeError):
        shapes.shape("1,2,3")


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
    assert ran.code == 3 and "--png needs matplotlib: pip install flexattn[plot], or write --svg FILE" in ran.err
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


def test_the_entry_point_is_there() -> None:
    module = importlib.import_module("flexattn.__main__")
    assert module.main is main.main
    points = importlib.import_module("importlib.metadata").entry_points(group="console_scripts", name="flexattn")
    assert [p.value for p in points] == ["flexattn.command.main:main"]
