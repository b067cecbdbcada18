"""SVG and text pictures of block masks are read back and compared with the dense mask, element by element."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import hypothesis.strategies as st
import pytest
import torch
from block_pictures import Drawn, Painted, by_head, causal, cut, drawings, kinds_of, true_cells
from hypothesis import assume, given
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexattn import BlockMask, block_mask_cells, create_block_mask, create_mask, masks
from flexattn.block_mask_cells import COLORS, EMPTY, FULL, KINDS, PALEST, PARTIAL, ticks
from flexattn.block_mask_picture import svg
from flexattn.block_mask_plot import plot
from flexattn.block_mask_text import picture

SVG = "{http://www.w3.org/2000/svg}"
UNDRAWN = -1


def part(text: str, name: str) -> Any:
    found = ElementTree.fromstring(text).findall(f".//*[@data-part='{name}']")
    assert len(found) == 1, f"{len(found)} parts are called {name}"
    return found[0]


def has(text: str, name: str) -> bool:
    return ElementTree.fromstring(text).find(f".//*[@data-part='{name}']") is not None


def rects(group: Any) -> list[tuple[float, float, float, float]]:
    return [tuple(float(r.get(k)) for k in ("x", "y", "width", "height")) for r in group.iter(f"{SVG}rect")]


def painted(panel: Any, height: int, width: int) -> Painted:
    """The panel as an image of elements. The background comes first; nothing else lies on something else."""
    kind, opacity = torch.full((height, width), UNDRAWN), torch.zeros(height, width, dtype=torch.float64)
    for group in panel:
        drawn = KINDS.index(group.get("data-kind"))
        assert group.get("fill") == COLORS[drawn]
        for rect in rects(group):
            x, y, w, h = (int(n) for n in rect)
            assert (x, y, w, h) == rect and 0 <= x <= x + w <= width and 0 <= y <= y + h <= height
            assert bool((kind[y : y + h, x : x + w] == (UNDRAWN if drawn == EMPTY else EMPTY)).all())
            kind[y : y + h, x : x + w] = drawn
            opacity[y : y + h, x : x + w] = 0 if drawn == EMPTY else float(group.get("fill-opacity", 1))
    return Painted(kind, opacity)


def assert_same(seen: Painted, expected: Painted) -> None:
    assert torch.equal(seen.kind, expected.kind)
    torch.testing.assert_close(seen.opacity, expected.opacity, rtol=0, atol=1e-9)


# ---- SVG


@given(drawings())
def test_every_element_has_the_colour_of_its_block(d: Drawn) -> None:
    text = svg(d.mask, d.batch, d.head)
    assert_same(painted(part(text, "blocks"), *d.dense.shape), true_cells(kinds_of(d), 128, d.block, d.dense.shape))
    assert not has(text, "note")


@given(drawings(), st.integers(1, 9))
def test_a_cell_of_several_blocks_is_shaded_by_the_share_of_the_visited_ones(d: Drawn, most: int) -> None:
    kinds = kinds_of(d)
    assume(max(kinds.shape) > most)
    text = svg(d.mask, d.batch, d.head, max_cells=most)
    assert_same(painted(part(text, "blocks"), *d.dense.shape), true_cells(kinds, most, d.block, d.dense.shape))
    largest = [max(b - a for a, b in pairwise(cut(n, most))) for n in kinds.shape]
    assert f"{largest[0]} × {largest[1]} blocks" in part(text, "note").text


def test_a_cell_with_one_visited_block_does_not_look_empty() -> None:
    count = torch.zeros(1, 1, 1000, dtype=torch.int32)
    count[0, 0, 500] = 1
    mask = BlockMask.from_kv_blocks(count, torch.full((1, 1, 1000, 1), 3), BLOCK_SIZE=1, seq_lengths=(1000, 1000))
    seen = painted(part(svg(mask, max_cells=1), "blocks"), 1000, 1000)
    assert bool((seen.kind == PARTIAL).all()) and float(seen.opacity.min()) == PALEST


@given(drawings(), st.sampled_from([3, 128]))
def test_bars_count_the_blocks_that_a_row_visits(d: Drawn, most: int) -> None:
    kinds = kinds_of(d)
    group = part(svg(d.mask, d.batch, d.head, max_cells=most), "rows")
    bars: dict[tuple[str, float, float], tuple[float, float]] = {}
    for kind in group:
        for x, y, width, height in rects(kind):
            bars[kind.get("data-kind"), y, y + height] = (x, width)
    rows, expected = cut(kinds.shape[0], most), {}
    for top, bottom in pairwise(rows):
        p, f = ((kinds[top:bottom] == k).sum().item() / (bottom - top) for k in (PARTIAL, FULL))
        place = top * d.block[0], min(bottom * d.block[0], d.dense.shape[0])
        if p:
            expected[("partial", *place)] = (0, p)
        if f:
            expected[("full", *place)] = (p, f)
    assert bars.keys() == expected.keys()
    for key, bar in bars.items():
        assert bar == pytest.approx(expected[key], abs=1e-3)


def test_the_longest_bar_fills_its_strip_and_is_labelled() -> None:
    text = svg(causal(64, 16))
    scale = re.search(r"scale\((\S+) ", part(text, "rows").get("transform"))
    assert scale is not None and float(scale[1]) * 4 == pytest.approx(72)
    assert part(text, "most").text == "4"


@given(drawings(), st.data())
def test_the_zoom_shows_the_elements_of_its_block(d: Drawn, data: st.DataObject) -> None:
    kinds = kinds_of(d)
    row, column = (data.draw(st.integers(0, n - 1)) for n in kinds.shape)
    height, width = d.block
    tile = d.dense[row * height : (row + 1) * height, column * width : (column + 1) * width]
    text = svg(d.mask, d.batch, d.head, (row, column))
    seen = painted(part(text, "elements"), *tile.shape)
    assert torch.equal(seen.kind == FULL, tile) and torch.equal(seen.kind == EMPTY, ~tile)
    caption = (
        f"block ({row}, {column}), {KINDS[kinds[row, column]]}: {100 * tile.double().mean().item():.4g} % attended"
    )
    assert part(text, "caption").text == caption
    # The mark is in pixels, and the panel says how many of them an element has.
    numbers = re.fullmatch(r"translate\((\S+) (\S+)\) scale\((\S+) (\S+)\)", part(text, "blocks").get("transform"))
    assert numbers is not None
    x, y, across, down = (float(n) for n in numbers.groups())
    place = x + column * width * across, y + row * height * down, tile.shape[1] * across, tile.shape[0] * down
    assert [pytest.approx(place, abs=2e-3)] * 2 == rects(part(text, "mark"))


def test_a_zoom_into_a_large_block_has_cells_of_several_elements() -> None:
    text = svg(causal(1000, 1000), zoom=(0, 0), max_cells=7)
    elements = torch.where(torch.ones(1000, 1000).tril().bool(), FULL, EMPTY)
    assert_same(painted(part(text, "elements"), 1000, 1000), true_cells(elements, 7, (1, 1), (1000, 1000)))


@pytest.mark.parametrize(("kind", "column"), [("full", 0), ("empty", 2)])
def test_a_zoom_into_a_block_that_is_not_partial_never_calls_the_mask(kind: str, column: int) -> None:
    def never(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        raise AssertionError("called")

    mask = causal(48, 16).with_mask_mod(never)
    text = svg(mask, zoom=(1, column))
    drawn = painted(part(text, "elements"), 16, 16)
    assert bool((drawn.kind == KINDS.index(kind)).all())
    with pytest.raises(Exception, match="called"):
        svg(mask, zoom=(1, 1))


def test_the_zoom_is_that_of_the_batch_entry_and_head() -> None:
    mask = create_block_mask(by_head, 2, 3, 100, 100, "cpu", 32)
    dense = create_mask(by_head, 2, 3, 100, 100, "cpu")
    shown = []
    for b in range(2):
        for h in range(3):
            text = svg(mask, b, h, zoom=(3, 2))
            tile = dense[b, h, 96:, 64:96]
            assert torch.equal(painted(part(text, "elements"), 4, 32).kind == FULL, tile)
            assert part(text, "heading").text == f"by_head, batch {b}, head {h}"
            shown.append(part(text, "facts").text)
            assert shown[-1].endswith(f"sparsity {mask[b : b + 1, h : h + 1].sparsity():.2f} %")
    assert len(set(shown)) > 2


def test_a_zoom_into_a_slice_shows_the_slice() -> None:
    whole, dense = create_block_mask(by_head, 2, 3, 100, 100, "cpu", 32), create_mask(by_head, 2, 3, 100, 100, "cpu")
    text = svg(whole[1:, 2:, 2:], zoom=(1, 1))
    assert torch.equal(painted(part(text, "elements"), 4, 32).kind == FULL, dense[1, 2, 96:, 32:64])


def test_auto_zooms_into_the_first_partial_block() -> None:
    def band(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= 16) & (kv_idx >= 20) & (kv_idx < 40)

    count, index = torch.tensor([[[0, 2, 1, 0]]]), torch.tensor([[[[0, 0], [2, 1], [3, 0], [0, 0]]]])
    mask = BlockMask.from_kv_blocks(count, index, None, None, 16, band, (64, 64))
    assert part(svg(mask, zoom="auto"), "caption").text.startswith("block (1, 1), partial")
    none = create_block_mask(masks.noop_mask, None, None, 64, 64, "cpu", 16)
    assert not has(svg(none, zoom="auto"), "elements") and not has(svg(none, zoom="auto"), "mark")


def test_what_lies_past_a_count_is_not_drawn_and_narrow_lists_are_whole_masks() -> None:
    count, index = torch.tensor([[[1, 0, 2]]]), torch.tensor([[[[4, 0], [3, 3], [0, 2]]]])
    full_count, full_index = torch.tensor([[[1, 1, 0]]]), torch.tensor([[[[1], [0], [4]]]])
    lengths = (3 * 8 - 3, 5 * 8 - 7)
    kinds = torch.tensor([[0, FULL, 0, 0, PARTIAL], [FULL, 0, 0, 0, 0], [PARTIAL, 0, PARTIAL, 0, 0]])
    mask = BlockMask.from_kv_blocks(count, index, full_count, full_index, 8, None, lengths)
    assert_same(painted(part(svg(mask), "blocks"), *lengths), true_cells(kinds, 9, (8, 8), lengths))
    assert picture(mask, -1, 1) == "  ██    ██\n██        \n██  ██    "
    mask = BlockMask.from_kv_blocks(count, index, None, None, 8, None, lengths)
    kinds[kinds == FULL] = EMPTY
    assert_same(painted(part(svg(mask), "blocks"), *lengths), true_cells(kinds, 9, (8, 8), lengths))


def test_a_block_in_both_lists_counts_once_as_partial() -> None:
    count, index = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 2, dtype=torch.int32)
    mask = BlockMask((8, 16), count, index, count, index, (8, 8))  # unchecked
    drawn = painted(part(svg(mask), "blocks"), 8, 16)
    assert_same(drawn, true_cells(torch.tensor([[PARTIAL, EMPTY]]), 9, (8, 8), (8, 16)))
    assert part(svg(mask), "most").text == "1" and picture(mask, -1, 1) == "██  "


def test_equal_neighbours_are_one_rectangle() -> None:
    blocks = part(svg(causal(100 * 16, 16)), "blocks")
    assert len(rects(blocks)) == 1 + 100 + 99  # the background, the diagonal, and what is left of it


def test_a_mask_is_looked_at_in_pieces_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = create_block_mask(by_head, 2, 3, 100, 90, "cpu", (8, 16))
    large = causal(90, 90)

    def drawn() -> list[str]:
        pictures = [svg(mask, 1, 2, zoom="auto", max_cells=n) for n in (5, 128)]
        return [*pictures, svg(large, zoom=(0, 0), max_cells=4), picture(mask, 5, 6)]

    whole = drawn()
    for chunk in (1, 13, 40):
        monkeypatch.setattr(block_mask_cells, "_CHUNK", chunk)
        assert drawn() == whole


@pytest.mark.parametrize("lengths", [(0, 0), (0, 40), (40, 0), (1, 1), (1, 5000), (5000, 1)])
def test_masks_without_elements_and_thin_ones_are_drawn(lengths: tuple[int, int]) -> None:
    mask = create_block_mask(masks.noop_mask, None, None, *lengths, "cpu", 16)
    text = svg(mask, zoom="auto")
    drawn = painted(part(text, "blocks"), *lengths)
    assert bool((drawn.kind == FULL).all()) and part(text, "facts").text.endswith("sparsity 0.00 %")
    assert "inf" not in text and "nan" not in text


def test_the_axes_are_labelled_in_elements() -> None:
    text = svg(causal(1000, 128), zoom=(7, 7))
    labels: dict[str, list[int]] = {"queries": [], "keys": []}
    for label in ElementTree.fromstring(text).iter(f"{SVG}text"):
        if label.get("data-axis"):
            labels[label.get("data-axis", "")].append(int(label.text or ""))
    grid, block = [0, 256, 512, 768, 1000], [896, 928, 960, 1000]
    assert labels == {"queries": grid + block, "keys": grid + block}


@given(st.integers(0, 1000), st.integers(0, 3000), st.integers(1, 200), st.integers(1, 9))
def test_ticks_are_the_ends_and_whole_steps_apart(start: int, length: int, unit: int, most: int) -> None:
    at = ticks(start, start + length, unit, most)
    assert at[0] == start and at[-1] == start + length and len(at) <= most + 1
    assert at == sorted(set(at))
    inner = [n - start for n in at[:-1]]
    steps = {b - a for a, b in pairwise(inner)}
    assert len(steps) <= 1 and all(s % unit == 0 and (s // unit).bit_count() == 1 for s in steps)


def test_text_is_escaped() -> None:
    title = "a < b & \"c\" 'd' ]]> <script>\x00\x1b\ud800 é \U0001f600"
    text = svg(causal(64, 16), title=title)
    clean = re.sub("[\x00\x1b\ud800]", "\ufffd", title)
    root = ElementTree.fromstring(text.encode())
    assert root.findtext(f"{SVG}title") == clean == part(text, "heading").text
    unnamed = causal(64, 16).with_mask_mod(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx)
    assert part(svg(unnamed), "heading").text == "<lambda>"
    assert root.tag == f"{SVG}svg" and not list(root.iter(f"{SVG}script"))


def test_a_long_name_is_cut_short() -> None:
    mask = causal(64, 16).with_mask_mod(masks.and_masks(*[masks.sliding_window(n) for n in range(1, 30)]))
    assert len(part(svg(mask), "heading").text) == 64


def test_a_picture_needs_nothing_from_elsewhere() -> None:
    text = svg(causal(64, 16), zoom="auto")
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
    assert "href" not in text and text == svg(causal(64, 16), zoom="auto")
    meanings = [t.text for t in part(text, "legend").iter(f"{SVG}text")]
    assert [m.split(":")[0] for m in meanings] == list(KINDS)


def test_the_colours_differ_in_grey() -> None:
    grey = [sum(w * int(c[i : i + 2], 16) for w, i in ((0.299, 1), (0.587, 3), (0.114, 5))) for c in COLORS]
    assert grey[EMPTY] - grey[PARTIAL] > 60 and grey[PARTIAL] - grey[FULL] > 60


@pytest.mark.parametrize("draw", [svg, plot])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch": 2}, IndexError, "batch 2 is out of range; valid: 0 to 1"),
        ({"batch": -1}, IndexError, "batch -1 is out of range; valid: 0 to 1"),
        ({"head": 1}, IndexError, "head 1 is out of range; valid: 0"),
        ({"head": "all"}, ValueError, "head is 'all'; it must be an int, valid: 0"),
        ({"batch": True}, ValueError, "batch is True; it must be an int, valid: 0 to 1"),
        ({"zoom": (4, 0)}, IndexError, "zoom row 4 is out of range; the mask has 4 rows of blocks, valid: 0 to 3"),
        (
            {"zoom": (0, -1)},
            IndexError,
            "zoom column -1 is out of range; the mask has 5 columns of blocks, valid: 0 to 4",
        ),
        ({"zoom": 3}, ValueError, r'zoom is 3; it must be \(row, column\) of a block, "auto" or None'),
        ({"zoom": (1, 2, 3)}, ValueError, r"zoom is \(1, 2, 3\)"),
        ({"zoom": (1.0, 2)}, ValueError, r"zoom is \(1.0, 2\)"),
        ({"zoom": "first"}, ValueError, "zoom is 'first'"),
        ({"max_cells": 0}, ValueError, "max_cells is 0; it must be a number of cells a side, at least 1"),
    ],
)
def test_what_the_mask_does_not_have_is_refused(draw: Any, arguments: Any, error: Any, message: str) -> None:
    mask = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx + b, 2, None, 60, 70, "cpu", 16)
    with pytest.raises(error, match=message):
        draw(mask, **arguments)


def test_an_empty_mask_has_no_block_to_zoom_into() -> None:
    with pytest.raises(IndexError, match="valid: none, the mask is empty"):
        svg(create_block_mask(masks.noop_mask, None, None, 0, 16, "cpu", 16), zoom=(0, 0))


# ---- text


@given(drawings(), st.one_of(st.just(-1), st.integers(1, 9), st.tuples(st.integers(1, 9), st.just(-1))))
def test_characters_are_those_of_the_blocks(d: Drawn, grid_size: Any) -> None:
    listed = kinds_of(d) != EMPTY
    sides = grid_size if isinstance(grid_size, tuple) else (grid_size, grid_size)
    rows, columns = (cut(n, n if side == -1 else side) for n, side in zip(listed.shape, sides, strict=True))
    lines = []
    for top, bottom in pairwise(rows):
        cells = [listed[top:bottom, a:b] for a, b in pairwise(columns)]
        lines.append("".join(("█" if bool(c.all()) else "░" if bool(c.any()) else " ") * 2 for c in cells))
    one = d.mask[d.batch : d.batch + 1, d.head : d.head + 1]
    assert picture(one, grid_size, 4) == "\n".join(lines)


def test_a_mask_of_16_million_blocks_is_drawn() -> None:
    n = 4096
    row = torch.arange(n, dtype=torch.int32)
    mask = BlockMask((n * 128, n * 128), (row + 1).view(1, 1, n), row.expand(1, 1, n, n), mask_mod=masks.causal_mask)
    assert picture(mask, 4, 1) == "░░      \n██░░    \n████░░  \n██████░░"


def test_a_text_picture_refuses_a_negative_size() -> None:
    with pytest.raises(ValueError, match="grid_size is -2; a side has so many characters, or -1 for one a block"):
        picture(causal(64, 16), -2, 1)


def test_blocks_are_counted_once_in_any_order_of_their_lists() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = [torch.randint(0, 9, (1, 1, 7), generator=generator, dtype=torch.int32) for _ in range(2)]
    lists = [torch.randint(0, 6, (1, 1, 7, 8), generator=generator, dtype=torch.int32) for _ in range(2)]
    mask = BlockMask((14, 11), counts[0], lists[0], counts[1], lists[1], (2, 2), masks.noop_mask)
    listed = [
        torch.tensor([[c in i[:n].tolist() for c in range(6)] for n, i in zip(count[0, 0], index[0, 0], strict=True)])
        for count, index in zip(counts, lists, strict=True)
    ]
    assert bool((listed[0] & listed[1]).any())
    cells, sparsity = block_mask_cells.gathered_blocks(mask, 0, 0, (-1, -1))
    assert torch.equal(cells.partial, listed[0].long()) and torch.equal(cells.full, (listed[1] & ~listed[0]).long())
    elements = (listed[0] | listed[1]).repeat_interleave(2, 0).repeat_interleave(2, 1)[:, :11]
    assert sparsity == pytest.approx(100 * (1 - elements.double().mean().item()))
    few, _ = block_mask_cells.gathered_blocks(mask, 0, 0, (1, 2))
    assert few.partial.tolist() == [[int(listed[0][:, :3].sum()), int(listed[0][:, 3:].sum())]]


def test_a_picture_makes_no_array_of_all_blocks() -> None:
    mask = create_block_mask(masks.sliding_window(64), None, None, 1 << 20, 1 << 20, "cpu", 16)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Sizes():
        cells, _ = block_mask_cells.gathered_blocks(mask, 0, 0, (32, 32))
    assert int(cells.things.sum()) == 1 << 32 and int(cells.visited.sum()) == 5 * (1 << 16) - 10
    assert largest <= 33 * (1 << 16)  # cells of a row, by rows
