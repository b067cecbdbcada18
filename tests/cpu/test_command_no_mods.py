"""What the command line says of names that are no mods, and of modules that cannot be imported."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_runs import Runner, runner

MODULE = """
import functools
import torch


class Window:
    def __init__(self, size):
        self.size = size

    def mask(self, b, h, q_idx, kv_idx):
        return q_idx - kv_idx < self.size

    @staticmethod
    def before(b, h, q_idx, kv_idx):
        return q_idx > kv_idx

    @classmethod
    def upto(cls, b, h, q_idx, kv_idx):
        return q_idx >= kv_idx


class Called(Window):
    __call__ = Window.mask


class Module(torch.nn.Module):
    def forward(self, b, h, q_idx, kv_idx):
        return q_idx >= kv_idx


class Plain:
    pass


window, called, module, plain = Window(2), Called(2), Module(), Plain()
table = {"before": Window.before}
several = [Window.before]
linear = torch.nn.Linear(2, 2)
part = functools.partial(lambda size, b, h, q_idx, kv_idx: q_idx - kv_idx < size, 2)


def three(b, h, q_idx):
    return q_idx > 0


def width(b, h, q_idx, kv_idx, size):
    return q_idx - kv_idx < size


def any_number(*indices):
    return indices[2] >= indices[3]


def distance(b, h, q_idx, kv_idx):
    return (q_idx - kv_idx) * 0.5


def ends(b, h, q_idx, kv_idx):
    raise SystemExit(7)


def everywhere(b, h, q_idx, kv_idx):
    return True
"""
MODULES = {
    "odd": MODULE,
    "leaves": "import sys\nsys.exit(7)\n",
    "fails": "assert 1 > 2\n",
    "unread": "def mask(b, h, q_idx, kv_idx) return\n",
    "lacks": "import no_such_thing_at_all\n",
}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Commands, in a folder that has these modules."""
    return runner(capsys, tmp_path, monkeypatch, MODULES)


SAID = {
    "odd:Window": "odd:Window is a class; a method is named by its object: write obj = Window(size) in the module, and name "
    "odd:obj.mask",
    "odd:Window.mask": "odd:Window.mask is a method without its object; a method is named by its object: write obj = "
    "Window(...) in the module, and name odd:obj.mask",
    "odd:window": "odd:window is of type Window, which has a mod as its method: odd:window.mask",
    "odd:Called": "odd:Called makes mods; call it: odd:Called(size)",
    "odd:Module": "odd:Module makes mods; call it: odd:Module(...)",
    "odd:Plain": "odd:Plain is a class; a mask_mod takes (b, h, q_idx, kv_idx) and a score_mod (score, b, h, q_idx, kv_idx). "
    "If its objects are mods, name one of them: odd:Plain()",
    "odd:plain": "odd:plain is of type Plain; a mask_mod, a score_mod or a BlockMask is asked for",
    "odd:table": "odd:table is a dict; a mask_mod, a score_mod or a BlockMask is asked for. Give its entry a name of its own",
    "odd:table.before": "odd:table is a dict, and a path goes through attributes; give its entry a name of its own",
    "odd:several": "odd:several is a list; a mask_mod",
    "odd:table['before']": "an index means nothing here. Give what it finds a name of its own in its module",
    "odd:linear": "odd:linear takes (input); a mask_mod takes",
    "odd:three": "odd:three takes (b, h, q_idx); a mask_mod takes (b, h, q_idx, kv_idx) and a score_mod (score, b, h, q_idx, "
    "kv_idx)\n",
    "odd:width": "What else a mask needs it captures: write a function of (size) that makes the mask",
    "odd:any_number": "odd:any_number takes (*indices); a mask_mod takes (b, h, q_idx, kv_idx) and a score_mod (score, b, h, "
    "q_idx, kv_idx). Write its parameters out",
    "odd:distance": "returns float32 values\nA mask is boolean",
    "odd:ends": "the code that is named ends Python by sys.exit(7)",
    "torch:ones": "torch:ones takes (...); a mask_mod takes (b, h, q_idx, kv_idx) and a score_mod (score, b, h, q_idx, "
    "kv_idx)\n",
    "leaves:mask": "module 'leaves' ends Python when it is imported, by sys.exit; put what it does as a script under",
    "leaves.py:mask": "'leaves.py' ends Python when it is imported",
    "fails:mask": "module 'fails' cannot be imported: AssertionError, at fails.py:1\n",
    "unread:mask": "module 'unread' cannot be imported: SyntaxError: expected ':' (unread.py, line 1)",
    "lacks:mask": "cannot be imported: ModuleNotFoundError: No module named 'no_such_thing_at_all', at lacks.py:1",
    "leavs:mask": "there is no module 'leavs' in this folder or on the Python path; did you mean leaves?",
    "odd.window:mask": "'odd' is a module and no package, so that there is no 'odd.window'; write odd:NAME",
    "nothing.at.all:mask": "a file is named by its path: nothing.py:NAME",
}


@pytest.mark.parametrize("text", SAID)
def test_what_is_no_mod_is_told_with_what_to_write(run: Runner, text: str) -> None:
    ran = run("show", text, "--length", "4")
    assert ran.code == 2 and SAID[text] in ran.err, ran.err
    assert "Traceback" not in ran.err
    document = run.json("show", text, "--length", "4")
    assert document["error"]["exit_code"] == 2 and SAID[text].strip() in document["error"]["message"]


SHOWN = {
    "odd:Window.before": "before",
    "odd:Window.upto": "upto",
    "odd:window.mask": "mask",
    "odd:called": "Called",
    "odd:Called(2)": "Called",
    "odd:module": "Module()",
    "odd:part": "partial(<lambda>)",
}


@pytest.mark.parametrize("text", SHOWN)
def test_what_is_a_mask_has_a_name_without_an_address(run: Runner, text: str) -> None:
    assert run.json("show", text, "--length", "4")["mask"] == SHOWN[text]


def test_a_mask_that_attends_everywhere_has_full_blocks(run: Runner) -> None:
    assert "\nkeys      every block is full\n" in run("show", "odd:everywhere", "--length", "4").out
