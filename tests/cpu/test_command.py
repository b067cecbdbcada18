"""The command line as a whole: help, mistakes, how it ends, how it starts, what goes to which stream."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import MODULE, Runner, runner

import flexattn
from flexattn_command import failures, main, output, shapes

BRANCH = MODULE.splitlines().index("    if q_idx > kv_idx:") + 1


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Commands, in a folder that has a module of mods."""
    return runner(capsys, tmp_path, monkeypatch, {"own": MODULE})


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
    ("show", "causal_mask", "--lenght", "3"): "there is no option --lenght; did you mean --length?",
    ("show", "--shap", "1,2,3,4", "causal_mask"): "there is no option --shap; did you mean --shape?",
    ("show", "causal_mask", "--jsn"): "there is no option --jsn; did you mean --json?",
    ("show", "causal_mask", "-length", "3"): "there is no option -length; did you mean --length?",
    ("show", "causal_mask", "--block_size=3"): "there is no option --block_size; did you mean --block-size?",
    ("show", "causal_mask", "--zzz"): "there is no option --zzz; there are --help, --length, --shape, --block-size",
    ("bench", "--lengths", "3"): "there is no option --lengths; did you mean --length?",
    ("check", "causal_mask", "--doc", "3,2"): "there is no option --doc; did you mean --documents?",
    ("show", "causal_mask", "more", "words"): "'more words' is too much\nusage: flexattn show [-h] [--length N",
    ("cache", "list", "--yse"): "there is no option --yse; did you mean --yes?",
    ("show", "causal_mask", "--length"): "argument --length: a value is missing; write --length N",
    ("bench", "--length"): "argument --length: a value is missing; write --length N",
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
    (
        "show",
        "causal_mask",
        "--length",
        "2147483648",
    ): "2147483648 is too long: positions are 32-bit integers, write 2147483647",
    ("diff", "causal_mask", "noop_mask", "--shape", "4,2147483648"): "2147483648 is too long: positions are 32-bit",
    ("bench", "causal_mask", "--length", "2147483648"): "2147483648 is too long: positions are 32-bit integers",
    ("show", "causal_mask", "--head", "-1"): "'-1' is no whole number from 0 on",
    ("show", "causal_mask", "--head", "x"): "'x' is no whole number from 0 on",
    (
        "show",
        "causl_mask",
    ): "argument MASK: 'causl_mask' is no name of flexattn.masks or flexattn.mods; did you mean causal_mask?",
    ("show", "causal_mask", "--head", "1"): "--head 1: the mask has 1, counted from 0; --shape B,H,Q,KV gives it more",
    ("show", "softcap(3)"): "softcap(3) takes (score, b, h, q_idx, kv_idx): it is a score_mod, and a mask is asked for",
    ("show", "own:branches"): f"own.py:{BRANCH} uses `if` on a traced value",
    (
        "show",
        "own:same",
        "--length",
        "9",
    ): "own:same: the mask reads ids, a captured tensor of shape [5], at ids[q_idx]",
    (
        "diff",
        "own:same",
        "causal_mask",
        "--length",
        "9",
    ): "the mask reads ids, a captured tensor of shape [5], at ids[q",
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


@pytest.mark.parametrize(
    ("word", "said"), [("--json", "there are --help, --version"), ("--vers", "did you mean --version?")]
)
def test_options_of_a_command_come_after_it(run: Runner, word: str, said: str) -> None:
    ran = run(word, "show", "causal_mask")
    assert ran.code == 2
    assert ran.err == (
        f"flexattn show: error: there is no option {word} before the command; those of a command come after its name; {said}\n"
    )


def test_what_stands_after_two_dashes_is_no_option(run: Runner) -> None:
    assert run("show", "--length", "4", "--", "causal_mask").code == 0


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
    error = run("info", "--json").document["error"]
    assert error == {"kind": "interrupted", "message": "interrupted", "exit_code": 130}


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 40 GB")],
)
def test_what_does_not_fit_into_memory_is_no_mistake(error: Exception) -> None:
    said = "own:mask: there is not enough memory; choose a smaller shape"
    with pytest.raises(failures.Unavailable, match=said), failures.reading("own:mask"):
        raise error


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
    "import sys; sys.argv = ['bin/flexattn', *sys.argv[1:]]; from flexattn_command.main import main; sys.exit(main())"
)


@pytest.mark.parametrize(
    ("words", "code"),
    [(("--help",), 0), (("--version",), 0), (("show", "--help"), 0), (("shwo",), 2), (("show", "causl_mask"), 2)],
    ids=str,
)
def test_help_and_mistakes_do_not_wait_for_pytorch(words: tuple[str, ...], code: int) -> None:
    ran = process("-X", "importtime", "-c", SCRIPT, *words)
    assert ran.returncode == code, ran.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines() if line.startswith("import time:")}
    assert "flexattn_command.main" in imported
    assert not imported & {"flexattn", "torch", "triton", "sympy", "numpy"}


def test_the_module_is_the_command() -> None:
    ran = process("-m", "flexattn", "shwo")
    assert ran.returncode == 2 and "did you mean `flexattn show`?" in ran.stderr, ran.stderr[-2000:]


def test_a_command_loads_the_package_and_says_how_it_went() -> None:
    same = process("-m", "flexattn", "diff", "causal_mask", "causal()", "--length", "8", "--json")
    assert same.returncode == 0 and '"equal": true' in same.stdout, same.stderr[-2000:]
    other = process("-c", SCRIPT, "diff", "causal_mask", "sliding_window(3)", "--length", "8")
    assert other.returncode == 1 and "differ in 15 of 64 elements" in other.stdout, other.stderr[-2000:]


def test_the_reader_of_a_pipe_may_leave() -> None:
    command = f"{sys.executable} -m flexattn show causal_mask | true; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() in ("0", "141") and "Traceback" not in ran.stderr


@pytest.mark.parametrize(("into", "code"), [("/dev/full", 3), ("&-", 0)])
def test_a_stdout_that_takes_nothing_is_no_error_inside(into: str, code: int) -> None:
    for option in ("", "--json"):
        command = f"{sys.executable} -m flexattn diff causal_mask noop_mask --length 2 {option} >{into}; echo $? >&2"
        ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
        *said, last = ran.stderr.splitlines()
        assert int(last) == (code or failures.DIFFERS), ran.stderr
        full = "flexattn diff: error: the result cannot be written to stdout: No space left on device"
        assert said == ([full] if code else [])


def test_with_json_stdout_is_one_document_whatever_is_written_there(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text(
        "import os, sys\nprint('a')\nos.write(1, b'b\\n')\nsys.__stdout__.write('c\\n')\n"
        "def mask(b, h, q_idx, kv_idx):\n    os.system('echo d')\n    return q_idx > kv_idx\n"
    )
    words = [sys.executable, "-m", "flexattn", "show", "loud:mask", "--length", "2", "--json"]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert json.loads(ran.stdout)["elements"] == [[0, 0], [1, 0]]
    assert {"a", "b", "c", "d"} <= set(ran.stderr.split())


def test_a_program_of_that_name_has_the_whole_package() -> None:
    named = "import sys; sys.argv = ['somewhere/flexattn']; import flexattn; "
    ran = process("-c", named + "print(flexattn.flex_attention.__name__, flexattn.masks)")
    assert ran.returncode == 0 and ran.stdout.startswith("flex_attention <module 'flexattn.masks'"), ran.stderr[-2000:]


def test_the_entry_point_is_there() -> None:
    module = importlib.import_module("flexattn.__main__")
    assert module.main is main.main
    points = importlib.import_module("importlib.metadata").entry_points(group="console_scripts", name="flexattn")
    assert [p.value for p in points] == ["flexattn_command.main:main"]


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
