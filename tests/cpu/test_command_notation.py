"""The notation of masks and mods on the command line: what is read, what it names, and what its errors say."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flexattn
from flexattn import masks, mods
from flexattn_command import build, notation
from flexattn_command.failures import Mistake
from flexattn_command.notation import NotationError, parse

MODULE = """
import torch
import flexattn
from torch import nn

ids = torch.tensor([0, 0, 1, 1])
number = 3


def before(b, h, q_idx, kv_idx):
    return q_idx > kv_idx


def window(size, left=0):
    return lambda b, h, q_idx, kv_idx: (q_idx - kv_idx >= left) & (q_idx - kv_idx < size)


def table(bias: torch.Tensor):
    return lambda b, h, q_idx, kv_idx: bias[q_idx, kv_idx]


def shifted(mask, by):
    return lambda b, h, q_idx, kv_idx: mask(b, h, q_idx + by, kv_idx)


def named(word):
    assert word == "a:b & c", word
    return before


def scaled(factor):
    return lambda score, b, h, q_idx, kv_idx: score * factor


def fails(size):
    raise RuntimeError("no such size")


class Holder:
    inner = before


block = flexattn.create_block_mask(before, None, None, 4, 4, device="cpu", BLOCK_SIZE=2)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a module of masks in a package and beside it."""
    package = tmp_path / "ownmasks"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "few.py").write_text(MODULE)
    (tmp_path / "loose-masks.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import no_such_thing_at_all\n")
    (tmp_path / "fallen.py").write_text("raise ValueError('fell over')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def dense(text: str, length: int = 4) -> torch.Tensor:
    return flexattn.create_mask(build.mask(parse(text)).mask_mod, None, None, length, length, "cpu")[0, 0]


def wanted(mask: flexattn.masks.MaskMod, length: int = 4) -> torch.Tensor:
    return flexattn.create_mask(mask, None, None, length, length, "cpu")[0, 0]


def test_the_names_are_those_of_the_modules() -> None:
    assert sorted(notation.MASKS) == sorted(masks.__all__)
    assert sorted(notation.MODS) == sorted(mods.__all__)
    for dotted in notation.METHODS:
        name, method = dotted.split(".")
        assert callable(getattr(getattr(masks, name), method))


IDS = torch.tensor([0, 0, 1, 1])
BEFORE = lambda b, h, q_idx, kv_idx: q_idx > kv_idx
NAMED = {
    "causal_mask": masks.causal_mask,
    "noop_mask": masks.noop_mask,
    "causal()": masks.causal_mask,
    "causal(offset=-1)": BEFORE,
    "sliding_window(2)": masks.sliding_window(2),
    "sliding_window(size=2)": masks.sliding_window(2),
    "window(1, None)": masks.window(1, None),
    "causal.bottom_right(4, 6)": masks.causal(2),
    "natten_2d(2, 2, [1, 1])": masks.natten_2d(2, 2, (1, 1)),
    "document_mask([0, 0, 1, 1])": masks.document_mask(IDS),
    "document_mask(document_ids=[0,0,1,1], kv_document_ids=[1,1,0,0])": masks.document_mask(IDS, IDS.flip(0)),
    "documents(2, 2)": masks.document_mask(IDS),
    "documents([2, 2])": masks.document_mask(IDS),
    "tree.from_parents([-1, 0, 0, 1])": masks.tree.from_parents(torch.tensor([-1, 0, 0, 1])),
    "and_masks(causal_mask, sliding_window(2))": masks.sliding_window(2),
    "or_masks(~causal_mask, causal_mask)": masks.noop_mask,
    "not_mask(causal_mask)": masks.not_mask(masks.causal_mask),
    "causal_mask & ~sliding_window(1)": BEFORE,
    "~(causal_mask | not_mask(causal_mask))": masks.not_mask(masks.noop_mask),
    "causal_mask &\n sliding_window(2)": masks.sliding_window(2),
    "ownmasks.few:before": BEFORE,
    "ownmasks.few:Holder.inner": BEFORE,
    "ownmasks.few:window(2)": masks.sliding_window(2),
    "ownmasks.few:window(size=3, left=1)": masks.and_masks(BEFORE, masks.sliding_window(3)),
    "ownmasks.few:named('a:b & c')": BEFORE,
    "ownmasks.few:shifted(causal_mask, -1)": BEFORE,
    "ownmasks.few:table([[True, False], [False, True]])": None,
    "loose-masks.py:before": BEFORE,
    "./loose-masks.py:window(2)&causal_mask": masks.sliding_window(2),
    "~loose-masks.py:before": masks.not_mask(BEFORE),
    "ownmasks/few.py:before|ownmasks.few:before": BEFORE,
    "ownmasks.few:block": BEFORE,
    "~ownmasks.few:block": masks.not_mask(BEFORE),
    "ownmasks.few:block & ownmasks.few:block": BEFORE,
    "ownmasks.few:block | noop_mask": masks.noop_mask,
}


@pytest.mark.parametrize("text", NAMED)
@pytest.mark.usefixtures("folder")
def test_a_notation_names_its_mask(text: str) -> None:
    expected = NAMED[text]
    if expected is None:
        assert dense(text, 2).tolist() == [[True, False], [False, True]]
    else:
        assert torch.equal(dense(text), wanted(expected))


@pytest.mark.usefixtures("folder")
def test_a_path_may_be_absolute_and_of_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert torch.equal(dense(f"{folder}/loose-masks.py:before"), wanted(BEFORE))
    assert torch.equal(dense("~/loose-masks.py:before"), wanted(BEFORE))
    assert torch.equal(dense("~~/loose-masks.py:before"), wanted(masks.not_mask(BEFORE)))


@pytest.mark.usefixtures("folder")
def test_a_file_is_imported_once() -> None:
    first, second = (build.subject(parse("loose-masks.py:before")).value for _ in range(2))
    assert first is second


def test_score_mods_are_told_by_their_arguments(folder: Path) -> None:
    at = [torch.tensor(i) for i in (0, 1, 3, 1)]
    for text, mod in {
        "identity": mods.identity,
        "softcap(2.0)": mods.softcap(2.0),
        "softcap(cap=2)": mods.softcap(2),
        "alibi(4)": mods.alibi(mods.alibi_slopes(4)),
        "alibi(alibi_slopes(4))": mods.alibi(mods.alibi_slopes(4)),
        "alibi([0.5, 0.25])": mods.alibi(torch.tensor([0.5, 0.25])),
        "relative_bias([[-1.0, 0.0, 1.0]] )": None,
        "compose(softcap(2), alibi(4))": mods.compose(mods.softcap(2), mods.alibi(mods.alibi_slopes(4))),
        "ownmasks.few:scaled(-0.5)": lambda score, b, h, q_idx, kv_idx: score * -0.5,
    }.items():
        found = build.subject(parse(text))
        assert (found.role, found.mask_mod) == ("score_mod", None)
        if mod is not None:
            assert torch.equal(found.score_mod(torch.tensor(3.0), *at), mod(torch.tensor(3.0), *at)), text
    with pytest.raises(
        Mistake, match=re.escape("softcap(2) takes (score, b, h, q_idx, kv_idx): it is a score_mod, and a mask")
    ):
        build.mask(parse("softcap(2)"))


def test_pytorchs_block_masks_are_taken(folder: Path) -> None:
    (folder / "theirs.py").write_text(
        "from torch.nn.attention.flex_attention import create_block_mask\n"
        "block = create_block_mask(lambda b, h, q, k: q > k, None, None, 4, 4, device='cpu', BLOCK_SIZE=2)\n"
    )
    found = build.mask(parse("theirs.py:block"))
    assert found.role == "block_mask" and isinstance(found.value, flexattn.BlockMask)


# ---- what is refused: the text, where the message points, and what it says
REFUSED = {
    "": (0, "nothing is written here; write a mask of flexattn.masks (causal_mask"),
    "causl_mask": (0, "'causl_mask' is no name of flexattn.masks or flexattn.mods; did you mean causal_mask?"),
    "causal_mask & my.window(3)": (14, "a function of your own is my:window"),
    "causal_mask & zzz": (14, "the names are alibi, alibi_slopes, and_masks"),
    "causal_mask and noop_mask": (0, "masks are combined by &, | and ~: write & instead of a word"),
    "not causal_mask": (0, "masks are combined by &, | and ~: write ~ instead of a word"),
    "causal_mask - noop_mask": (0, "arithmetic means nothing here. Combine masks by &, | and ~"),
    "q_idx >= kv_idx": (0, "a comparison means nothing here"),
    "q_idx": (0, "'q_idx' is an argument of a mod, and this is the place of a whole one. Write the function in a file"),
    "lambda b, h, q_idx, kv_idx: q_idx >= kv_idx": (0, "a lambda means nothing here"),
    "causal_mask & (": (14, "not understood: '(' was never closed"),
    "causal_mask &": (13, "not understood: invalid syntax"),
    "sliding_window(3": (14, "not understood: '(' was never closed"),
    "sliding_window(2 + 3)": (15, "arithmetic means nothing here"),
    "3": (0, "3 is no mask"),
    "causal_mask & 3": (14, "3 is no mask; &, | and ~ combine masks"),
    "~3": (1, "3 is no mask"),
    "sliding_window(*[3])": (15, "write the arguments one by one, without *"),
    "sliding_window(**{'size': 3})": (0, "write the arguments one by one, without **"),
    "document_mask([0, x])": (14, "arguments are written out: numbers, strings, True, None, lists"),
    "causal_mask[0]": (0, "an index means nothing here. Give what it finds a name of its own in its module"),
    "causal_mask & my:masks['a']": (14, "an index means nothing here. Give what it finds a name of its own"),
    "my.masks:": (0, "the name is missing after my.masks: Write my.masks:NAME"),
    "causal_mask & dir/my.py:": (14, "the name is missing after dir/my.py: Write dir/my.py:NAME"),
    "dir/my:window": (0, "a function of a file is dir/my.py:window"),
    "causal_mask & dir/my.py": (14, "a function of a file is dir/my.py:NAME"),
    "sliding_window(3)(4)": (0, "only a name can be called"),
    "ä & causl": (0, "'ä' is no name"),
    "'ä' & causl": (6, "did you mean causal"),
    "sliding_window(3 if True else 4)": (15, "a choice means nothing here"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_refusal_points_at_the_place(text: str) -> None:
    place, message = REFUSED[text]
    with pytest.raises(NotationError) as caught:
        parse(text)
    said, quoted, pointer = str(caught.value).rsplit("\n", 2)
    assert message in said, said
    assert quoted == f"  {text}"
    assert pointer == " " * (2 + place) + "^", str(caught.value)


REFUSED_WHEN_BUILT = {
    "sliding_window": (
        0,
        "sliding_window makes mods; call it: sliding_window(size)",
    ),
    "causal": (0, "causal makes mods; call it: causal()"),
    "sliding_window()": (0, "missing a required argument: 'size'; write sliding_window(size)"),
    "sliding_window(3, 4)": (0, "too many positional arguments; write sliding_window(size)"),
    "window(1, right=2, 3)": None,
    "window(1, rigt=2)": (0, "write window(left, right)"),
    "causal_mask & sliding_window(0)": (14, "sliding_window: size must be an int, 1 or more; got 0"),
    "causal_mask(3)": (0, "causal_mask is itself a mod: write it without ()"),
    "softcap(0)": (0, "softcap: softcap(0): the cap must be positive"),
    "softcap(30) & causal_mask": (0, "softcap(...) is a score_mod; &, | and ~ combine masks"),
    "document_mask([[0], [1, 2]])": (0, "expected sequence of length 1 at dim 1"),
    "alibi_slopes(4)": (0, "alibi_slopes(...) is of type Tensor; a mask_mod, a score_mod or a BlockMask is asked for"),
    "causal_mask | ownmasks.few:windw(3)": (14, "ownmasks.few has no 'windw'; did you mean window?"),
    "ownmasks.few:Holder.outer": (0, "ownmasks.few:Holder has no 'outer'; it has inner"),
    "ownmasks.few:number": (0, "ownmasks.few:number is of type int; a mask_mod"),
    "ownmasks.few:number(3)": (0, "ownmasks.few:number is of type int, which cannot be called"),
    "ownmasks.few:window": (0, "call it: ownmasks.few:window(size)"),
    "ownmasks.few:window()": (0, "missing a required argument: 'size'; write ownmasks.few:window(size, left=0)"),
    "ownmasks.few:fails(3)": (0, "ownmasks.few:fails: RuntimeError: no such size"),
    "ownmasks.many:window(3)": (
        0,
        "there is no module 'ownmasks.many' in this folder or on the Python path; a file is named",
    ),
    "nomasks:window(3)": (0, "by its path: nomasks.py:NAME"),
    "nomasks.py:window(3)": (0, "there is no file 'nomasks.py'"),
    "broken:mask": (
        0,
        "module 'broken' cannot be imported: ModuleNotFoundError: No module named 'no_such_thing_at_all'",
    ),
    "fallen:mask": (0, "module 'fallen' cannot be imported: ValueError: fell over, at fallen.py:1"),
    "fallen.py:mask": (0, "'fallen.py' cannot be imported: ValueError: fell over, at fallen.py:1"),
}


@pytest.mark.parametrize("text", REFUSED_WHEN_BUILT)
@pytest.mark.usefixtures("folder")
def test_what_cannot_be_built_is_refused_at_its_place(text: str) -> None:
    expected = REFUSED_WHEN_BUILT[text]
    if expected is None:
        with pytest.raises(NotationError, match="positional argument follows keyword argument"):
            parse(text)
        return
    with pytest.raises(Mistake) as caught:
        build.subject(parse(text))
    said, quoted, pointer = str(caught.value).rsplit("\n", 2)
    assert expected[1] in said, said
    assert quoted == f"  {text}"
    assert pointer == " " * (2 + expected[0]) + "^", str(caught.value)


def test_a_combination_of_block_masks_that_do_not_fit_is_refused(folder: Path) -> None:
    (folder / "longer.py").write_text(
        "import flexattn\n"
        "block = flexattn.create_block_mask(flexattn.masks.causal_mask, None, None, 8, 8, device='cpu', BLOCK_SIZE=2)\n"
    )
    with pytest.raises(Mistake, match="lengths"):
        build.subject(parse("ownmasks.few:block & longer.py:block"))


@given(st.text(alphabet="causl_mkwindo()[]{}&|~:.,=*'\"0123 /\\ä\n", max_size=30))
def test_any_text_is_a_notation_or_refused(text: str) -> None:
    try:
        tree = parse(text).tree
    except NotationError as error:
        assert str(error).endswith("^")
    else:
        assert isinstance(tree, (notation.Name, notation.Reference, notation.Call, notation.Combined))


def test_a_text_that_is_nested_too_deeply_is_refused() -> None:
    for text in (
        "~" * 50_000 + "causal_mask",
        "(" * 5_000 + "causal_mask" + ")" * 5_000,
        " & ".join(["causal_mask"] * 50_000),
    ):
        with pytest.raises(NotationError, match="not understood"):
            parse(text)


def test_sizes_are_read_of_captured_tensors() -> None:
    ids, bias = torch.zeros(2, 5, dtype=torch.int32), torch.zeros(3, 7)
    found = build.read_sizes(
        lambda score, b, h, q_idx, kv_idx: score + bias[h, kv_idx],
        lambda b, h, q_idx, kv_idx: (ids[b, q_idx] == 0) & (ids[b, kv_idx] == 0),
    )
    assert found == {"b": 2, "h": 3, "q_idx": 5, "kv_idx": 5}
    assert build.read_sizes(None, masks.causal_mask) == {}
    assert build.read_sizes(None, lambda b, h, q_idx, kv_idx: q_idx if q_idx else kv_idx) == {}


def test_a_folder_is_importable_where_the_command_runs(folder: Path) -> None:
    sys.path[:] = [p for p in sys.path if p not in ("", os.getcwd())]
    assert build.subject(parse("ownmasks.few:before")).role == "mask_mod"
